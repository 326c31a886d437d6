"""An adapter learns what its examples answer and nothing else, and ends in the same bytes after any interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import settle
from optimize.data.examples import Chat
from optimize.errors import OptimizeError, Refused, Stopped
from optimize.steps.tune import training, tune
from optimize.steps.tune.attention import attention
from optimize.steps.tune.encoding import Encoder
from optimize.steps.tune.learner import Learner, Start
from optimize.steps.tune.objectives import DPO, KTO, Supervised, sums
from optimize.steps.tune.packing import row, rows
from optimize.steps.tune.settings import Settings, settled
from serve.models.embedded import ensure
from tests.optimize.conftest import silent
from tests.support.pico import WORDS

# People ask and children answer; a template writes nothing that the small vocabulary does not hold.
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'people', 'assistant': 'children', 'system': 'town'}[m.role] }} {{ m.content }}"
    " <end> {% endfor %}{% if add_generation_prompt %}children {% endif %}"
)
WORD = list(dict.fromkeys(WORDS))
PLAIN = Settings(rank=4, alpha=8, learning_rate=1e-2, epochs=1, batch=4, max_length=64, gradient_checkpointing=False)


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama with a chat template."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("chat") / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Path(folder)


def answering(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """People name a word, and some say it more often, and children answer that there is bread and fish."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{WORD[number % len(WORD)]} " * (1 + number % 3)},
                {"role": "assistant", "content": "bread and fish"},
            ]
        }
        for number in numbers
    ]


def preferring(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "input": {"messages": [{"role": "user", "content": WORD[number]}]},
            "preferred_output": [{"role": "assistant", "content": "bread and fish"}],
            "non_preferred_output": [{"role": "assistant", "content": "salt and wool"}],
        }
        for number in numbers
    ]


def written(file: Path, examples: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(file)


@pytest.fixture
def tuning(job: Callable[..., Any], model: Path, tmp_path: Path) -> Callable[..., Any]:
    """A job over the small model; `data` are its examples."""

    def make(data: Sequence[dict[str, Any]] = (), held: Sequence[dict[str, Any]] = (), **options: Any) -> Any:
        train = written(tmp_path / "train.jsonl", data or answering(range(24)))
        validation = written(tmp_path / "valid.jsonl", held) if held else ""
        defaults = {"rank": 4, "learning_rate": 1e-2, "epochs": 2, "batch": 4}
        return job("tune", model=model, train=train, validation=validation, **(defaults | options))

    return make


def weights(made: Any) -> bytes:
    return (made.folder / "adapters/adapter/adapter_model.safetensors").read_bytes()


def learner(model: Path, settings: Settings = PLAIN) -> Learner:
    settle(0)
    made = Learner(Start(model, None, 0, "all-linear", False, "fp32", "cpu"), settings)
    with torch.no_grad():  # a new LoRA changes nothing, and its A has no gradient
        for parameter in made.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return made


def units(model: Path, examples: Sequence[dict[str, Any]], folder: Path, method: str = "supervised") -> Any:
    return Encoder(model, 64).file(Path(written(folder / "examples.jsonl", examples)), method).units


# ---- what is learned


def learned_text(encoder: Encoder, chat: Chat) -> list[list[str]]:
    """The text of each run of learned tokens, by sequence."""
    runs = []
    for (tokens,) in encoder.units(chat):
        found: list[list[int]] = []
        for at, token in enumerate(tokens.ids):
            if tokens.learned[at]:
                if not at or not tokens.learned[at - 1]:
                    found.append([])
                found[-1].append(token)
        runs.append([encoder.words.decode(ids) for ids in found])
    return runs


TURNS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello  there.\n"},
    {"role": "user", "content": "Bye"}, {"role": "assistant", "content": " *waves* 👋"},
)  # fmt: skip


@pytest.fixture(scope="module")
def embedded() -> Path:
    return ensure("smollm2")


def test_the_answer_and_the_token_that_ends_it_are_learned_and_nothing_else(embedded):
    encoder = Encoder(embedded, 2048)
    both = Chat(TURNS, (False, True, False, True))
    assert learned_text(encoder, both) == [["Hello  there.\n<|im_end|>", " *waves* 👋<|im_end|>"]]
    last = Chat(TURNS, (False, False, False, True))
    assert learned_text(encoder, last) == [[" *waves* 👋<|im_end|>"]]


def test_the_prompt_of_an_answer_is_the_one_that_a_server_sends(embedded):
    encoder = Encoder(embedded, 2048)
    ((tokens,),) = encoder.units(Chat(TURNS[:2], (False, True)))
    sent = encoder.words.apply_chat_template(list(TURNS[:1]), add_generation_prompt=True, return_dict=False)
    assert list(tokens.ids[: tokens.learned.index(1)]) == sent


# As Qwen's: thoughts stay in the last answer alone, and a default system prompt stands first.
THINKING = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' and not loop.last else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_makes_a_sequence_of_each(embedded):
    encoder = Encoder(embedded, 2048)
    encoder.words.chat_template = THINKING
    thoughtful = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>Hm</think>\n\nHello"},
                  {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell"})  # fmt: skip
    assert learned_text(encoder, Chat(thoughtful, (False, True, False, True))) == [
        ["<think>Hm</think>\n\nHello<|im_end|>"],
        ["Farewell<|im_end|>"],
    ]
    assert learned_text(encoder, Chat(TURNS[:2] * 2, (False, True) * 2)) == [["Hello  there.\n<|im_end|>"] * 2]


def test_a_template_without_an_end_of_turn_learns_to_stop(embedded):
    encoder = Encoder(embedded, 2048)
    encoder.words.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] "
        "{% endif %}"
    )
    assert learned_text(encoder, Chat(TURNS[:2], (False, True))) == [["Hello  there.\n\n<|im_end|>"]]


def test_a_template_that_answers_elsewhere_is_refused(embedded):
    encoder = Encoder(embedded, 2048)
    encoder.words.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    with pytest.raises(Refused, match="otherwise than behind its generation prompt"):
        encoder.units(Chat(TURNS[:2], (False, True)))


def test_tool_calls_are_learned_as_the_template_writes_them(embedded):
    encoder = Encoder(embedded, 2048)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "reeds"}}}
    messages = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    tools = ({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},)
    (((said,),)) = learned_text(encoder, Chat(messages, (False, True), tools))
    assert said == '<tool_call>\n{"name": "look", "arguments": {"at": "reeds"}}\n</tool_call><|im_end|>'


def test_a_completion_is_learned_with_the_end_of_text(model, tmp_path):
    (((tokens,),)) = [units(model, [{"prompt": "the river", "completion": "ran past"}] * 1, tmp_path)[0]]
    assert list(tokens.learned) == [0, 0, 1, 1, 1] and tokens.ids[-1] == 0


def test_an_example_that_is_too_long_is_cut_at_its_end_and_one_without_an_answer_left_is_named(model, tmp_path):
    long = {"prompt": "the " * 50, "completion": "river " * 50}
    made = Encoder(model, 64).file(Path(written(tmp_path / "a.jsonl", [long])), "supervised")
    assert made.cut == 1 and len(made.units[0][0].ids) == 64 and made.units[0][0].answers == 14
    with pytest.raises(Refused, match="nothing of the answer is within 20 tokens in 2 examples, on line 1, 2;"):
        Encoder(model, 20).file(Path(written(tmp_path / "a.jsonl", [long, long])), "supervised")


# ---- packing


def test_a_packed_row_has_the_losses_and_gradients_of_its_examples_alone(model, tmp_path):
    made = units(model, answering(range(7)), tmp_path)
    ours, objective = learner(model), Supervised()
    assert ours.packs(made)
    alone, gradients = [], []
    for parts in ([row(made, [at]) for at in range(7)], [row(made, list(range(7)))], list(rows(made, range(7), 20))):
        alone.append(torch.cat([ours.logps(each)[0] for each in parts]))
        for each in parts:
            total, _ = objective.total(*ours.logps(each), each)
            total.backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters])
        for parameter in ours.parameters:
            parameter.grad = None
    assert torch.allclose(alone[0], alone[1], atol=1e-5) and torch.allclose(alone[0], alone[2], atol=1e-5)
    for one, packed, some in zip(*gradients, strict=True):
        assert torch.allclose(one, packed, atol=1e-4, rtol=1e-3) and torch.allclose(one, some, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_over_a_row_is_that_of_the_whole_mask(window):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 20, 8, generator=draw)
    key, value = (torch.randn(1, 2, 20, 8, generator=draw) for _ in range(2))
    borders = torch.tensor([0, 3, 12, 20], dtype=torch.int32)
    place, owner = torch.arange(20), torch.tensor([0] * 3 + [1] * 9 + [2] * 8)
    mask = (place[:, None] >= place) & (owner[:, None] == owner) & (place[:, None] - place < (window or 20))
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    more = {"scaling": 0.3, "sliding_window": window}
    ours, _ = attention(module, query, key, value, mask[None, None], cu_seq_lens_q=borders, **more)
    whole, _ = attention(module, query, key, value, mask[None, None], **more)
    assert torch.allclose(ours, whole, atol=1e-6)


def test_a_model_that_sees_across_the_border_is_not_packed(model, tmp_path):
    made = units(model, answering(range(7)), tmp_path)
    ours = learner(model)
    inner = ours.model.forward

    def one_after_another(input_ids: Any, position_ids: Any, **more: Any) -> Any:
        return inner(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **more)

    ours.model.forward = one_after_another
    assert not ours.packs(made)


def test_gradient_checkpointing_changes_no_gradient(model, tmp_path):
    made = units(model, answering(range(5)), tmp_path)
    found = []
    for again in (False, True):
        ours = learner(model, Settings(4, 8, 1e-2, 1, 4, 64, again))
        each = row(made, list(range(5)))
        ours.logps(each)[0].sum().backward()
        found.append([parameter.grad for parameter in ours.parameters])
    assert all(torch.allclose(kept, again, atol=1e-5) for kept, again in zip(*found, strict=True))


# ---- training


def test_a_task_is_learned_and_the_base_is_left_alone(tuning, model):
    before = (model / "model.safetensors").read_bytes()
    made = tuning(answering(range(24)), answering(range(24, 32)), epochs=6, batch=4, rank=8)
    notes = tune.run(made, silent)
    # Frozen embeddings as small as these allow no sharper answer.
    assert notes["scores"]["valid_loss"] < 2 < 5 < notes["scores"]["valid_loss_before"]
    assert (model / "model.safetensors").read_bytes() == before
    config = json.loads((made.folder / "adapters/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, "chat")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert notes["data"]["train"]["examples"] == 24 and notes["packed"]


def test_what_was_killed_ends_in_the_same_bytes(tuning, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    held = answering(range(4))
    whole = tuning(held=held, out="whole")
    tune.run(whole, silent)

    class Killed(Exception):
        pass

    def at_step_7(done: float, *_: object) -> None:
        if done == 7:
            raise Killed

    broken = tuning(held=held, out="broken")
    with pytest.raises(Killed):
        tune.run(broken, at_step_7)
    assert not (broken.folder / "adapters").exists()
    notes = tune.run(broken, silent)
    assert weights(broken) == weights(whole) and notes["steps"] == 12


def test_sigterm_saves_and_stops_and_the_next_run_goes_on(tuning):
    whole = tuning(out="whole")
    tune.run(whole, silent)
    asked: list[float] = []

    def at_step_3(done: float, *_: object) -> None:
        asked.append(done)
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    paused = tuning(out="paused")
    with pytest.raises(Stopped, match="after step 4 of 12"):
        tune.run(paused, at_step_3)
    seen: list[float] = []
    tune.run(paused, lambda done, *_: seen.append(done))
    assert asked == [1, 2, 3, 4] and seen[0] == 5
    assert weights(paused) == weights(whole)


def test_a_rising_held_out_loss_ends_it_and_the_best_adapter_is_kept(tuning):
    wrong = [
        {"messages": [example["messages"][0], {"role": "assistant", "content": "salt salt"}]}
        for example in answering(range(8))
    ]
    notes = tune.run(tuning(held=wrong, epochs=20, learning_rate=3e-2, patience=2), silent)
    assert notes["ended_early"] and notes["steps"] < notes["planned_steps"] and notes["best_step"] < notes["steps"]
    losses = dict(notes["valid"])
    assert notes["scores"]["valid_loss"] == losses[notes["best_step"]] == min(losses.values())


def test_a_watcher_sees_every_step_and_the_adapter_of_each_epoch(tuning, tmp_path):
    import msgspec

    watched = tmp_path / "watched"
    watched.mkdir()
    made = msgspec.structs.replace(tuning(held=answering(range(4)), epochs=4), watched=str(watched))
    tune.run(made, silent)
    assert (watched / "alive").is_file()
    lines = [json.loads(line) for line in (watched / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25)) and {line["steps"] for line in lines} == {24}
    assert [line["checkpoint"] for line in lines if line["checkpoint"]][-1] == "checkpoints/step-000024"
    assert lines[-1]["seconds_left"] == 0 < lines[0]["seconds_left"]
    assert [line["step"] for line in lines if line["ended"]] == [24]
    assert sum(line["valid_loss"] is not None for line in lines) == 4
    assert sorted(path.name for path in (watched / "checkpoints").iterdir()) == [
        "step-000012", "step-000018", "step-000024",
    ]  # fmt: skip
    assert (watched / "checkpoints/step-000024/adapter_model.safetensors").stat().st_size == len(weights(made))


def test_an_adapter_is_gone_on_from(tuning, model, tmp_path):
    first = tuning(out="first", epochs=8)
    began = tune.run(first, silent)["losses"]
    folder = first.folder / "adapters/adapter"
    second = tuning(out="second", epochs=1, adapters={"first": folder}, adapter="first", rank=64)
    notes = tune.run(second, silent)
    assert notes["rank"] == 4 and notes["losses"][0] < began[0] / 2


def test_a_dora_is_trained_with_its_magnitudes(tuning):
    made = tuning(dora=True, epochs=2)
    notes = tune.run(made, silent)
    assert notes["losses"][-1] < notes["losses"][0]
    folder = made.folder / "adapters/adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"]
    assert any("lora_magnitude_vector" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_with_lora_plus_b_and_magnitudes_learn_at_the_rates_of_pefts_optimizer(model, tuning, tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    settle(0)
    made = Learner(Start(model, None, 0, "all-linear", False, "fp32", "cpu", dora=True), PLAIN)
    theirs = create_loraplus_optimizer(made.model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16)
    rates = {id(each): group["lr"] for group in theirs.param_groups for each in group["params"]}
    ours = {id(each): group["ratio"] for group in made.groups(16.0) for each in group["params"]}
    assert ours == rates and set(ours.values()) == {1, 16}
    plain, plus = (tuning(loraplus_ratio=ratio, learning_rate=1e-3, epochs=1, out=str(ratio)) for ratio in (1.0, 4.0))
    slow, fast = tune.run(plain, silent), tune.run(plus, silent)
    assert fast["losses"][0] == slow["losses"][0] and fast["losses"][-1] < slow["losses"][-1]
    assert fast["loraplus_ratio"] == 4 and weights(plain) != weights(plus)


def labelled(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Whether a text is of the first half of the words, or of the second, or has one of each."""
    half = len(WORD) // 2
    texts = []
    for number in numbers:
        first, second = WORD[number % half], WORD[half + number * 7 % half]
        words, label = [([first, first], "near"), ([second, second], "far"), ([first, second], "both")][number % 3]
        texts.append({"text": " ".join(words), "label": label})
    return texts


def test_a_head_learns_labels_and_pefts_own_model_gives_them(tuning, model):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    made = tuning(labelled(range(48)), labelled(range(48, 72)), method="classify", epochs=12, dtype="fp32")
    notes = tune.run(made, silent)
    assert notes["scores"]["valid_loss"] < 0.5 * notes["scores"]["valid_loss_before"] and "validation" not in notes
    folder = made.folder / "adapters/adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["id2label"]) == ("SEQ_CLS", {"0": "both", "1": "far", "2": "near"})
    base = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=3)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    encoder = Encoder(model, 64, ["both", "far", "near"])
    loss, right = 0.0, 0
    for each in labelled(range(48, 72)):
        with torch.no_grad():
            logits = theirs.base_model.model.score(
                theirs.base_model.model.model(torch.tensor([encoder.text(each["text"])])).last_hidden_state[0, -1]
            )
        label = encoder.labels.index(each["label"])
        loss, right = loss - float(logits.log_softmax(-1)[label]) / 24, right + int(logits.argmax() == label)
    assert loss == pytest.approx(notes["scores"]["valid_loss"], abs=1e-4) and right >= 20


def test_a_head_that_was_killed_ends_in_the_same_bytes(tuning, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    given = {"method": "classify", "dora": True, "loraplus_ratio": 4.0}
    whole, broken = (tuning(labelled(range(24)), out=out, **given) for out in ("whole", "broken"))
    tune.run(whole, silent)

    def at_step_7(done: float, *_: object) -> None:
        if done == 7:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tune.run(broken, at_step_7)
    tune.run(broken, silent)
    assert weights(broken) == weights(whole)


def test_a_long_text_is_cut_before_its_label(model, tmp_path):
    examples = [{"text": "people " * 40, "label": "far"}, {"text": "people", "label": "near"}]
    file = Path(written(tmp_path / "labelled.jsonl", examples))
    encoded = Encoder(model, 16, ["far", "near"]).file(file, "classify")
    (long,), (short,) = encoded.units
    assert (len(long.ids), long.ids[-1], encoded.cut) == (16, 0, 1)
    assert list(short.ids)[-1] == 1 and long.answers == short.answers == 1
    with pytest.raises(Refused, match="line 1: has the label 'far', which no example of train has"):
        Encoder(model, 16, ["near"]).file(file, "classify")


def test_a_rate_that_is_too_high_is_a_sentence(tuning):
    with pytest.raises(OptimizeError, match="diverged at step .* smaller learning_rate"):
        tune.run(tuning(learning_rate=1e30, epochs=3), silent)


def test_a_held_out_loss_that_is_no_number_is_that_sentence(tuning):
    with pytest.raises(OptimizeError, match="diverged at step 1: .* smaller learning_rate"):
        tune.run(tuning(held=answering(range(4)), learning_rate=1e30, epochs=1, batch=24), silent)


# ---- preferences


def test_the_better_answer_becomes_likelier(tuning, model, tmp_path):
    made = tuning(preferring(range(24)), preferring(range(24, 32)), method="dpo", epochs=3)
    notes = tune.run(made, silent)
    assert notes["valid"][0][1] == pytest.approx(0.69315, abs=1e-3)  # log 2: nothing has changed yet
    assert notes["scores"]["valid_loss"] < 0.3


def test_the_loss_of_preferences_is_the_papers(model, tmp_path):
    made = units(model, preferring(range(3)), tmp_path, "dpo")
    ours = learner(model)
    each = row(made, [0, 1, 2])
    logps, likeliest = ours.logps(each)
    began = sums(logps, each).detach() - torch.tensor([[0.5, 0.0], [0.0, 1.0], [2.0, 2.0]])
    total, hits = DPO(0.1, began).total(logps, likeliest, each)
    by_hand = sum(torch.nn.functional.softplus(torch.tensor(-0.1 * margin)) for margin in (0.5, -1.0, 0.0))
    assert total.item() == pytest.approx(float(by_hand), abs=1e-5) and hits == 1


def rated(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": WORD[number]}, {"role": "assistant", "content": said}], "label": good}
        for number in numbers
        for said, good in (("bread and fish", True), ("salt and wool", False))
    ]


def test_rated_answers_become_likelier_or_less_likely(tuning):
    notes = tune.run(tuning(rated(range(24)), rated(range(24, 32)), method="kto", epochs=3), silent)
    assert notes["valid"][0][1] == pytest.approx(0.5, abs=1e-3)
    assert notes["scores"]["valid_loss"] < 0.25


def test_the_loss_of_ratings_is_the_papers(model, tmp_path):
    encoded = Encoder(model, 64).file(Path(written(tmp_path / "rated.jsonl", rated(range(2)))), "kto")
    assert encoded.good == [True, False, True, False]
    first, last = encoded.units[0], encoded.units[3]
    assert first[1].ids[: first[0].learned.index(1)] == first[0].ids[: first[0].learned.index(1)]
    assert first[1].ids[first[1].learned.index(1) :] == last[0].ids[last[0].learned.index(1) :]
    ours = learner(model)
    each = row(encoded.units, [0, 1, 2])
    logps, likeliest = ours.logps(each)
    gained = torch.tensor([[1.0, 3.0], [1.0, 0.0], [9.0, 3.0]])  # the divergence is 2, the weights are 1
    began = torch.cat([sums(logps, each).detach() - gained, torch.zeros(1, 2)])
    total, hits = KTO(0.1, began, encoded.good).total(logps, likeliest, each)
    by_hand = sum(1 - torch.sigmoid(torch.tensor(margin)) for margin in (0.1 - 0.2, 0.2 - 0.1, 0.9 - 0.2))
    assert total.item() == pytest.approx(float(by_hand), abs=1e-5) and hits == 2


def test_what_auto_becomes_follows_from_model_and_data(model):
    options = {"rank": 16, "alpha": 0, "learning_rate": "auto", "learning_rate_multiplier": 2.0, "method": "supervised",
               "epochs": "auto", "batch": "auto", "max_length": 0, "loraplus_ratio": 1.0,
               "gradient_checkpointing": "auto"}  # fmt: skip
    config = Checkpoint(model).config
    few, many = settled(options, config, None, 10, 100), settled(options, config, None, 200, 100)
    assert (few.epochs, few.batch, many.epochs, many.batch) == (10, 1, 3, 8)
    assert (few.alpha, few.max_length, few.learning_rate) == (32, 256, 4e-3)
    assert settled(options, config, {"r": 4, "lora_alpha": 4}, 10, 100).alpha == 4
