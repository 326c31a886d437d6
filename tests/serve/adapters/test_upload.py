"""Whatever arrives, two files or a sentence come out, and nothing lands elsewhere."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from serve.adapters import upload
from serve.adapters.adapter import CONFIG, FILES, NOTES, WEIGHTS
from serve.adapters.archive import zstd
from serve.adapters.byte_ledger import ByteLedger, Kind, Room
from serve.adapters.upload import receive
from serve.errors import AdapterRejected, BadRequest, LoradockError, OutOfSpace, TooLarge

BOUNDARY = "frontier"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"
# Weights begin as safetensors do: the length of a header, and an object.
CONTENT = {CONFIG: b'{"r": 8}', WEIGHTS: (1000).to_bytes(8, "little") + b"{" + b"weights" * 1000}
HARD = settings(max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "150")), deadline=None)


def part(name: str, content: bytes, filename: str | None = None, extra: str = "") -> bytes:
    where = f'Content-Disposition: form-data; name="{name}"' + (
        f'; filename="{filename}"' if filename is not None else ""
    )
    return f"--{BOUNDARY}\r\n{where}\r\n{extra}\r\n".encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def loose() -> list[bytes]:
    return [part("files", content, name) for name, content in CONTENT.items()]


def room_in(folder: Path) -> Room:
    return ByteLedger(folder, reserve=0).room("acme", Kind.UPLOADS)


async def send(folder: Path, body: bytes, *, kind: str = TYPE, max_bytes: int = 1 << 20, step: int = 1000):
    async def stream():
        for at in range(0, len(body), step):
            yield body[at : at + step]

    return await receive(stream(), kind, folder, room_in(folder), max_bytes=max_bytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "quarantine" / "inside"
    folder.mkdir(parents=True)
    return folder


def arrived(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NOTES}


def zipped(entries: dict[str, bytes], **options) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", options.pop("compression", zipfile.ZIP_DEFLATED), **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(entries: dict[str, bytes], mode: str = "w", **options) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def special(kind: bytes, name: str = "x", target: str = "/etc/passwd") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        archive.addfile(info)
    return out.getvalue()


# What is taken


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
async def test_two_files_and_some_words_arrive_however_the_bytes_are_cut(folder, step):
    body = form(part("name", "piratĕ".encode()), *loose(), part("promote", b"true"))
    assert await send(folder, body, step=step) == {"name": "piratĕ", "promote": "true"}
    assert arrived(folder) == CONTENT


async def test_the_files_are_private(folder):
    await send(folder, form(*loose()))
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


@pytest.mark.parametrize("prefix", ["out/", "../../", "/etc/", "C:\\\\x\\\\", "./"])
async def test_only_the_last_part_of_a_file_name_counts(folder, prefix):
    await send(folder, form(*(part("files", content, prefix + name) for name, content in CONTENT.items())))
    assert arrived(folder) == CONTENT
    assert os.listdir(folder.parent) == ["inside"]


@pytest.mark.parametrize(
    "name", ["README.md", "tokenizer.json", "training_args.bin", "optimizer.pt", "rng_state.pth", ""]
)
async def test_what_lies_beside_an_adapter_is_passed_over(folder, name):
    await send(folder, form(part("files", b"x" * 5000, name), *loose()))
    assert arrived(folder) == CONTENT


PACKED = {
    "zip": zipped(CONTENT),
    "stored zip": zipped(CONTENT, compression=zipfile.ZIP_STORED),
    "zip of a folder": zipped(
        {f"my adapter/{name}": content for name, content in CONTENT.items()} | {"my adapter/": b""}
    ),
    "tar": tarred(CONTENT),
    "tar.gz": tarred(CONTENT, "w:gz"),
    "gnu tar": tarred({f"./{name}": content for name, content in CONTENT.items()}, "w:gz", format=tarfile.GNU_FORMAT),
    "pax tar": tarred({f"{'é' * 90}/{name}": content for name, content in CONTENT.items()}, format=tarfile.PAX_FORMAT),
    "long gnu": tarred(
        {f"{'d' * 150}/{name}": content for name, content in CONTENT.items()}, format=tarfile.GNU_FORMAT
    ),
    "two gzip members": gzip.compress(tarred(CONTENT)[:3000]) + gzip.compress(tarred(CONTENT)[3000:]),
    "tar.zst": zstd.compress(tarred(CONTENT)),
    "two zstd frames": zstd.compress(tarred(CONTENT)[:3000]) + zstd.compress(tarred(CONTENT)[3000:]),
    "with others": tarred({"README.md": b"hello", "._x": b"", "sub/deeper/notes.txt": b"", **CONTENT}, "w:gz"),
}

# A frame whose header asks for a window of 256 MiB, with five bytes in it.
WIDE_ZSTD = b"\x28\xb5\x2f\xfd\0" + bytes([(28 - 10) << 3]) + (5 << 3 | 1).to_bytes(3, "little") + b"hello"


@pytest.mark.parametrize("name", ["adapter.zip", "adapter.tar.gz", "whatever", ""])
@pytest.mark.parametrize("packed", PACKED)
async def test_an_archive_is_known_by_its_content(folder, packed, name):
    assert await send(folder, form(part("name", b"x"), part("files", PACKED[packed], name))) == {"name": "x"}
    assert arrived(folder) == CONTENT


# What is refused


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("", "multipart/form-data"),
        ("application/json", "multipart/form-data and not as"),
        ("application/x-www-form-urlencoded", "multipart/form-data"),
        ("multipart/form-data", "boundary"),
        ("multipart/form-data; boundary=", "boundary"),
        ("multipart/form-data; boundary=" + "x" * 71, "boundary"),
        ("multipart/form-data; boundary=ü€", "cannot be read"),
        (";;;=", "multipart/form-data"),
    ],
)
async def test_another_content_type_is_refused(folder, kind, reason):
    with pytest.raises(BadRequest, match=reason):
        await send(folder, form(*loose()), kind=kind)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the body is empty"),
        (b"hello", "not well-formed"),
        (form(), "no file"),
        (form(part("name", b"x")), "no file"),
        (form(*loose())[:-4], "closing boundary"),
        (form(*loose())[:5000], "closing boundary"),
        (form(*loose(), *loose()), "twice"),
        (form(part("name", b"a"), part("name", b"b"), *loose()), "`name` twice"),
        (form(part("name", b"\xff"), *loose()), "not UTF-8"),
        (form(part("name", b"a\0b"), *loose()), "zero byte"),
        (form(*[part(f"f{number}", b"x") for number in range(100)], *loose()), "more than 64 parts"),
        (form(f"--{BOUNDARY}\r\nX: y\r\n\r\nz\r\n".encode()), "has no name"),
        (form(part("files", b"eA==", CONFIG, "Content-Transfer-Encoding: base64\r\n")), "Transfer-Encoding"),
        (form(part("files", PACKED["zip"], "a.zip"), *loose()), "an archive and loose files"),
        (form(part("files", PACKED["zip"], "a.zip"), part("files", PACKED["tar"], "b.tar")), "two archives"),
        (form(part("files", b"nothing", "a.zip")), "neither a zip nor a tar"),
        (form(part("files", b"x", "adapter_model.bin")), "safetensors only"),
        (form(part("files", b"x", "Weights.PT")), "save_pretrained"),
        (form(part("files", b"\x80\x04\x95" + b"x" * 600, "weights")), "is a pickle"),
        (form(part("files", b"{}", CONFIG)), f"no {WEIGHTS}"),
        (form(part("files", b"x", "README.md")), f"no {CONFIG} and no {WEIGHTS}"),
    ],
)
async def test_a_form_that_is_no_adapter_is_told_what_is(folder, body, reason):
    with pytest.raises(BadRequest, match=reason):
        await send(folder, body)


async def test_a_long_field_is_cut_off(folder):
    with pytest.raises(TooLarge, match="send files as files"):
        await send(folder, form(part("name", b"x" * 100_000), *loose()))


async def test_too_many_bytes_are_refused_while_they_arrive(folder):
    sent = 0

    async def endless():
        nonlocal sent
        yield part("files", b"", WEIGHTS)[:-2]
        while True:
            sent += 1000
            yield b"x" * 1000

    with pytest.raises(TooLarge, match="50000 bytes"):
        await receive(endless(), TYPE, folder, room_in(folder), max_bytes=50_000)
    assert sent <= 51_000
    assert sum(len(content) for content in arrived(folder).values()) <= 50_000


async def test_a_large_file_does_not_pile_up_in_memory(folder):
    async def stream():
        yield part("files", b"{}", CONFIG)
        yield part("files", b"", WEIGHTS)[:-2]
        for _ in range(512):
            yield b"x" * 65_536
        yield b"\r\n" + form()

    tracemalloc.start()
    await receive(stream(), TYPE, folder, room_in(folder), max_bytes=1 << 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (folder / WEIGHTS).stat().st_size == 512 * 65_536
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (zipped({"../" + CONFIG: b"{}"}), "outside itself"),
        (zipped({"/etc/" + CONFIG: b"{}"}), "outside itself"),
        (zipped({"C:\\x\\" + CONFIG: b"{}"}), "outside itself"),
        (tarred({"../../" + CONFIG: b"{}"}), "outside itself"),
        (tarred({"/" + CONFIG: b"{}"}), "outside itself"),
        (tarred({"../README.md": b"{}"}), "outside itself"),
        (special(tarfile.SYMTYPE, CONFIG), "link or a device"),
        (special(tarfile.LNKTYPE, WEIGHTS), "link or a device"),
        (special(tarfile.FIFOTYPE), "link or a device"),
        (special(tarfile.CHRTYPE), "link or a device"),
        (zipped({"a/b/" + CONFIG: b"{}"}), "too deep"),
        (zipped({f"a/{CONFIG}": b"{}", f"b/{CONFIG}": b"{}"}), "twice"),
        (tarred({f"a/{CONFIG}": b"{}", f"b/{CONFIG}": b"{}"}), "twice"),
        (zipped({CONFIG: b"{}", "adapter_model.bin": b"x"}), "is a pickle"),
        (tarred({CONFIG: b"{}", "adapter_model.bin": b"x"}), "is a pickle"),
        (zipped({CONFIG: b"{}"}), f"no {WEIGHTS}"),
        (zipped({}), f"no {CONFIG}"),
        (zipped(CONTENT, compression=zipfile.ZIP_LZMA), "deflate"),
        (zipped({str(number): b"" for number in range(1001)}), "more than 1000 entries"),
        (tarred({str(number): b"" for number in range(1001)}), "more than 1000 entries"),
        (PACKED["zip"][:-10], "damaged"),
        (PACKED["zip"][:200] + PACKED["zip"][220:], "damaged"),
        (PACKED["tar"][:3000], "damaged"),
        (PACKED["tar.gz"][:150], "damaged"),
        (gzip.compress(b"hello"), "damaged"),
        (gzip.compress(bytes(2000)), f"no {CONFIG}"),
        (PACKED["tar.zst"][:150], "damaged"),
        (zstd.compress(b"hello"), "damaged"),
        (zstd.compress(bytes(2000)), f"no {CONFIG}"),
        (WIDE_ZSTD, "too much memory"),
    ],
)
async def test_a_hostile_or_broken_archive_is_refused_and_leaves_nothing_outside(folder, packed, reason):
    with pytest.raises(AdapterRejected, match=reason):
        await send(folder, form(part("files", packed, "adapter.zip")))
    assert os.listdir(folder.parent) == ["inside"]
    assert set(os.listdir(folder)) <= {*FILES, *NOTES}
    assert not any(path.is_symlink() for path in folder.iterdir())


async def test_a_link_in_a_zip_is_refused(folder):
    info = zipfile.ZipInfo(CONFIG)
    info.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(AdapterRejected, match="link or a device"):
        await send(folder, form(part("files", out.getvalue(), "a.zip")))


async def test_an_encrypted_zip_is_refused(folder):
    packed = bytearray(PACKED["zip"])
    for signature, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = -1
        while (at := packed.find(signature, at + 1)) >= 0:
            packed[at + flags] |= 1
    with pytest.raises(AdapterRejected, match="encrypted"):
        await send(folder, form(part("files", bytes(packed), "a.zip")))


@pytest.mark.parametrize(
    "packed", [zipped, lambda entries: tarred(entries, "w:gz"), lambda entries: zstd.compress(tarred(entries))]
)
async def test_a_bomb_is_over_at_the_limit(folder, packed):
    body = form(part("files", packed({CONFIG: b"{}", WEIGHTS: CONTENT[WEIGHTS] + bytes(20 << 20)}), "bomb"))
    assert len(body) < 100_000
    with pytest.raises(TooLarge, match="unpacks to more"):
        await send(folder, body, max_bytes=1 << 20)
    assert (folder / WEIGHTS).stat().st_size <= 1 << 20


@pytest.mark.parametrize("packed", [zipped, lambda entries: tarred(entries, "w:gz")])
async def test_what_is_no_safetensors_file_is_over_at_its_first_bytes(folder, packed):
    with pytest.raises(AdapterRejected, match="not a safetensors file"):
        await send(folder, form(part("files", packed({CONFIG: b"{}", WEIGHTS: bytes(20 << 20)}), "bomb")))
    assert (folder / WEIGHTS).stat().st_size == 0


async def test_a_zip_is_judged_whole_before_its_first_entry_is_unpacked(folder):
    with pytest.raises(AdapterRejected, match="outside itself"):
        await send(folder, form(part("files", zipped({**CONTENT, "../x": b""}), "a.zip")))
    assert not (folder / WEIGHTS).exists()


async def test_archives_are_unpacked_one_at_a_time(tmp_path, monkeypatch):
    beside, most = 0, 0

    def unpacked(path, take, **_):
        nonlocal beside, most
        beside += 1
        most = max(most, beside)
        time.sleep(0.02)
        beside -= 1
        for name, content in CONTENT.items():
            (path.parent / name).write_bytes(content)

    monkeypatch.setattr("serve.adapters.upload.unpack", unpacked)
    folders = [tmp_path / str(number) for number in range(4)]
    for each in folders:
        each.mkdir()
    await asyncio.gather(*[send(each, form(part("files", PACKED["zip"], "a.zip"))) for each in folders])
    assert most == 1


async def test_a_bomb_beside_the_files_is_over_too(folder):
    body = form(part("files", tarred({"README.md": bytes(80 << 20), **CONTENT}, "w:gz"), "bomb.tgz"))
    with pytest.raises(TooLarge, match="unpacks to more"):
        await send(folder, body, max_bytes=1 << 20)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
async def test_a_bomb_in_an_extended_header_never_reaches_memory(folder, kind):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 200 << 20
    body = form(part("files", gzip.compress(info.tobuf() + bytes(32 << 20)), "bomb.tgz"))
    tracemalloc.start()
    with pytest.raises(AdapterRejected, match="oversized extended header"):
        await send(folder, body, max_bytes=1 << 20, step=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# Shards and checkpoints


def shards(count: int = 2) -> dict[str, bytes]:
    """`count` files of one tensor each."""
    return {
        f"adapter_model-{number:05}-of-{count:05}.safetensors": save({f"t{number}": torch.full((2,), number)})
        for number in range(1, count + 1)
    }


@pytest.mark.parametrize("packed", [None, zipped, tarred])
async def test_weights_in_several_files_become_one(folder, packed):
    files = {"out/" * (packed is not None) + name: data for name, data in {CONFIG: b"{}", **shards()}.items()}
    parts = [part("files", data, name) for name, data in files.items()]
    await send(folder, form(*parts) if packed is None else form(part("files", packed(files), "a.zip")))
    assert set(arrived(folder)) == set(FILES)
    assert {name: tensor.tolist() for name, tensor in load_file(folder / WEIGHTS).items()} == {
        "t1": [1, 1],
        "t2": [2, 2],
    }


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (dict(list(shards(3).items())[:2]), "adapter_model-00003-of-00003.safetensors is missing"),
        ({**shards(1), **shards(2)}, "belongs to another set of files"),
        ({**shards(), WEIGHTS: b"x"}, "send one of the two"),
        ({"adapter_model-00001-of-00065.safetensors": b"x"}, "up to 64"),
        ({"adapter_model-00001-of-00001.safetensors": b"x"}, "adapter_model-00001-of-00001.safetensors is not"),
    ],
)
async def test_a_set_of_files_that_is_not_whole_is_a_sentence(folder, files, says):
    with pytest.raises(AdapterRejected, match=says):
        await send(folder, form(*(part("files", data, name) for name, data in {CONFIG: b"{}", **files}.items())))


@pytest.mark.parametrize("packed", [zipped, tarred])
@pytest.mark.parametrize(
    ("folders", "kept"),
    [
        (["checkpoint-9", "checkpoint-100", "checkpoint-20"], "checkpoint-100"),
        (["out/checkpoint-9", "out", "out/checkpoint-100"], "out"),
        (["", "checkpoint-9"], ""),
        (["out/checkpoint-5"], "out/checkpoint-5"),
    ],
)
async def test_the_final_adapter_of_a_training_run_is_taken_else_its_last_checkpoint(folder, packed, folders, kept):
    files = {
        f"{place}/{name}".lstrip("/"): CONTENT[WEIGHTS] + place.encode()
        for place in folders
        for name in (*FILES, "optimizer.pt", "global_step9/mp_rank_00_model_states.pt")
        if "checkpoint" in place or name in FILES
    }
    await send(folder, form(part("files", packed(files), "a.zip")))
    assert arrived(folder) == dict.fromkeys(FILES, CONTENT[WEIGHTS] + kept.encode())


async def test_a_full_disk_is_said_in_a_sentence(folder, monkeypatch):
    class Full(io.RawIOBase):
        def write(self, data) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(upload, "create", lambda path: Full())
    with pytest.raises(OutOfSpace):
        await send(folder, form(*loose()))


async def test_a_client_that_leaves_leaves_no_open_file(folder):
    async def stream():
        yield form(*loose())[:4000]
        raise ConnectionResetError

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConnectionResetError):
        await receive(stream(), TYPE, folder, room_in(folder), max_bytes=1 << 20)
    assert len(os.listdir("/proc/self/fd")) == before


# Property tests: our error or two files, whatever comes


def judged(folder: Path, body: bytes, kind: str = TYPE, step: int = 1000) -> None:
    try:
        asyncio.run(send(folder, body, kind=kind, max_bytes=100_000, step=step))
    except LoradockError as refusal:
        assert refusal.status in (400, 413, 422)
        refusal.message.encode()
    else:
        assert set(os.listdir(folder)) - {*NOTES} == set(FILES)
    assert set(os.listdir(folder)) <= {*FILES, *NOTES}
    assert os.listdir(folder.parent) == [folder.name]
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    def fresh() -> Path:
        folder = tmp_path_factory.mktemp("case") / "inside"
        folder.mkdir()
        return folder

    return fresh


def damage(data: st.DataObject, content: bytes) -> bytes:
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(broken) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                broken[at] = data.draw(st.integers(0, 255))
            case "cut":
                del broken[at : at + data.draw(st.integers(1, 600))]
            case "insert":
                broken[at:at] = data.draw(st.binary(max_size=40))
        if not broken:
            return b""
    return bytes(broken)


@HARD
@given(st.data())
def test_no_damaged_form_gets_past_or_breaks_anything(fresh, data):
    body = form(part("name", b"x"), *[part("files", b"some bytes", name) for name in (CONFIG, WEIGHTS, "README.md")])
    judged(fresh(), damage(data, body), step=data.draw(st.integers(1, 300)))


@HARD
@given(st.data(), st.sampled_from(sorted(PACKED)))
def test_no_damaged_archive_gets_past_or_breaks_anything(fresh, data, packed):
    judged(fresh(), form(part("files", damage(data, PACKED[packed]), "x")))


names = st.sampled_from(
    [CONFIG, WEIGHTS, "../" + CONFIG, "a/" + WEIGHTS, "/" + WEIGHTS, "a/../" + CONFIG, "x.bin", "\\" + CONFIG]
) | st.text(max_size=12)
tar_kinds = st.sampled_from([b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"g", b"x", b"L", b"K", b"S", b"Z"])


@HARD
@given(
    st.lists(st.tuples(names, tar_kinds, st.binary(max_size=700), st.integers(-600, 600)), max_size=5), st.booleans()
)
def test_no_made_up_tar_gets_past_or_breaks_anything(fresh, entries, packed):
    out = b""
    for name, kind, content, lie in entries:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, max(0, len(content) + lie)
        out += info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogatepass") + content + bytes(-len(content) % 512)
    judged(fresh(), form(part("files", gzip.compress(out) if packed else out, "x.tar")))


@HARD
@given(st.lists(st.tuples(names.filter(bool), st.binary(max_size=50), st.integers(0, 0xFFFF)), max_size=5))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_made_up_zip_gets_past_or_breaks_anything(fresh, entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, mode in entries:
            info = zipfile.ZipInfo("x")
            info.filename = name.encode("utf-8", "replace").decode()
            info.external_attr = mode << 16
            archive.writestr(info, content)
    judged(fresh(), form(part("files", out.getvalue(), "x.zip")))


@HARD
@given(
    st.text(max_size=60) | st.text(max_size=40).map(lambda text: f"multipart/form-data; boundary={text}"), st.binary()
)
def test_no_content_type_breaks_anything(fresh, kind, body):
    judged(fresh(), body, kind=kind)


@HARD
@given(st.text(max_size=60), st.text(max_size=20))
def test_no_file_name_or_field_name_breaks_anything(fresh, filename, name):
    header = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\nx\r\n'
    judged(fresh(), form(header.encode("utf-8", "replace"), *loose()))
