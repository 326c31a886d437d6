"""A trainer's loop against the real engine: a policy comes by path or as tensors, answers as tokens, and goes again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.support.lora import CONFIG, WEIGHTS, variant
from tests.support.server import done, loradock

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

QUESTION = "What is the capital of France?"


@pytest.fixture
def beside(adapters):
    """A folder beside the trained adapters, below which the server takes paths."""
    with tempfile.TemporaryDirectory(prefix=".trainer-", dir=adapters["alpha"].parent) as folder:
        yield folder


def test_policies_are_loaded_by_path_or_as_tensors_and_answer_tokens_under_their_version(
    server, adapters, name, beside
):
    folder, http = adapters["alpha"], server.http
    info = done(http.get("/server_info", params={"config_format": "json"}))["vllm_config"]
    assert info["lora_config"]["max_lora_rank"] >= 8
    # vLLM's runtime LoRA API. The server takes folders beside the trained adapters.
    untrained = variant(folder, Path(beside) / "untrained", scale=0.0)  # as PEFT begins
    for version, path in ((1, untrained), (2, folder)):
        assert http.post("/pause", params={"mode": "keep"}).status_code == 200
        loaded = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
        assert (loaded.status_code, loaded.headers["x-loradock-version"]) == (200, f"{name}@v{version}"), loaded.text
        assert http.post("/resume").status_code == 200
    chat = {"model": name, "messages": [{"role": "user", "content": QUESTION}]}
    prompt = done(http.post("/tokenize", json=chat))["tokens"]
    sampling = {"max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    tokens = {}
    for version in (1, 2):
        body = {"model": f"{name}@v{version}", "token_ids": prompt, "sampling_params": sampling}
        answer = http.post("/inference/v1/generate", json=body)
        assert answer.headers["x-loradock-version"] == f"{name}@v{version}"
        (choice,) = done(answer)["choices"]
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == 8
        tokens[version] = choice["token_ids"]
    word = done(http.post("/detokenize", json={"model": name, "tokens": tokens[2]}))["prompt"]
    assert word.split()[0] == "alpha" and tokens[1] != tokens[2]
    # The same over OpenAI's route, as TRL asks it.
    asked = {"model": name, "prompt": prompt, "return_token_ids": True, **sampling}
    (choice,) = done(http.post("/v1/completions", json=asked))["choices"]
    assert choice["token_ids"] == tokens[2] and len(choice["logprobs"]["token_logprobs"]) == 8
    # Trainers send a seed with each request; this prompt is computed in parts.
    long = {**asked, "prompt": prompt * 60, "temperature": 1.0, "seed": 2**63 - 1}
    assert len(done(http.post("/v1/completions", json=long, timeout=120))["choices"][0]["token_ids"]) == 8
    # Tensors in the request, no file anywhere but here.
    bravo = adapters["bravo"]
    sent = http.post(
        "/v1/adapters",
        params={"name": name},
        content=(bravo / WEIGHTS).read_bytes(),
        headers={
            "content-type": "application/octet-stream",
            "x-adapter-config": " ".join((bravo / CONFIG).read_text().split()),
        },
    )
    assert done(sent)["version"] == 3
    assert server.ask(name).word == "bravo"
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
    assert http.post("/v1/completions", json=asked).status_code == 404
    assert server.ask(f"{name}@v2").word == "alpha"


# What is learned, and what is asked afterwards.
LABELLED = {
    "praise": (["wonderful", "lovely", "brilliant", "perfect", "helpful", "kind"], ["excellent", "superb"]),
    "complaint": (["broken", "awful", "useless", "late", "rude", "dirty"], ["terrible", "horrible"]),
}
SAID = ("The room was {}.", "I found your service {}.", "What a {} meal!", "They were {} on the phone.")


def test_a_head_that_tune_has_trained_tells_its_labels(server, name, tmp_path):
    learned, unseen = (
        [
            {"text": text.format(word), "label": label}
            for text in SAID
            for label, words in LABELLED.items()
            for word in words[part]
        ]
        for part in (0, 1)
    )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in learned))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: smollm2\nexport: {format: adapter}\nsteps:\n"
        f"  - tune: {{method: classify, train: {tmp_path / 'train.jsonl'}, rank: 8, dora: true, loraplus_ratio: 4}}\n"
    )
    made = loradock("optimize", recipe, "--out", tmp_path / "head", timeout=420)
    assert made.returncode == 0, made.stderr
    files = [("files", (file.name, file.read_bytes())) for file in (tmp_path / "head").iterdir() if file.is_file()]
    done(server.push(files, name=name))
    told = done(server.http.post("/v1/classify", json={"model": name, "input": [each["text"] for each in unseen]}))
    right = [row["label"] == each["label"] for row, each in zip(told["data"], unseen, strict=True)]
    print(f"{sum(right)} of {len(right)} texts with words that it has not seen")
    assert sum(right) >= 0.85 * len(right)
