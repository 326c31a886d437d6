"""Adapters on their way in count before they are versions: unfinished, packed, of one tenant or of several."""

from __future__ import annotations

import asyncio
import io
import tarfile

import pytest

from tests.support.app import issued, upload
from tests.support.disk import nbytes
from tests.support.waiting import settled

MIB = 1 << 20


@pytest.fixture
def parts(operator):
    return operator._transport.app.state.parts


async def test_unfinished_uploads_hold_no_more_than_the_keys_quota(operator, parts, config):
    acme = await issued(operator, "acme", adapter_bytes=19 * MIB)
    sent, go_on = [0] * 16, asyncio.Event()

    async def form(number):
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
        for _ in range(17):
            yield b" " * MIB
            sent[number] += MIB
        await go_on.wait()

    headers = {"content-type": "multipart/form-data; boundary=x"}
    pushes = [
        asyncio.create_task(acme.post("/v1/adapters", content=form(number), headers=headers)) for number in range(16)
    ]
    assert await settled(lambda: sum(push.done() for push in pushes) >= 15 or max(sent) == 17 * MIB)
    held = nbytes(config.data_dir / "quarantine")
    assert held <= 20 * MIB, f"{held >> 20} MiB"
    go_on.set()
    answers = [answer.status_code for answer in await asyncio.gather(*pushes)]
    assert answers.count(429) >= 14 and parts.store.ledger.nbytes("acme") == 0


async def test_an_archive_unpacks_to_no_more_than_the_keys_quota(operator, parts):
    acme = await issued(operator, "acme", adapter_bytes=2 * MIB)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        info = tarfile.TarInfo("adapter_model.safetensors")
        info.size = 32 * MIB
        tar.addfile(info, io.BytesIO((256).to_bytes(8, "little") + b"{" + bytes(32 * MIB)))
    assert len(packed.getvalue()) < MIB
    files = {"files": ("a.tar.gz", packed.getvalue())}
    answer = await acme.post("/v1/adapters", data={"name": "tone"}, files=files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "byte_limit_exceeded"), answer.text
    assert parts.store.ledger.nbytes("acme") == 0


async def test_the_same_bytes_may_come_again_where_the_quota_is_full(operator, parts, make_adapter):
    adapter = make_adapter()
    first = await (await issued(operator, "acme")).post("/v1/adapters", **upload(adapter))
    tight = await issued(operator, "acme", adapter_bytes=first.json()["bytes"])
    assert (await tight.post("/v1/adapters", **upload(adapter))).status_code == 200
    assert parts.store.ledger.totals() == {"acme": {"adapters": first.json()["bytes"]}}


async def test_at_the_disks_reserve_who_filled_it_is_refused_and_another_tenant_pushes(
    operator, parts, make_adapter, monkeypatch
):
    full, little = await issued(operator, "full"), await issued(operator, "little")
    assert (await full.post("/v1/adapters", **upload(make_adapter(), name="tone"))).status_code == 201
    for number in range(3):
        pushed = await full.post("/v1/adapters", **upload(make_adapter(seed=number + 5), name=f"tone-{number}"))
        assert pushed.status_code == 201
    monkeypatch.setattr(parts.store.ledger, "_free", lambda root: 200 * MIB)
    refused = await full.post("/v1/adapters", **upload(make_adapter(seed=9), name="more"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (507, "insufficient_storage")
    assert (await little.post("/v1/adapters", **upload(make_adapter(seed=10), name="mine"))).status_code == 201
