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
    answer_unknown_paths(app, "smollm2")

    @app.post("/v1/own")
    def own() -> None:
        raise HTTPException(404, "vLLM's own word")

    client = TestClient(app)
    answer = client.post("/rerank", json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (404, "not_found_error")
    assert error["message"].startswith("smollm2 does not answer POST /rerank")
    assert client.post("/v1/own").json()["error"]["message"] == "vLLM's own word", "its handlers stay"
