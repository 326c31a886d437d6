"""What jobs have on the disk is on their tenant's account: before it is written, until it is gone, after a restart."""

from __future__ import annotations

import asyncio

import pytest

from serve.adapters.byte_ledger import Bound, Kind, size_of
from serve.jobs.finetuning import admission
from tests.serve.jobs.finetuning.conftest import begun, ended, parts_of, stepped
from tests.serve.jobs.finetuning.test_workers import by_hand, claimed, pair, queued
from tests.support.backend import FakeBackend
from tests.support.waiting import settled

__all__ = ["pair"]


async def test_copies_and_results_are_paid_for_before_they_are_written_and_counted_again_at_start(
    training, connect, config, sdk, tiny_model, monkeypatch
):
    async with training() as client:
        ai, parts, copied, left = sdk(client), parts_of(client), [], []
        ledger, contents = parts.store.ledger, parts.files.contents
        copy, keep = admission._copy, contents.keep

        def copying(adapter, folder, manifest):
            copied.append(ledger.nbytes("default", Kind.UPLOADS) - size_of(adapter))
            copy(adapter, folder, manifest)

        def keeping(id, path):
            left.append(ledger.nbytes("default", Kind.FILES) - size_of(config.data_dir / "files"))
            keep(id, path)

        monkeypatch.setattr(admission, "_copy", copying)
        monkeypatch.setattr(contents, "keep", keeping)
        job = await ended(ai, await begun(ai))
        assert job.status == "succeeded", job.error
        assert len(copied) == 4 and set(copied) == {0}, "one to try, the result, and two checkpoints"
        assert len(left) == 2 and min(left) >= 0
        assert await settled(lambda: not size_of(config.data_dir / "finetuning")), "its folder goes after it has ended"
        assert await settled(lambda: ledger.totals()["default"].keys() == {"adapters", "files"})
        totals = ledger.totals()
        assert totals["default"]["files"] == size_of(config.data_dir / "files")
        assert totals["default"]["adapters"] <= size_of(config.data_dir / "blobs")
        assert size_of(config.data_dir / "quarantine") == 0
    async with connect(config, FakeBackend(str(tiny_model))) as client:
        assert parts_of(client).store.ledger.totals() == totals


async def test_checkpoints_are_counted_again_from_the_disk_when_the_server_starts(training, config, sdk, hold):
    async with training(hold=str(hold)) as client:
        id = await begun(sdk(client))
        await stepped(client, id)
    folder = config.data_dir / "finetuning" / id
    (folder / "checkpoints/step-000099").mkdir(parents=True)
    (folder / "checkpoints/step-000099/left").write_bytes(b"x" * 5000)
    again = training(hold=str(hold))
    ledger = again.app.state.parts.store.ledger
    assert ledger.nbytes("default", Kind.TRAINING) == size_of(folder) > 5000
    hold.unlink()
    async with again as client:
        assert (await ended(sdk(client), id)).status == "succeeded"
        assert await settled(lambda: not ledger.nbytes("default", Kind.TRAINING) and not folder.exists())


async def test_what_another_server_passed_on_is_paid_for_before_it_comes(pair, sdk, tiny_model, tmp_path, monkeypatch):
    async with pair() as (here, there):
        id = await queued(sdk(here))
        one, two = by_hand(here), by_hand(there)
        await claimed(here, one, tiny_model)
        await asyncio.to_thread(one.launch, id)
        file = tmp_path / "file"
        file.write_bytes(b"x" * 3000)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            await asyncio.to_thread(one.bring, id, f"adapter/{name}", file)
        assert parts_of(here).store.ledger.nbytes("default", Kind.TRAINING) == 0, "it is not on this disk any more"
        parts, paid = parts_of(there), []
        ledger, shared = parts.store.ledger, parts.store.shared
        get_file = shared.get_file

        def getting(name, path):
            paid.append(ledger.nbytes("default", Kind.TRAINING))
            get_file(name, path)

        monkeypatch.setattr(shared, "get_file", getting)
        bound = Bound(frozenset({Kind.TRAINING}), 5000, "training", "cancel a job")
        ledger.bound(bound)
        with pytest.raises(Exception, match="cancel a job"):
            await asyncio.to_thread(two.done, id)
        folder = parts.fine_tuning.runner.folders.folder(id)
        assert ledger.nbytes("default", Kind.TRAINING) == size_of(folder.path) == 3000
        ledger._bounds.remove(bound)
        paid.clear()
        await asyncio.to_thread(two.done, id)
        assert folder.adapter and ledger.nbytes("default", Kind.TRAINING) == size_of(folder.path)
        assert max(paid) >= 6000
