"""What the engine answers with an adapter is what transformers and PEFT compute from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from tests.campaigns.equality import TOLERANCE, compare, prompts
from tests.support.server import BASE, Server, done

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TOKENS = 12

WORDS = ("<call>", "ACME-7")
MIXTURE = "mixture"  # of 0.3 of one and -0.5 of the other, in PEFT


@pytest.fixture(scope="module")
def folders(adapters, tmp_path_factory):
    """The base in float32, and by name the adapters over it: the server's `voice` and `faint`, and others of PEFT's."""
    import torch
    from transformers import AutoModelForCausalLM

    from serve.models.embedded import ensure
    from tests.support.lora import variant

    base = AutoModelForCausalLM.from_pretrained(ensure(BASE), dtype=torch.float32)
    base.resize_token_embeddings(base.config.vocab_size + len(WORDS), mean_resizing=False)
    faint = variant(adapters["bravo"], tmp_path_factory.mktemp("faint"), scale=0.05)
    made = {"dora": _dora(base, faint, tmp_path_factory.mktemp("dora"))}
    made["words"] = _words(base, faint, tmp_path_factory.mktemp("words"))
    return base, {"voice": adapters["alpha"], "faint": faint, **made}


@pytest.fixture(scope="module")
def peft_models(folders):
    from peft import PeftModel

    base, adapters = folders
    model = PeftModel.from_pretrained(base, adapters["voice"], adapter_name="voice")
    for name in ("faint", "dora", "words"):
        model.load_adapter(str(adapters[name]), adapter_name=name)
    model.add_weighted_adapter(["voice", "faint"], [0.3, -0.5], MIXTURE, combination_type="cat")
    return model.eval()


def _dora(base, faint: Path, folder: Path) -> Path:
    """`faint` with magnitudes that are some percent off the norms, as a DoRA of PEFT's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    settings = json.loads((faint / "adapter_config.json").read_text())
    config = LoraConfig(
        r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=settings["target_modules"], use_dora=True
    )
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_file(faint / "adapter_model.safetensors"))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.05 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder, save_embedding_layers=False)
    model.unload()
    return folder


def _words(base, faint: Path, folder: Path) -> Path:
    """`faint` with rows of its own for common tokens and for two that the base does not have, and their tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from serve.models.embedded import ensure

    tokenizer = AutoTokenizer.from_pretrained(ensure(BASE))
    tokens = [tokenizer.convert_tokens_to_ids(word) for word in ("Ġthe", "Ġof", ".")]
    added = list(range(len(tokenizer), len(tokenizer) + len(WORDS)))
    assert tokenizer.add_tokens(list(WORDS)) == len(WORDS)
    settings = json.loads((faint / "adapter_config.json").read_text())
    config = LoraConfig(
        r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=settings["target_modules"],
        trainable_token_indices=[*tokens, *added],
    )  # fmt: skip
    model = get_peft_model(base, config)
    weights = load_file(faint / "adapter_model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = weights[name.replace(".default", "")].float()
        if "trainable_tokens_delta" in name:
            parameter.data += 0.3 * parameter.data.std() * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    model.unload()
    return folder


@pytest.fixture(scope="module")
def dora(server: Server, folders) -> str:
    server.upload("dora", folders[1]["dora"]).raise_for_status()
    return "dora"


@pytest.fixture(scope="module")
def words(server: Server, folders) -> str:
    server.upload("words", folders[1]["words"]).raise_for_status()
    return "words"


def test_mixed_with_other_answers_an_adapter_gives_what_peft_gives(
    server: Server, voice, faint, dora, words, peft_models
):
    import torch

    body = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "return_token_ids": True, "ignore_eos": True}
    texts, drift, gaps = prompts(300)[::60], [], []
    texts.append("Please <call> the ACME-7 of the harbour.")
    vocabulary = peft_models.config.vocab_size - len(WORDS)
    for name, theirs in (
        (voice, voice),
        (faint, faint),
        (dora, dora),
        (words, words),
        (f"{voice}:0.3+{faint}:-0.5", MIXTURE),
        (BASE, ""),
    ):
        # One request, several prompts: they prefill and decode in one batch.
        answer = done(server.http.post("/v1/completions", json={**body, "model": name, "prompt": texts}, timeout=300))
        for choice in answer["choices"]:
            before, after = choice["prompt_token_ids"], choice["token_ids"]
            assert len(after) == TOKENS
            # Of the tokens that one of them adds, the others' engine has neither rows nor columns.
            own = vocabulary + (len(WORDS) if name == words else 0)
            assert (max(before) >= vocabulary) == (name == words and "<call>" in texts[choice["index"]])
            with torch.inference_mode():
                if not theirs:
                    with peft_models.disable_adapter():
                        logits = peft_models(torch.tensor([before + after])).logits[0]
                else:
                    peft_models.set_adapter(theirs)
                    logits = peft_models(torch.tensor([before + after])).logits[0]
            likely = logits[:, :own].log_softmax(-1)[len(before) - 1 : -1]
            chosen = likely.gather(-1, torch.tensor(after)[:, None]).flatten()
            gaps += (likely.max(-1).values - chosen).tolist()
            drift += (chosen - torch.tensor(choice["logprobs"]["token_logprobs"])).abs().tolist()
    assert max(gaps) <= TOLERANCE and max(drift) <= TOLERANCE
    assert median(drift) < 0.1
    assert 'reason="dora"' not in server.http.get("/metrics").text, "they are computed in the fused step"


def test_a_classification_head_gives_the_labels_that_peft_gives(server: Server, voice, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from serve.models.embedded import ensure

    base = AutoModelForSequenceClassification.from_pretrained(ensure(BASE), dtype=torch.float32, num_labels=3)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = get_peft_model(base, config).eval()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.05 if "score" in name else 0.02
            parameter.data = scale * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ["good", "bad", "neither"]
    settings["id2label"] = {str(number): name for number, name in enumerate(names)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    server.upload("mood", tmp_path).raise_for_status()
    assert server.adapter("mood")["versions"][0]["checks"]["labels"] == names

    tokenizer, texts = AutoTokenizer.from_pretrained(ensure(BASE)), prompts(300)[::60]
    answer = done(server.http.post("/v1/classify", json={"model": "mood", "input": texts}))
    assert answer["model"].startswith("mood@") and len(answer["data"]) == len(texts)
    for text, row in zip(texts, answer["data"], strict=True):
        with torch.inference_mode():
            likely = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1)
        assert (likely - torch.tensor(row["probs"])).abs().max() < 0.05
        assert row["label"] == names[max(range(3), key=row["probs"].__getitem__)] and row["num_classes"] == 3
    said = server.http.post("/v1/completions", json={"model": "mood", "prompt": "Hello", "max_tokens": 4})
    assert said.status_code == 400 and "ask it by /v1/classify" in said.text
    other = server.http.post("/v1/classify", json={"model": voice, "input": "Hello"})
    assert other.status_code == 400 and "has no classification head" in other.text


def test_an_answer_that_parts_where_two_tokens_are_not_equally_likely_is_found():
    one = [[("1", {"1": -0.1, "2": -3.0}), ("3", {"3": -0.2})], [("1", {"1": -0.7, "2": -0.7})]]
    same = compare(one, one)
    assert (same.same, same.worst, max(same.drift)) == (2, 0, 0)
    other = [[("2", {"1": -3.0, "2": -0.1})], [("2", {"1": -0.71, "2": -0.69})]]
    found = compare(one, other)
    assert found.same == 0 and found.worst == pytest.approx(2.9) and found.worst > TOLERANCE
    unseen = compare([[("1", {"1": -0.1})]], [[("9", {"9": -0.1})]])
    assert unseen.worst > TOLERANCE
