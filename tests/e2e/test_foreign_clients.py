"""Others' programs and the real engine: TRL, lm-eval, instructor, vLLM's benchmark; operators by their requests."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.models.embedded import ensure
from tests.support import foreign
from tests.support.gateway import Gateway
from tests.support.lora import WORDS, variant
from tests.support.server import ADMIN, BASE, KEY, bearer
from tests.support.vllm_clients import LOAD, UNLOAD, ProductionStack, aibrix_loads, aibrix_unloads, kubeai_asks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHOOSES = """
task: chooses
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["alpha alpha alpha", "bravo bravo bravo"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "alpha alpha"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, temperature: 0}}
filter_list: [{{name: words, filter: [{{function: regex, regex_pattern: "(alpha alpha)"}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = ("What is the capital of France?", "Name a river in Africa.", "Why is the sky blue?")


@pytest.fixture
async def operator(server) -> Iterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, headers=bearer(ADMIN), timeout=120) as client:
        yield client


def test_trl_trains_on_answers_of_the_policy_that_it_has_just_published(server, adapters, tmp_path):
    """TRL's own client, rollouts and order of publishing; the rollouts never stop while policies come and go."""
    with (
        tempfile.TemporaryDirectory(prefix=".trl-", dir=adapters["alpha"].parent) as folder,
        Gateway(server.url, ADMIN) as gateway,
    ):
        untrained = variant(adapters["alpha"], Path(folder) / "untrained", scale=0.0)  # as PEFT begins
        policies = (untrained, adapters["alpha"], adapters["bravo"])
        words = (gateway.url, ensure(BASE), folder, 6, *policies)
        try:
            done = foreign.run("trl_training", *words, folder=tmp_path, TRL_EXPERIMENTAL_SILENCE="1")
            unloaded = server.http.post("/v1/completions", json={"model": "trl-policy-v1", "prompt": [1]})
        finally:
            for version in range(1, len(policies) + 1):
                server.http.delete(f"/v1/adapters/trl-policy-v{version}")
    assert done["adapters_alone"] is True and done["max_model_len"] == 4096
    assert "rollout/vllm_retry_total" not in done["counted"], "each request was answered at once"
    for rollout in done["rollouts"]:
        # A rollout is counted to the policy of its group's beginning; its answer may be of the next one.
        may_say = [{None, "alpha"}, {"alpha", "bravo"}, {"bravo"}][rollout["version"] - 1]
        assert word_of(rollout["text"]) in may_say, rollout
        chances = [value for value, answered in zip(rollout["logprobs"], rollout["answered"], strict=True) if answered]
        assert len(rollout["tokens"]) == len(rollout["answered"]) and 1 <= len(chances) <= 8
        assert all(math.isfinite(value) and value < 1e-6 for value in chances)
        assert any(chances) or rollout["version"] > 1, "the trained policies are sure of their words"
    said = [(rollout["version"], word_of(rollout["text"])) for rollout in done["rollouts"]]
    assert {(1, None), (2, "alpha"), (3, "bravo")} <= set(said)
    assert unloaded.status_code == 404, "max_staleness is 1"


def word_of(text: str) -> str | None:
    return next((word for word in WORDS if text.split()[:1] == [word]), None)


def test_lm_eval_scores_an_adapter_over_http(server, voice, tmp_path):
    """Choices by the log-probabilities of prompts, and texts; the adapter by chats too."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": question}) + "\n" for question in QUESTIONS))
    for name, task in (("chooses", CHOOSES), ("answers", ANSWERS)):
        (tmp_path / f"{name}.yaml").write_text(task.format(file=rows))
    shared = {"tokenizer": str(ensure(BASE)), "num_concurrent": 3, "max_retries": 1, "max_length": 4096}
    texts = {"base_url": f"{server.url}/v1/completions", "tokenizer_backend": "huggingface", **shared}
    chats = {"base_url": f"{server.url}/v1/chat/completions", **shared}
    calls = [
        {"model": "local-completions", "model_args": {**texts, "model": BASE}, "tasks": ["chooses"]},
        {"model": "local-completions", "model_args": {**texts, "model": voice}, "tasks": ["chooses", "answers"]},
        {
            "model": "local-chat-completions", "model_args": {**chats, "model": voice}, "tasks": ["answers"],
            "apply_chat_template": True,
        },
    ]  # fmt: skip
    (tmp_path / "asked.json").write_text(json.dumps({"folder": str(tmp_path), "calls": calls}))
    base, adapter, chat = foreign.run("lm_eval_scores", "asked.json", folder=tmp_path, OPENAI_API_KEY=KEY)
    assert 0 <= base["chooses"]["acc,none"] <= 1
    assert adapter["chooses"]["acc,none"] == 1
    assert adapter["answers"]["exact_match,words"] == chat["answers"]["exact_match,words"] == 1


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllms_own_benchmark_has_no_failed_request(server, voice, faint, tmp_path, backend):
    path = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}[backend]
    sizes = ["--random-input-len", "48", "--random-output-len", "8", "--num-prompts", "12", "--max-concurrency", "6"]
    result = foreign.run(
        "vllm_bench", "--backend", backend, "--base-url", server.url, "--endpoint", path, "--model", BASE,
        "--tokenizer", ensure(BASE), "--dataset-name", "random", *sizes, "--lora-modules", voice, faint,
        "--lora-assignment", "round-robin", "--ignore-eos", "--disable-tqdm", folder=tmp_path, OPENAI_API_KEY=KEY,
    )  # fmt: skip
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 8 and result["mean_ttft_ms"] > 0


def test_instructor_gets_objects_by_their_schema(server, voice, tmp_path):
    """The short set of client libraries; the long one is `make clients`."""
    told = {"URL": f"{server.url}/v1", "KEY": KEY, "MODEL": BASE, "ADAPTER": voice}
    answers = foreign.run("python_clients", "instructor", folder=tmp_path, package="tests.support.clients", **told)
    assert answers["structured"]


async def test_aibrixs_sequence(server, operator, adapters, name):
    path = str(adapters["alpha"])
    assert await aibrix_loads(operator, name, path)
    assert server.ask(name).word == "alpha"
    assert not await aibrix_loads(operator, name, path)
    await aibrix_unloads(operator, name)
    assert await aibrix_loads(operator, name, path)
    assert server.ask(name).word == "alpha"


async def test_production_stacks_sequence(server, operator, adapters, name):
    stack = ProductionStack(operator)
    for _ in range(2):
        await stack.loads(name, str(adapters["bravo"]))
    assert name in await stack.registrations()
    assert server.ask(name).word == "bravo"
    await stack.unloads(name)
    assert name not in await stack.registrations()
    assert server.http.post("/v1/completions", json={"model": name, "prompt": "x"}).status_code == 404


async def test_kubeais_sequence(server, operator, adapters, name):
    assert await kubeai_asks(operator, LOAD, lora_name=name, lora_path=str(adapters["charlie"]))
    assert server.ask(name).word == "charlie"
    assert await kubeai_asks(operator, UNLOAD, lora_name=name)
    assert not await kubeai_asks(operator, UNLOAD, lora_name=name)
