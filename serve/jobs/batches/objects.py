"""Files and batches as OpenAI's API shows them (https://platform.openai.com/docs/api-reference/batch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
# Purposes of files: those that clients send, and what becomes of a batch.
INPUT = "batch"
OUTPUT = "batch_output"
EXAMPLES = "fine-tune"
SENT = (INPUT, EXAMPLES)


class Status(StrEnum):
    """Where a batch is."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


# Not at their end.
OPEN = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a tenant. Times are seconds since 1970."""

    id: str
    tenant: str
    who: str
    purpose: str
    filename: str
    nbytes: int
    created: float
    expires: float

    def described(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.nbytes,
            "created_at": int(self.created),
            "expires_at": int(self.expires),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a line of an input cannot be asked; `line` counts from 1, None means the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def described(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens; `cached` of the prompts' came from the prefix cache."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def described(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.generated,
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as the database has it. `times` says when it came to which status; `key` is the id of its key."""

    id: str
    tenant: str
    key: str
    who: str
    status: Status
    endpoint: str
    input_file: str
    completion_window: str
    metadata: Mapping[str, str] | None
    created: float
    expires: float
    file_seconds: float
    times: Mapping[str, float] = field(default_factory=dict)
    errors: Sequence[LineError] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = Usage()
    output_file: str | None = None
    error_file: str | None = None

    def described(self) -> dict[str, Any]:
        """For the API."""
        errors = [error.described() for error in self.errors]
        reached = {f"{status}_at": self._when(status) for status in Status if status is not Status.VALIDATING}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file,
            "error_file_id": self.error_file,
            "created_at": int(self.created),
            "expires_at": int(self.expires),
            **reached,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": self.usage.described(),
            "metadata": self.metadata,
        }

    def _when(self, status: Status) -> int | None:
        when = self.times.get(status.value)
        return None if when is None else int(when)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may keep and have answered. Seconds, bytes and lines; `line_bytes` is the longest line."""

    file_bytes: int = 200 << 20
    tenant_files: int = 1000
    tenant_bytes: int = 5 << 30
    lines: int = 50_000
    line_bytes: int = 4 << 20
    open: int = 16
    window_hours: int = 24
    file_seconds: float = 30 * 86_400.0
    # Lines that one engine answers at a time while no client is answered.
    concurrency: int = 4
