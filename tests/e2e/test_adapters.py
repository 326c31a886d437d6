"""Uploads in every packing, what is refused and why, and what a delete leaves."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.lora import CONFIG, WEIGHTS, variant
from tests.support.server import BASE, MAX_UPLOAD, Answer, Server, done, refused
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

Files = list[tuple[str, tuple[str, bytes]]]
LAYER = "base_model.model.model.layers.3.self_attn.q_proj"


def test_an_adapter_answers_as_soon_as_its_upload_is_acknowledged(server, adapters, name):
    response = server.upload(name, adapters["alpha"])
    assert response.status_code == 201
    body = response.json()
    assert (body["name"], body["version"], body["live"]) == (name, 1, True)
    assert body["id"] == f"{name}@{body['digest'][:12]}"
    answer = server.ask(name)
    assert (answer.model, answer.word) == (body["id"], "alpha")
    shown = server.adapter(name)
    assert (shown["name"], shown["live"]) == (name, 1)
    (version,) = shown["versions"]
    assert (version["id"], version["digest"], version["resident"]) == (body["id"], body["digest"], True)
    assert shown["history"]
    listed = done(server.http.get("/v1/adapters"))
    assert listed["object"] == "list"
    assert name in {row["name"] for row in listed["data"]}


def test_an_adapter_is_one_version_however_it_is_packed(server, adapters, name):
    folder = adapters["bravo"]
    packings: list[Files] = [
        [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())],
        [("files", ("adapter.zip", zipped(folder)))],
        [("files", ("adapter.zip", zipped(folder, "my-adapter/")))],
        [("files", ("adapter.tar.gz", tarred(folder)))],
        [("files", ("adapter.tgz", tarred(folder, "./")))],
    ]
    answers = [server.push(files, name=name) for files in packings]
    assert [answer.status_code for answer in answers] == [201, 200, 200, 200, 200]
    assert len({answer.json()["digest"] for answer in answers}) == 1
    assert {answer.json()["version"] for answer in answers} == {1}
    assert server.ask(name).word == "bravo"


def test_what_a_trainer_leaves_beside_the_adapter_is_passed_over(server, adapters, name):
    files = loose(adapters["alpha"])
    files += [("files", ("README.md", b"# hello")), ("files", ("training_args.bin", pickle.dumps({"lr": 1})))]
    assert server.push(files, name=name).status_code == 201


def test_a_version_that_is_not_promoted_waits_under_its_number(server, adapters, name):
    done(server.upload(name, adapters["alpha"]))
    second = server.upload(name, adapters["bravo"], promote=False)
    assert second.status_code == 201
    assert (second.json()["version"], second.json()["live"]) == (2, False)
    assert server.ask(name).word == "alpha"
    assert server.ask(f"{name}@v2").word == "bravo"


def test_promoted_is_what_an_upload_is_unless_it_says_otherwise(server, adapters, name):
    assert done(server.upload(name, adapters["alpha"], promote=None))["live"] is True


def edited(change: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> Callable[[Path, Path], Files]:
    return lambda folder, aside: loose(variant(folder, aside, edit=change))


def configured(**settings: Any) -> Callable[[Path, Path], Files]:
    return edited(lambda tensors, config: config.update(settings))


def replaced(**contents: bytes) -> Callable[[Path, Path], Files]:
    """The adapter with another adapter_config.json or adapter_model.safetensors."""
    names = {"config": CONFIG, "weights": WEIGHTS}
    given = {names[key]: content for key, content in contents.items()}
    return lambda folder, aside: [("files", (n, given.get(n, c))) for _, (n, c) in loose(folder)]


def of_rank(rank: int) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        config["r"] = rank
        tensors |= {
            name: np.resize(tensor, (rank, 64)) if ".lora_A." in name else np.resize(tensor, (64, rank))
            for name, tensor in list(tensors.items())[:2]
        }

    return change


def without_half(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def narrower(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = tensors[f"{LAYER}.lora_A.weight"][:, :-64]


def of_another_model(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["target_modules"] = ["c_attn"]
    for name in list(tensors):
        tensor = tensors.pop(name)
        if "q_proj" in name:
            tensors[name.replace("self_attn.q_proj", "attn.c_attn")] = tensor


def with_a_stranger(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"] = np.ones((8, 576), np.float32)


def not_finite(value: float) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        tensors[f"{LAYER}.lora_A.weight"][2, 5] = value

    return change


def idle(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    for name in tensors:
        if ".lora_B." in name:
            tensors[name] *= 0


def cut(folder: Path, aside: Path) -> Files:
    return replaced(weights=(folder / WEIGHTS).read_bytes()[:-100])(folder, aside)


def padded(folder: Path, aside: Path) -> Files:
    return replaced(weights=(folder / WEIGHTS).read_bytes() + b"\0" * 64)(folder, aside)


def outside(folder: Path, aside: Path) -> Files:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(f"../../{CONFIG}", (folder / CONFIG).read_bytes())
        archive.writestr(f"../../{WEIGHTS}", (folder / WEIGHTS).read_bytes())
    return [("files", ("adapter.zip", packed.getvalue()))]


def linked(folder: Path, aside: Path) -> Files:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder / CONFIG, CONFIG)
        link = tarfile.TarInfo(WEIGHTS)
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / WEIGHTS)
        archive.addfile(link)
    return [("files", ("adapter.tar.gz", packed.getvalue()))]


def only(*names: str) -> Callable[[Path, Path], Files]:
    return lambda folder, aside: [part for part in loose(folder) if part[1][0] in names]


class Told:
    """Would tell if a pickle of it were ever opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def pickled(as_name: str) -> Callable[[Path, Path], Files]:
    def make(folder: Path, aside: Path) -> Files:
        content = pickle.dumps(Told(aside / "opened"))
        return [*only(CONFIG)(folder, aside), ("files", (as_name, content))]

    return make


HUGE = (1 << 40).to_bytes(8, "little") + b"{}"
BAD: dict[str, tuple[Callable[[Path, Path], Files], int, str]] = {
    "a pickle": (pickled("adapter_model.bin"), 422, "pickle|safetensors"),
    "a pickle under the right name": (pickled(WEIGHTS), 422, "pickle|safetensors"),
    "a rank above the limit": (edited(of_rank(512)), 422, "rank 512"),
    "a rank that the tensors do not have": (configured(r=4), 422, "rank 4|lora_A"),
    "a rank that is none": (configured(r=-1), 422, r"\br\b|rank"),
    "a wrong shape": (edited(narrower), 422, r"layers\.3\.self_attn\.q_proj"),
    "a missing half": (edited(without_half), 422, r"layers\.3\.self_attn\.q_proj"),
    "the modules of another model": (edited(of_another_model), 422, "c_attn"),
    "a tensor that fits nothing": (edited(with_a_stranger), 422, r"layers\.99"),
    "NaN": (edited(not_finite(float("nan"))), 422, "(?i)nan"),
    "infinity": (edited(not_finite(float("inf"))), 422, "(?i)inf"),
    "no effect": (edited(idle), 422, "zero|nothing"),
    "another method": (configured(peft_type="IA3"), 422, "IA3"),
    "DoRA": (configured(use_dora=True), 422, "(?i)dora"),
    "modules to save": (configured(modules_to_save=["lm_head"]), 422, "modules_to_save"),
    "trained biases": (configured(bias="all"), 422, "bias"),
    "a broken header": (
        replaced(weights=b"\x10" + b"\0" * 7 + b"{not json at all" + b"\0" * 64),
        422,
        "header|safetensors",
    ),
    "a header beyond the file": (replaced(weights=HUGE), 422, "header|safetensors"),
    "weights cut short": (cut, 422, "short|byte"),
    "bytes behind the weights": (padded, 422, "byte"),
    "empty weights": (replaced(weights=b""), 422, "empty|safetensors"),
    "an empty config": (replaced(config=b""), 422, CONFIG),
    "a config that is a list": (replaced(config=b"[]"), 422, CONFIG),
    "no config": (only(WEIGHTS), 422, CONFIG),
    "no weights": (only(CONFIG), 422, WEIGHTS),
    "no files": (only(), 400, "file"),
    "a zip that is none": (lambda *_: [("files", ("adapter.zip", b"PK\3\4 nothing"))], 422, "archive"),
    "an archive that writes elsewhere": (outside, 422, r"\.\."),
    "an archive with a link": (linked, 422, "(?i)link|plain|regular"),
    "more than the limit": (replaced(weights=b"\0" * (MAX_UPLOAD + 1)), 413, str(MAX_UPLOAD)),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_with_the_reason_and_changes_nothing(server, adapters, voice, tmp_path, kind):
    make, status, reason = BAD[kind]
    files = make(adapters["alpha"], tmp_path / "aside")
    before = everything(server)
    response = server.http.post(
        "/v1/adapters",
        data={"name": voice},
        files=files or [("other", (None, b""))],  # type: ignore[list-item]
    )
    message = refused(response, status)
    problems = response.json()["error"].get("problems", [])
    assert_found(reason, [message, *problems])
    assert everything(server) == before
    assert not (tmp_path / "aside" / "opened").exists(), "the pickle was opened"


@pytest.mark.parametrize("bad", ["", "../up", "a/b", "a@b", "voice@v1", ".hidden", "a b", "ä", "x" * 65, "a\nb", "-rf"])
def test_a_bad_name_is_refused_and_changes_nothing(server, adapters, bad):
    before = everything(server)
    assert "name" in refused(server.upload(bad, adapters["alpha"]), 400)
    assert everything(server) == before


def test_the_base_s_name_is_taken(server, adapters):
    before = everything(server)
    assert BASE in refused(server.upload(BASE, adapters["alpha"]), 409)
    assert everything(server) == before


def test_a_body_that_is_no_form_is_refused(server):
    refused(server.http.post("/v1/adapters", json={"name": "x"}), 400)
    refused(server.http.post("/v1/adapters", content=b"--x\r\n", headers={"Content-Type": "multipart/form-data"}), 400)


def test_after_all_that_was_refused_the_live_version_still_answers(server, voice):
    assert server.ask(voice).word == "alpha"


def test_a_promote_of_what_is_not_there_is_a_404_and_of_nonsense_a_400(server, adapters, name):
    done(server.upload(name, adapters["alpha"]))
    refused(server.http.post(f"/v1/adapters/{name}/promote", json={"version": 9}), 404)
    refused(server.http.post("/v1/adapters/nobody/promote", json={"version": 1}), 404)
    for body in ({}, {"version": "two"}, {"version": 0}, {"version": 1, "wrong": 1}):
        refused(server.http.post(f"/v1/adapters/{name}/promote", json=body), 400)
    refused(server.http.post(f"/v1/adapters/{name}/rollback"), 409)
    for path in ("/v1/adapters/nobody", f"/v1/adapters/{name}/versions/9"):
        refused(server.http.delete(path), 404)
    refused(server.http.get("/v1/adapters/nobody"), 404)
    assert server.ask(name).word == "alpha"


def test_the_live_version_is_deleted_by_force_only_and_then_the_one_before_answers(server, adapters, name):
    for word in ("alpha", "bravo"):
        done(server.upload(name, adapters[word]))
    refused(server.http.delete(f"/v1/adapters/{name}/versions/2"), 409)
    assert server.ask(name).word == "bravo"
    done(server.http.delete(f"/v1/adapters/{name}/versions/2", params={"force": "true"}))
    assert server.ask(name).word == "alpha"
    assert server.adapter(name)["live"] == 1
    assert refusal(server, f"{name}@v2") == 404


def test_a_version_that_is_not_live_is_deleted_without_more(server, adapters, name):
    ids = [done(server.upload(name, adapters[word]))["id"] for word in ("alpha", "bravo")]
    done(server.http.delete(f"/v1/adapters/{name}/versions/1"))
    assert refusal(server, f"{name}@v1") == refusal(server, ids[0]) == 404
    assert server.ask(name).word == "bravo"
    # Its number is not given again.
    assert done(server.upload(name, adapters["charlie"]))["version"] == 3


def test_a_deleted_name_lets_its_answers_end_and_then_leaves_engine_and_disk(server, adapters, name, tmp_path):
    before = server.stored()
    done(server.upload(name, variant(adapters["charlie"], tmp_path, scale=1.03125)))
    bytes_of_it = server.stored() - before
    assert bytes_of_it
    answer = Answer()
    pieces = server.answering(answer, name, "Tell me everything.", tokens=80)
    next(pieces)
    done(server.http.delete(f"/v1/adapters/{name}"))
    assert refusal(server, name) == 404
    for _ in pieces:
        pass
    assert (answer.word, answer.finish) == ("charlie", "length")
    assert eventually(lambda: not server.resident(name)), "its weights stayed in the engine"
    assert eventually(lambda: not bytes_of_it & server.stored()), "its bytes stayed on the disk"
    refused(server.http.get(f"/v1/adapters/{name}"), 404)
    assert name not in {card.id.partition("@")[0] for card in server.client().models.list()}


def loose(folder: Path) -> Files:
    return [("files", (file, (folder / file).read_bytes())) for file in (CONFIG, WEIGHTS) if (folder / file).exists()]


def zipped(folder: Path, inside: str = "") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, inside + file.name)
    return packed.getvalue()


def tarred(folder: Path, inside: str = "") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, inside + file.name)
    return packed.getvalue()


def assert_found(pattern: str, lines: list[str]) -> None:
    assert any(re.search(pattern, line) for line in lines), f"{pattern!r} is not in {json.dumps(lines[:5])}"


def refusal(server: Server, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return server.http.post("/v1/chat/completions", json=body).status_code


def everything(server: Server) -> tuple[Any, ...]:
    """All that a refused upload must leave as it was."""
    listed = done(server.http.get("/v1/adapters"))["data"]
    histories = {row["name"]: server.adapter(row["name"])["history"] for row in listed}
    return listed, histories, server.engine()["resident"], server.stored()
