"""What the engine answers with an adapter is what transformers and PEFT compute from the same files."""

from __future__ import annotations

from statistics import median

import pytest

from tests.campaigns.equality import TOLERANCE, compare, prompts
from tests.support.server import BASE, Server, done

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TOKENS = 12


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
    model = PeftModel.from_pretrained(base, adapters["alpha"], adapter_name="voice")
    model.load_adapter(str(faint), adapter_name="faint")
    return model.eval()


def test_mixed_with_other_answers_an_adapter_gives_what_peft_gives(server: Server, voice, faint, peft_models):
    import torch

    body = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "return_token_ids": True, "ignore_eos": True}
    texts, drift, gaps = prompts(300)[::60], [], []
    for name in (voice, faint, BASE):
        # One request, several prompts: they prefill and decode in one batch.
        answer = done(server.http.post("/v1/completions", json={**body, "model": name, "prompt": texts}, timeout=300))
        for choice in answer["choices"]:
            before, after = choice["prompt_token_ids"], choice["token_ids"]
            assert len(after) == TOKENS
            with torch.inference_mode():
                if name == BASE:
                    with peft_models.disable_adapter():
                        logits = peft_models(torch.tensor([before + after])).logits[0]
                else:
                    peft_models.set_adapter(name)
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
