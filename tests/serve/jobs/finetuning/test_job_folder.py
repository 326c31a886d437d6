"""What a trainer leaves in a job's folder, read line by line."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from serve.jobs.finetuning.job_folder import JobFolder


@pytest.fixture
def folder(tmp_path):
    """A folder, and how a step's line comes into it."""

    def tell(step, **more):
        with (tmp_path / "progress.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "steps": 9, **more}) + "\n")

    return JobFolder(tmp_path), tell


def test_a_step_that_was_repeated_counts_as_it_was_measured_last(folder):
    job, tell = folder
    assert list(job.lines()) == [] and list(job.results())[1:] == []
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.5), (2, 2.5), (3, None)):
        tell(step, train_loss=loss)
    assert [(line["step"], line["train_loss"]) for line in job.lines()] == [(1, 3.0), (2, 2.5), (3, None)]
    assert b"".join(job.results()).decode().splitlines()[1:] == ["1,3.0,,,", "2,2.5,,,", "3,,,,"]


def test_a_line_is_read_once_and_when_it_is_whole(folder):
    job, tell = folder
    tell(1)
    with (job.path / "progress.jsonl").open("a") as file:
        file.write('{"step": 2, ')
    assert [line["step"] for line in job.new_lines()] == [1]
    with (job.path / "progress.jsonl").open("a") as file:
        file.write('"steps": 9}\n')
    tell(3)
    assert [line["step"] for line in job.new_lines(after=2)] == [3] and job.new_lines() == []


def test_a_long_training_is_not_held_in_memory(folder):
    job, _ = folder
    line = json.dumps({"step": 0, "steps": 5_000, "train_loss": 1.5, "train_accuracy": 0.5, "checkpoint": None})
    lines = (line.replace('"step": 0', f'"step": {step}') + "\n" for step in range(1, 5_001))
    (job.path / "progress.jsonl").write_text("".join(lines))
    tracemalloc.start()
    try:
        assert sum(1 for _ in job.results()) == 5_001
        assert job.checkpoints() == {} and job.new_lines(after=4_999)[0]["step"] == 5_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_a_worker_wrote_harms_nobody(folder):
    job, tell = folder
    other = job.path.parent / "elsewhere"
    other.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (other / name).touch()
    tell(1, train_loss=float("nan"), valid_loss=[1], checkpoint="../elsewhere")
    tell(2, train_loss=10**400, checkpoint=str(other))
    tell(3, train_loss=1.5, checkpoint=["a"])
    tell(10**15, train_loss=1.0)
    with (job.path / "progress.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")
    assert b"".join(job.results()).decode().splitlines()[1:] == ["1,,,,", "2,,,,", "3,1.5,,,"]
    assert job.checkpoints() == {}
    for said in ('{"epochs": NaN, "batch": 1e999, "rank": true, "learning_rate": 0.5}', "[" * 100_000, "[]"):
        (job.path / "settings.json").write_text(said)
        assert job.settled() == ({"learning_rate": 0.5} if "NaN" in said else {})
