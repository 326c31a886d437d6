"""Files of examples that are not in order: a job says which line, and why, before anything is trained."""

from __future__ import annotations

import json
from typing import Any

from tests.serve.jobs.finetuning.conftest import begun, ended, examples, messages, parts_of

GOOD = json.loads(examples(1))


def chat(*given: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(given), **more}


def said(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = said("user"), said("assistant")
PAIR = {"input": chat(ASKED), "preferred_output": [ANSWERED], "non_preferred_output": [said("assistant", "y")]}
# By what is wrong: the method, an object in the place of the third one, and what is said of it.
WRONG: dict[str, tuple[str, Any, str]] = {
    "no messages": ("supervised", {}, '"messages"'),
    "another key": ("supervised", chat(ASKED, ANSWERED, extra=1), "extra"),
    "messages are a text": ("supervised", {"messages": "hello"}, "list of messages"),
    "messages are empty": ("supervised", chat(), "not empty"),
    "a message is a text": ("supervised", chat("hello", ANSWERED), "message 1"),
    "no role": ("supervised", chat({"content": "x"}, ANSWERED), "has no role; a role is"),
    "another role": ("supervised", chat(said("bot"), ANSWERED), "'bot'"),
    "no content": ("supervised", chat({"role": "user"}, ANSWERED), "no content"),
    "content is a number": ("supervised", chat(said("user", 3), ANSWERED), "content"),
    "content is an image": ("supervised", chat(said("user", [{"type": "image_url"}]), ANSWERED), "image_url"),
    "the user is last": ("supervised", chat(ANSWERED, ASKED), "last message"),
    "nothing is said": ("supervised", chat(ASKED, said("assistant", "")), "no content"),
    "nothing is learned": ("supervised", chat(ASKED, said("assistant", weight=0)), "weight"),
    "a weight of two": ("supervised", chat(ASKED, said("assistant", weight=2)), "0 or 1"),
    "a user's weight": ("supervised", chat(said("user", weight=1), ANSWERED), "weight"),
    "an answer to no call": ("supervised", chat(ASKED, said("tool", tool_call_id="a"), ANSWERED), "tool call"),
    "tools are a text": ("supervised", chat(ASKED, ANSWERED, tools="none"), "tools"),
    "another form": ("supervised", {"prompt": "a", "completion": "b"}, "completion"),
    "a prompt alone": ("supervised", {"prompt": "a"}, "completion"),
    "a preference": ("supervised", PAIR, "dpo"),
    "a chat": ("dpo", chat(ASKED, ANSWERED), "supervised"),
    "one output": ("dpo", {key: PAIR[key] for key in ("input", "preferred_output")}, "non_preferred_output"),
    "equal outputs": ("dpo", {**PAIR, "non_preferred_output": [ANSWERED]}, "same"),
    "two messages": ("dpo", {**PAIR, "preferred_output": [ANSWERED, ANSWERED]}, "one message"),
}


async def test_a_line_that_is_no_example_is_named(training, sdk):
    assert len(WRONG) >= 20
    async with training() as client:
        ai = sdk(client)
        for kind, (method, wrong, word) in WRONG.items():
            rows = [PAIR if method == "dpo" else GOOD] * 12
            rows[2] = wrong
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            job = await ended(ai, await begun(ai, data, method={"type": method}))
            found = (job.status, job.error.code, job.error.param)
            assert found == ("failed", "invalid_training_file", "training_file"), kind
            message = job.error.message
            assert "The job failed due to an invalid training file" in message
            assert "Line 3" in message and word in message, (kind, message)
            assert "Fine-tuning job started" not in await messages(ai, job.id)
            assert not parts_of(client).fine_tuning.runner.folders.folder(job.id).path.exists()
        assert (await client.get("/v1/adapters")).json()["data"] == []


async def test_too_few_examples_are_too_few(training, sdk):
    async with training() as client:
        ai = sdk(client)
        job = await ended(ai, await begun(ai, examples(9)))
        assert job.error.code == "invalid_training_file"
        assert "9 examples" in job.error.message and "at least 10" in job.error.message


async def test_each_problem_is_an_event_up_to_a_number(training, sdk):
    async with training() as client:
        ai = sdk(client)
        job = await ended(ai, await begun(ai, b"{}\n" * 50))
        events = (await ai.fine_tuning.jobs.list_events(job.id, limit=100)).data
        errors = [event for event in events if event.level == "error"]
        assert len(errors) == 21 and "more" in job.error.message


async def test_held_out_examples_are_looked_at_too(training, sdk):
    async with training() as client:
        ai = sdk(client)
        file = await ai.files.create(file=("held.jsonl", b"{}\n" * 10), purpose="fine-tune")
        job = await ended(ai, await begun(ai, validation_file=file.id))
        assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")
