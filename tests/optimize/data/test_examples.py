"""Examples are read as OpenAI's fine-tuning takes them, and whatever is wrong has its line and a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimize import cli
from optimize.data.examples import LABEL, LABELS, Chat, Completion, Preference, checked, examples
from optimize.errors import Refused
from serve.adapters import saved_modules

ASKED = {"role": "user", "content": "Where does the river go?"}
SAID = {"role": "assistant", "content": "Past a small town."}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "reeds"}'}}
CHAT: dict[str, Any] = {"messages": [ASKED, SAID]}
PAIR: dict[str, Any] = {"input": {"messages": [ASKED]}, "preferred_output": [SAID],
                        "non_preferred_output": [{**SAID, "content": "No idea."}]}  # fmt: skip


def file_of(folder: Path, *lines: Any, good: int = 10) -> Path:
    """A file whose first lines are these, filled up with good ones."""
    path = folder / "examples.jsonl"
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join([*written, *[json.dumps(CHAT).encode()] * good]) + b"\n")
    return path


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


MALFORMED = {
    "broken JSON": (b'{"messages": [', "is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff\xfe", "completion": "a"}', "is not JSON: 'utf-8' codec"),
    "one list": ([CHAT], "is a list; the file holds one JSON object a line (JSONL)"),
    "a string": ("messages", "is not a JSON object"),
    "half a surrogate": (b'{"prompt": "\\ud800", "completion": "a"}', "is not JSON"),
    "a call of many lists": (
        chat(ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "[" * 100_000}}]}),
        "message 2 of messages calls 'look' with arguments that are not JSON",
    ),
    "no known key": ({"text": "the river"}, 'is missing the key "messages"'),
    "no completion": ({"prompt": "the river"}, 'is missing the key "completion"'),
    "no prompt": ({"completion": "the river"}, 'is missing the key "prompt"'),
    "an empty completion": ({"prompt": "a", "completion": ""}, '"completion" is empty'),
    "a prompt of numbers": ({"prompt": [1], "completion": "a"}, '"prompt" has to be a string'),
    "another key": ({**CHAT, "functions": []}, "has the key 'functions'; a chat example has messages, tools"),
    "no message": (chat(), '"messages" has to be a list of messages that is not empty'),
    "messages as text": ({"messages": "Where?"}, '"messages" has to be a list'),
    "a message as text": (chat("Where?", SAID), "message 1 of messages is not an object"),
    "an unknown role": (chat({**ASKED, "role": "bot"}, SAID), "message 1 of messages has the role 'bot'; a role is"),
    "an unknown key": (chat({**ASKED, "mood": "good"}, SAID), "has the key 'mood'; a message has role, content"),
    "nothing asked": (chat({"role": "user"}, SAID), "message 1 of messages has no content"),
    "nothing answered": (chat(ASKED, {**SAID, "content": ""}), "message 2 of messages has no content and no"),
    "a number as content": (chat(ASKED, {**SAID, "content": 7}), "neither a string nor a list of text parts"),
    "a picture": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAID),
        "a part of type 'image_url'; this trains on text alone",
    ),
    "the user last": (chat(ASKED, SAID, ASKED), "its last message has to be from the assistant"),
    "nothing learned": (chat(ASKED, {**SAID, "weight": 0}), "no assistant message with a weight above 0"),
    "half a weight": (chat(ASKED, {**SAID, "weight": 0.5}), "has the weight 0.5; it is 0 or 1"),
    "a user's weight": (chat({**ASKED, "weight": 1}, SAID), "has a weight, which an assistant's message has"),
    "a tool that nobody called": (
        chat(ASKED, {"role": "tool", "tool_call_id": "9", "content": "reeds"}, SAID),
        "answers a tool call that no message before it makes",
    ),
    "arguments that are no JSON": (
        chat(ASKED, {**SAID, "tool_calls": [{**CALL, "function": {"name": "look", "arguments": "reeds"}}]}),
        "calls 'look' with arguments that are not JSON",
    ),
    "tools as text": ({**CHAT, "tools": "look"}, '"tools" has to be a list'),
    "a preference": (PAIR, "is a preference example, which the method dpo takes, not supervised"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_named_with_its_reason(line, reason, tmp_path):
    found = checked(file_of(tmp_path, CHAT, line), "supervised")
    ((number, said),) = found.problems
    assert number == 2 and reason in said
    assert found.message.startswith("Invalid file format. Line 2: ")
    assert found.examples == 11


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({**PAIR, "input": [ASKED]}, '"input" has to be an object with "messages"'),
        ({**PAIR, "input": {"messages": [ASKED, SAID]}}, "the last message of its input is from the assistant"),
        ({**PAIR, "preferred_output": []}, '"preferred_output" has to be a list of messages that is not empty'),
        ({**PAIR, "preferred_output": [SAID, SAID]}, '"preferred_output" has to be one message from the assistant'),
        ({**PAIR, "non_preferred_output": [SAID]}, '"preferred_output" and "non_preferred_output" are the same'),
        ({"input": PAIR["input"], "preferred_output": [SAID]}, 'is missing the key "non_preferred_output"'),
        (CHAT, "is a chat example, which the method supervised takes, not dpo"),
    ],
)
def test_a_malformed_preference_is_named_with_its_reason(line, reason, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [line, *[PAIR] * 10]))
    ((number, said),) = checked(path, "dpo").problems
    assert number == 1 and reason in said


def test_what_openai_takes_is_taken(tmp_path):
    long = chat(
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Where "}, {"type": "text", "text": "now?"}],
            "name": "ada",
        },
        {"role": "assistant", "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "tool_call_id": "1", "content": "boats"},
        SAID,
        tools=[{"type": "function", "function": {"name": "look", "parameters": {}}}],
        parallel_tool_calls=False,
    )
    path = file_of(tmp_path, b"\xef\xbb\xbf" + json.dumps(long).encode(), b"", good=10)
    assert checked(path, "supervised").problem_count == 0
    (line, first), (after, _), *_ = examples(path, "supervised")
    assert isinstance(first, Chat) and (line, after) == (1, 3)
    assert first.learned == (False, False, False, False, True)
    assert first.messages[1]["content"] == "Where now?"
    assert first.messages[2]["tool_calls"][0]["function"]["arguments"] == {"at": "reeds"}


def test_completions_and_preferences_are_read_too(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"prompt": "", "completion": " sea"}))
    assert [made for _, made in examples(path, "supervised")] == [Completion("", " sea")]
    path.write_text(json.dumps(PAIR))
    ((_, pair),) = examples(path, "dpo")
    assert isinstance(pair, Preference) and pair.preferred.messages[-1]["content"] == SAID["content"]
    assert pair.preferred.learned == (False, True)


def test_ratings_are_read_and_a_label_is_true_or_false(tmp_path):
    path = file_of(tmp_path, {**CHAT, "label": True}, {**CHAT, "label": 1}, {"label": True}, good=0)
    first, second = checked(path, "kto", 1).problems
    assert first == (2, '"label" has to be true or false') and second == (3, 'is missing the key "messages"')
    assert "which the method kto takes, not supervised" in checked(path, "supervised").message


def test_labels_of_texts_are_read_and_there_are_two_to_127_of_them(tmp_path):
    path = tmp_path / "labelled.jsonl"

    def file(*labels: object, text: object = "a") -> Path:
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for label in labels))
        return path

    found = checked(file(*["good", "bad"] * 5), "classify")
    assert (found.examples, found.format, found.labels, found.problem_count) == (10, "labelled", {"good", "bad"}, 0)
    assert "has one label, so there is nothing to tell apart" in checked(file(*["good"] * 10), "classify").message
    assert "has 128 labels, and a head has at most 127" in checked(file(*map(str, range(128))), "classify").message
    for wrong in (file(True), file(""), file("x" * 129), file("a\nb"), file("good", text="")):
        assert checked(wrong, "classify", 1).problem_count == 1
    path.write_text('{"text": "a"}')
    assert checked(path, "classify", 1).problems == [(1, 'is missing the key "label"')]
    assert "which the method classify takes, not supervised" in checked(file("good"), "supervised").message


def test_a_file_holds_one_format(tmp_path):
    found = checked(file_of(tmp_path, CHAT, {"prompt": "a", "completion": "b"}), "supervised")
    assert "is a completion example, and those before are chat" in found.message


def test_too_few_examples_are_said(tmp_path):
    found = checked(file_of(tmp_path, good=9), "supervised")
    assert found.message == "Invalid file format. The file has 9 examples, but must have at least 10"
    assert found.problems[0][0] is None


def test_a_thousand_problems_are_counted_and_the_first_are_said(tmp_path):
    found = checked(file_of(tmp_path, *[{"text": "a"}] * 1000), "supervised")
    assert (found.problem_count, len(found.problems)) == (1000, 100)
    assert found.message.endswith("; and 997 more problems")


def test_a_problem_does_not_grow_with_what_it_quotes(tmp_path):
    found = checked(
        file_of(tmp_path, {**CHAT, "k" * 1_000_000: 1}, chat({**ASKED, "k" * 1_000_000: 1}, SAID)), "supervised"
    )
    assert found.problem_count == 2 and len(found.message) < 1000
    assert all("has the key 'kkk" in reason for _, reason in found.problems)


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("optimize.data.examples.LONGEST", 1000)
    found = checked(file_of(tmp_path, {"prompt": "a" * 5000, "completion": "b"}), "supervised")
    assert found.problems[0][0] == 1 and "is above" in found.problems[0][1] and found.examples == 10


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(Refused, match="cannot be read: No such file"):
        checked(tmp_path / "nowhere.jsonl", "supervised")


def test_check_says_it_on_the_command_line(tmp_path, capsys):
    path = file_of(tmp_path, CHAT, {"text": "a"})
    assert cli.run(["check", str(path)], Path) == 2
    assert capsys.readouterr().err.startswith("Line 2: is missing the key")
    assert cli.run(["check", str(path), "--json"], Path) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["problems"][0]["line"] == 2 and said["format"] == "chat" and said["problem_count"] == 1
    assert cli.run(["check", str(file_of(tmp_path))], Path) == 0
    assert "10 chat examples" in capsys.readouterr().out


def test_checking_needs_no_torch():
    code = "import sys, optimize.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_check_of_short_examples_reads_no_tokenizer_and_imports_no_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 8192}))
    words = ["check", str(file_of(tmp_path)), "--method", "supervised", "--model", str(tmp_path), "--json"]
    code = f"""
import sys
from optimize.cli import run

run({words!r}, None)
print(sorted({{"torch", "transformers"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[0])["examples"] == 10
    assert done.stdout.splitlines()[1] == "[]"


def test_a_head_that_is_trained_has_no_more_and_no_longer_labels_than_a_server_takes():
    assert (LABELS, LABEL) == (saved_modules.MAX_LABELS, saved_modules.MAX_LABEL)
