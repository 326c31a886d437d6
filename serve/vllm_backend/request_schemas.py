"""What vLLM's routes take, as JSON schemas of its own request models.

tests/serve/vllm_backend/test_request_schemas.py holds the table against vLLM's routers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import TypeAdapter

# path -> (module below vllm.entrypoints, the type of the body)
REQUESTS = {
    "/v1/chat/completions": ("openai.chat_completion.protocol", "ChatCompletionRequest"),
    "/v1/chat/completions/batch": ("openai.chat_completion.protocol", "BatchChatCompletionRequest"),
    "/v1/completions": ("openai.completion.protocol", "CompletionRequest"),
    "/v1/responses": ("openai.responses.protocol", "ResponsesRequest"),
    "/v1/messages": ("anthropic.protocol", "AnthropicMessagesRequest"),
    "/v1/messages/count_tokens": ("anthropic.protocol", "AnthropicCountTokensRequest"),
    "/v1/embeddings": ("pooling.embed.protocol", "EmbeddingRequest"),
    "/pooling": ("pooling.pooling.protocol", "PoolingRequest"),
    "/classify": ("pooling.classify.protocol", "ClassificationRequest"),
    "/score": ("pooling.scoring.protocol", "ScoreRequest"),
    "/v1/score": ("pooling.scoring.protocol", "ScoreRequest"),
    "/rerank": ("pooling.scoring.protocol", "RerankRequest"),
    "/v1/rerank": ("pooling.scoring.protocol", "RerankRequest"),
    "/v2/rerank": ("pooling.scoring.protocol", "RerankRequest"),
    "/inference/v1/generate": ("scale_out.token_in_token_out.protocol", "GenerateRequest"),
    "/tokenize": ("serve.tokenize.protocol", "TokenizeRequest"),
    "/detokenize": ("serve.tokenize.protocol", "DetokenizeRequest"),
}


def request_type(path: str) -> Any:
    """vLLM's type of the body that this path takes."""
    module, name = REQUESTS[path]
    return getattr(import_module(f"vllm.entrypoints.{module}"), name)


def request_schemas(reference: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(schema by path, schemas that these refer to by name). `reference` has {model} where the name goes."""
    adapters = [(path, "validation", TypeAdapter(request_type(path))) for path in REQUESTS]
    by_path, definitions = TypeAdapter.json_schemas(adapters, ref_template=reference)  # type: ignore[arg-type]
    return {path: schema for (path, _), schema in by_path.items()}, definitions.get("$defs", {})
