"""What is captured is the text as the model saw it, redacted, and forgotten again; optimize calibrates on it."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace

import pytest

from optimize.data import text
from optimize.options import Text
from serve.adapters.byte_ledger import Bound, ByteLedger, Kind
from serve.asgi.exchange import Exchange, Generation
from serve.asgi.exchange_worker import ExchangeWorker
from serve.dataset.capture import HOUR, Capture
from tests.support.waiting import eventually


@pytest.fixture
def words(tmp_path):
    """A checkpoint folder with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<user>", "<end>", "call", "555-1234", "now", "the", "river", "bread"]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(names)}, "<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<user>", "<end>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def exchange(prompt: list[int], output: list[int], status: int = 200) -> Exchange:
    made = (Generation(prompt, output, "stop"),)
    return Exchange("tone", "v1", status, 0.1, 0.2, generations=made)


def test_requests_are_lines_that_calibration_reads(words):
    worker = ExchangeWorker([Capture(words / "captured", lambda adapter: str(words), redact=[r"\d{3}-\d{4}"])])
    worker.start()
    worker.offer(exchange([0, 2, 3, 4], [5, 6]))
    worker.offer(exchange([0, 7], [5]))
    worker.offer(exchange([0, 2], [4], status=500))
    worker.stop()
    (file,) = (words / "captured").iterdir()
    assert (words / "captured").stat().st_mode & 0o077 == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["<user> call [redacted] now the river", "<user> bread the"]
    assert text.documents(Text(text=str(words / "captured")), False) == [line["text"] for line in lines]


def test_an_hour_has_a_bound_and_is_forgotten(words):
    now = [HOUR * 1000.0]
    capture = Capture(words / "captured", lambda adapter: str(words), hours=2, limit=100, clock=lambda: now[0])
    capture.start()
    for _ in range(5):
        capture.observe(exchange([0, 2, 4], [5, 6]))
    capture.looked()
    assert (words / "captured/1000.jsonl").stat().st_size <= 100 and capture.dropped > 0
    now[0] += 3 * HOUR
    capture.observe(exchange([0, 2], [5]))
    capture.save()
    assert [file.name for file in (words / "captured").iterdir()] == ["1003.jsonl"]


def test_each_line_is_on_its_tenants_account_until_it_is_deleted(words):
    now = [HOUR * 1000.0]
    ledger = ByteLedger(words, reserve=0, free=lambda root: 1 << 40)

    def capture():
        made = Capture(words / "captured", lambda adapter: str(words), ledger, hours=2, clock=lambda: now[0])
        made.start()
        return made

    def keep(into, *tenants):
        for number, tenant in enumerate(tenants):
            into.observe(replace(exchange([0, 2], [5]), tenant=tenant, request_id=str(number)))
        into.looked()

    first = capture()
    keep(first, "acme", "acme", "evil")
    (file,) = (words / "captured").iterdir()
    total = file.stat().st_size
    assert ledger.nbytes("evil", Kind.TEXT) >= total // 3, "reserved a step at a time"
    first.stop()
    ledger = ByteLedger(words, reserve=0, free=lambda root: 1 << 40)
    second = capture()
    assert ledger.nbytes("acme", Kind.TEXT) + ledger.nbytes("evil", Kind.TEXT) == total, "counted again from the disk"
    second.forget("acme", ["0"])
    assert ledger.nbytes("acme", Kind.TEXT) == ledger.nbytes("evil", Kind.TEXT) == total // 3
    ledger.bound(Bound(frozenset({Kind.TEXT}), total // 3, "text", "wait"))
    keep(second, "acme", "none")
    assert second.dropped == 1 and ledger.nbytes("acme", Kind.TEXT) == total // 3 == ledger.nbytes("none", Kind.TEXT)
    now[0] += 4 * HOUR
    second.save()
    assert ledger.totals() == {}


def test_deleted_requests_go_and_the_others_stay(words):
    capture = Capture(words / "captured", lambda adapter: str(words))
    capture.start()
    for tenant, id in (("acme", "a"), ("acme", "b"), ("rival", "a")):
        capture.observe(replace(exchange([0, 2], [5]), tenant=tenant, request_id=id))
    capture.forget("acme", ["a", "none"])
    capture.observe(replace(exchange([0, 2], [6]), tenant="acme", request_id="c"))
    capture.looked()
    (file,) = (words / "captured").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["tenant"], row["id"]) for row in rows] == [("acme", "b"), ("rival", "a"), ("acme", "c")]


def test_a_disk_that_fills_in_the_middle_of_a_line_leaves_whole_lines(words):
    capture = Capture(words / "captured", lambda adapter: str(words))
    capture.start()
    capture.observe(exchange([0, 2], [5]))
    capture.looked()
    (file,) = (words / "captured").iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, before[1]))
    try:
        capture.observe(exchange([0, 2, 4], [5, 6]))
        capture.looked()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    capture.observe(exchange([0, 7], [5]))
    capture.stop()
    lines = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert lines == ["<user> call the", "<user> bread the"]


def test_of_requests_that_are_written_together_a_full_disk_keeps_the_first_ones(words):
    capture = Capture(words / "captured", lambda adapter: str(words))
    capture.start()
    for _ in range(2):
        capture.observe(exchange([0, 2], [5]))
    capture.looked()
    (file,) = (words / "captured").iterdir()
    line, before = file.stat().st_size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * line + 10, before[1]))
    try:
        for _ in range(5):
            capture.observe(exchange([0, 2], [5]))
        capture.looked()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.stat().st_size == 4 * line, "two more, and nothing of the third"
    capture.observe(exchange([0, 7], [5]))
    capture.stop()
    lines = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert lines == ["<user> call the"] * 4 + ["<user> bread the"]


@pytest.mark.parametrize("enabled", [True, False])
def test_captured_text_is_forgotten_though_no_traffic_comes_any_more(words, enabled):
    now = [HOUR * 1000.0]
    folder = words / "captured"
    before = Capture(folder, lambda adapter: str(words), hours=2, clock=lambda: now[0])
    before.start()
    before.observe(exchange([0, 2], [5]))
    before.looked()
    assert list(folder.iterdir())
    after = Capture(folder, lambda adapter: str(words), enabled=enabled, hours=2, clock=lambda: now[0])
    worker = ExchangeWorker([after], save_seconds=0.01)
    worker.start()
    now[0] += 3 * HOUR
    assert eventually(lambda: not list(folder.iterdir()))
    worker.stop()


def test_a_tokenizer_that_is_not_there_stops_nothing(words, caplog):
    capture = Capture(words / "captured", lambda adapter: str(words / "none"))
    capture.start()
    capture.observe(exchange([0], [5]))
    assert "was not captured" in caplog.text


@pytest.mark.parametrize("asked", [False, True])
async def test_a_server_captures_only_when_it_is_told_to(asked, connect, config, backend, words, tmp_path):
    model = shutil.copytree(config.model, tmp_path / "model")
    shutil.copyfile(words / "tokenizer.json", model / "tokenizer.json")
    config, backend.model = replace(config, model=str(model)), str(model)
    backend.generation = replace(backend.generation, prompt=[0, 2, 4], output=[5, 6])
    async with connect(replace(config, capture_text=asked)) as client:
        body = {"model": (await client.get("/v1/models")).json()["data"][0]["id"], "prompt": "call now"}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    found = list((config.data_dir / "captured").glob("*.jsonl"))
    assert len(found) == int(asked)
    if asked:
        assert json.loads(found[0].read_text())["text"] == "<user> call now the river"
