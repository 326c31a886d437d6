"""What jobs have on the disk is on their tenant's account: before it is written, until it is gone, after a restart."""

from __future__ import annotations

from serve.adapters.byte_ledger import Kind, size_of
from serve.jobs.finetuning import admission
from tests.serve.jobs.finetuning.conftest import begun, ended, parts_of, stepped
from tests.support.app import settled
from tests.support.backend import FakeBackend


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
        assert await settled(lambda: ledger.totals()["default"].keys() == {"adapters", "files"}, 10)
        totals = ledger.totals()
        assert totals["default"]["files"] == size_of(config.data_dir / "files")
        assert totals["default"]["adapters"] <= size_of(config.data_dir / "blobs")
        assert size_of(config.data_dir / "quarantine") == size_of(config.data_dir / "finetuning") == 0
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
        assert await settled(lambda: not ledger.nbytes("default", Kind.TRAINING) and not folder.exists(), 10)
