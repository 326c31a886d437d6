"""A base that pools: embeddings, scores and ranks by an adapter's name, as PEFT computes them from the same files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support import peft_kinds, plain_words
from tests.support.server import SMALL, Server, done, refused

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TEXTS = ["ships carried salt", "people baked bread and salt", "the river ran past"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
# By name: whether it is a DoRA, and whether it was trained on the model with its output layer. `later` comes later.
KINDS = {"lora": (False, False), "dora": (True, False), "causal": (False, True), "later": (False, False)}
BASE = "vectors"
# bfloat16's rounding moves a number of a vector by up to 0.003 here, an adapter by up to 0.3.
NEAR = 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of random weights, and adapters that move its embeddings far."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModel, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("pooling")
    folders = {BASE: plain_words.base(root / BASE)}
    for number, (name, (dora, causal)) in enumerate(KINDS.items()):
        config = LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=TARGETS)
        model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(folders[BASE], dtype=torch.float32)
        folders[name] = root / name
        peft_kinds.trained(model, config, folders[name], number, scale=0.1)
    return folders


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, Any]:
    """By name what transformers and PEFT say: the last token's state, of length 1."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM

    tokens, vectors = plain_words.tokenizer(), {}
    for name, folder in folders.items():
        kind = AutoModelForCausalLM if KINDS.get(name) == (False, True) else AutoModel
        model = kind.from_pretrained(folders[BASE], dtype=torch.float32)
        model = model if name == BASE else PeftModel.from_pretrained(model, folder)
        with torch.inference_mode():
            states = [
                model.eval()(torch.tensor([tokens(text)["input_ids"]]), output_hidden_states=True) for text in TEXTS
            ]
            last = torch.stack([state.hidden_states[-1][0, -1] for state in states])
        vectors[name] = torch.nn.functional.normalize(last, dim=-1)
    return vectors


@pytest.fixture(scope="module")
def pooling(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    words = ("--runner", "pooling", "--convert", "embed", *SMALL)
    with Server(folder / "data", folder / "log", *words, model=str(folders[BASE])) as server:
        for name in ("lora", "dora", "causal"):
            server.upload(name, folders[name]).raise_for_status()
        yield server


def embedded(server: Server, model: str) -> tuple[str, Any]:
    """Who answered, and the vectors."""
    import torch

    answer = done(server.http.post("/v1/embeddings", json={"model": model, "input": TEXTS}))
    return answer["model"], torch.tensor([row["embedding"] for row in answer["data"]])


def difference(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", [BASE, "lora", "dora", "causal"])
def test_embeddings_scores_and_ranks_by_a_name_are_pefts(pooling: Server, wanted: dict[str, Any], name: str):
    import torch

    model, vectors = embedded(pooling, name)
    assert model.partition("@")[0] == name
    assert difference(vectors, wanted[name]) < NEAR
    assert all(difference(wanted[name], wanted[other]) > 10 * NEAR for other in wanted if other != name)
    near = wanted[name][1:] @ wanted[name][0]
    scored = done(pooling.http.post("/v1/score", json={"model": name, "text_1": TEXTS[0], "text_2": TEXTS[1:]}))
    assert scored["model"] == model
    scores = torch.tensor([row["score"] for row in scored["data"]])
    assert difference(scores, near) < NEAR
    body = {"model": name, "query": TEXTS[0], "documents": TEXTS[1:]}
    ranked = done(pooling.http.post("/v1/rerank", json=body))["results"]
    assert [row["index"] for row in ranked] == scores.argsort(descending=True).tolist()


def test_adapters_do_not_mix_in_a_batch_nor_versions_while_they_are_swapped(
    pooling: Server, folders: dict[str, Path], wanted: dict[str, Any]
):
    pooling.upload("swapped", folders["lora"]).raise_for_status()
    (first,), rounds = pooling.resident("swapped"), count()
    parts = {"swapped": "lora", **{name: name for name in (BASE, "dora", "causal")}}
    with ThreadPoolExecutor(len(parts)) as threads:

        def ask(name: str) -> list[tuple[str, Any]]:
            answers = [embedded(pooling, name)]
            while pooling.adapter("swapped")["live"] != 2 and next(rounds) < 10_000:
                answers.append(embedded(pooling, name))
            return [*answers, embedded(pooling, name)]

        asking = {name: threads.submit(ask, name) for name in parts}
        pooling.upload("swapped", folders["later"]).raise_for_status()
        answers = {name: each.result() for name, each in asking.items()}
    second = answers["swapped"][-1][0]
    assert first != second and {model for model, _ in answers["swapped"]} == {first, second}
    for name, told in answers.items():
        for model, vectors in told:
            assert difference(vectors, wanted["later" if model == second else parts[name]]) < NEAR, model


def test_what_these_routes_need_is_said_in_a_sentence(pooling: Server, folders: dict[str, Path], tmp_path: Path):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification

    def post(path: str, **body: Any) -> str:
        return refused(pooling.http.post(path, json={"model": "causal", **body}), 404)

    assert "pools (--runner pooling), and generates no text" in post("/v1/completions", prompt="ships", max_tokens=1)
    assert "labels come from a base with a classification head" in post("/v1/classify", input=TEXTS)
    head = AutoModelForSequenceClassification.from_pretrained(folders[BASE], dtype=torch.float32)
    peft_kinds.trained(head, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=TARGETS), tmp_path / "head", 9)
    assert "this base has none whose place it could take" in refused(pooling.upload("head", tmp_path / "head"), 422)


def test_a_canary_and_the_accounts_know_such_requests(pooling: Server, folders: dict[str, Path]):
    pooling.upload("tone", folders["lora"]).raise_for_status()
    pooling.upload("tone", folders["later"], promote=False).raise_for_status()
    done(pooling.http.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5}))
    assert embedded(pooling, "tone")[0] in {embedded(pooling, f"tone@v{version}")[0] for version in (1, 2)}
    assert pooling.adapter("tone")["canary"]["version"] == 2
    series = [line for line in pooling.http.get("/metrics").text.splitlines() if 'adapter="tone"' in line]
    assert any(line.startswith("loradock_requests_total") for line in series)
