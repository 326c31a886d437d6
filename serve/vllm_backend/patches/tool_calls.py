"""A tool call that is cut at `max_tokens` is no text for the client.

vLLM's parser of such calls (`hermes`) reads a whole answer by JSON alone: what it cannot read is the answer's text,
with `<tool_call>` and half of the JSON in it. A stream of the same answer holds that back; so does this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def extract_tool_calls(original: Callable[..., Any], self: Any, model_output: str, request: Any) -> Any:
    """vLLM's, of what stands before a call that was cut; whole calls before it count."""
    from vllm.tool_parsers.utils import is_complete_json, partial_tag_overlap

    begin, end = self.tool_call_start_token, self.tool_call_end_token
    start = model_output.rfind(begin)
    if start >= 0:
        body = model_output[start + len(begin) :]
        cut = end not in body and not is_complete_json(body.strip())
        kept = model_output[:start].rstrip() if cut else model_output
    elif getattr(request, "tool_choice", None) in (None, "auto", "none"):
        kept = model_output  # an answer may end with "<"
    else:
        kept = model_output[: len(model_output) - partial_tag_overlap(model_output, begin)]
    return original(self, kept, request)
