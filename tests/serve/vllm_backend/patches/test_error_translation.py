"""vLLM's errors as those of this server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from serve.vllm_backend.patches.error_translation import answer_unknown_paths


def test_a_path_that_a_kind_of_model_does_not_have_is_a_404_in_openais_shape():
    app = FastAPI()
    init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.middleware_stack = app.build_middleware_stack()  # as vLLM leaves it, with SageMaker's pieces in it
    answer_unknown_paths(app, "smollm2", ["generate"])

    @app.post("/v1/own")
    def own() -> None:
        raise HTTPException(404, "vLLM's own word")

    client = TestClient(app)
    answer = client.post("/rerank", json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (404, "not_found_error")
    assert error["message"].startswith("smollm2 does not answer POST /rerank")
    assert "serve it with --runner pooling --convert embed" in error["message"], "what would answer it"
    assert client.post("/nothing").json()["error"]["message"].endswith("what a model answers depends on its kind")
    assert client.post("/v1/own").json()["error"]["message"] == "vLLM's own word", "its handlers stay"


@pytest.mark.parametrize(
    ("task", "path", "reason"),
    [
        ("embed", "/v1/completions", "its engine pools (--runner pooling), and generates no text"),
        ("embed", "/classify", "labels come from a base with a classification head, or from an adapter with one"),
        ("classify", "/v1/embeddings", "for embeddings serve it with --runner pooling --convert embed"),
        ("classify", "/v1/rerank", "its head has several labels; scores come from a head with one"),
    ],
)
def test_a_base_that_pools_says_why_it_does_not_answer(task, path, reason):
    app = FastAPI()
    answer_unknown_paths(app, "vectors", [task])
    told = TestClient(app).post(path, json={}).json()["error"]["message"]
    assert told.startswith(f"vectors does not answer POST {path}: ") and reason in told
