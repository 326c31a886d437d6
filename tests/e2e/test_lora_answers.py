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

MIXTURE = "mixture"  # of 0.3 of one and -0.5 of the other, in PEFT


@pytest.fixture(scope="module")
def peft_models(adapters, tmp_path_factory):
    """The base in float32, and the same adapters as the server's `voice` and `faint` over it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from serve.models.embedded import ensure
    from tests.support.lora import variant

    base = AutoModelForCausalLM.from_pretrained(ensure(BASE), dtype=torch.float32)
    faint = variant(adapters["bravo"], tmp_path_factory.mktemp("faint"), scale=0.05)
    weight_decomposed = _dora(base, faint, tmp_path_factory.mktemp("dora"))
    model = PeftModel.from_pretrained(base, adapters["alpha"], adapter_name="voice")
    model.load_adapter(str(faint), adapter_name="faint")
    model.load_adapter(str(weight_decomposed), adapter_name="dora")
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
    model.save_pretrained(folder)
    model.unload()
    return folder


@pytest.fixture(scope="module")
def dora(server: Server, peft_models, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pushed")
    peft_models.save_pretrained(folder, selected_adapters=["dora"])
    server.upload("dora", folder / "dora").raise_for_status()
    return "dora"


def test_mixed_with_other_answers_an_adapter_gives_what_peft_gives(server: Server, voice, faint, dora, peft_models):
    import torch

    body = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "return_token_ids": True, "ignore_eos": True}
    texts, drift, gaps = prompts(300)[::60], [], []
    for name, theirs in (
        (voice, voice),
        (faint, faint),
        (dora, dora),
        (f"{voice}:0.3+{faint}:-0.5", MIXTURE),
        (BASE, ""),
    ):
        # One request, several prompts: they prefill and decode in one batch.
        answer = done(server.http.post("/v1/completions", json={**body, "model": name, "prompt": texts}, timeout=300))
        for choice in answer["choices"]:
            before, after = choice["prompt_token_ids"], choice["token_ids"]
            assert len(after) == TOKENS
            with torch.inference_mode():
                if not theirs:
                    with peft_models.disable_adapter():
                        logits = peft_models(torch.tensor([before + after])).logits[0]
                else:
                    peft_models.set_adapter(theirs)
                    logits = peft_models(torch.tensor([before + after])).logits[0]
            likely = logits.log_softmax(-1)[len(before) - 1 : -1]
            chosen = likely.gather(-1, torch.tensor(after)[:, None]).flatten()
            gaps += (likely.max(-1).values - chosen).tolist()
            drift += (chosen - torch.tensor(choice["logprobs"]["token_logprobs"])).abs().tolist()
    assert max(gaps) <= TOLERANCE and max(drift) <= TOLERANCE
    assert median(drift) < 0.1


def test_an_answer_that_parts_where_two_tokens_are_not_equally_likely_is_found():
    one = [[("1", {"1": -0.1, "2": -3.0}), ("3", {"3": -0.2})], [("1", {"1": -0.7, "2": -0.7})]]
    same = compare(one, one)
    assert (same.same, same.worst, max(same.drift)) == (2, 0, 0)
    other = [[("2", {"1": -3.0, "2": -0.1})], [("2", {"1": -0.71, "2": -0.69})]]
    found = compare(one, other)
    assert found.same == 0 and found.worst == pytest.approx(2.9) and found.worst > TOLERANCE
    unseen = compare([[("1", {"1": -0.1})]], [[("9", {"9": -0.1})]])
    assert unseen.worst > TOLERANCE
