"""What can go wrong, and what an HTTP client sees of it.

    LoradockError
    |- ConfigError             (exit 2)  the command line, the file or the environment asks for what cannot be
    |- BadRequest              (400)     the request does not have the form that this route takes
    |  `- AdapterRejected      (422)     the bytes arrived, and are not an adapter that this base model can run
    |- Unauthorized            (401)     no key, or one that nobody issued
    |- Forbidden               (403)     the key is good, its scope is not
    |- NotFound                (404)     no such model, adapter, version or route
    |- MethodNotAllowed        (405)     the path is there, and takes other methods
    |- ClientTooSlow           (408)     it let the server wait, while it sent its request or read the answer
    |- Conflict                (409)     the change does not fit what is there now
    |- TooLarge                (413)     more bytes than this server takes
    |- RateLimited             (429)     this key has had its share; `retry_after` seconds from now there is more
    |- QuotaExceeded           (429)     this key's tenant keeps as many adapters as it may; waiting does not help
    |- OutOfSpace              (507)     the disk cannot hold it
    |- ClientLeft              (499)     before it was its turn; nobody reads this
    |- DeadlineExceeded        (504)     the client's own X-Request-Timeout is over
    |- Overloaded              (429)     it would wait too long in line; `retry_after` seconds from now it would not
    `- EngineUnavailable       (503)     the engine is starting, draining or gone; `retry_after` seconds from now may do

Every message is a sentence to whoever must act: what came, what is taken, what to do next.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LoradockError(Exception):
    """The root: knows its HTTP status, and OpenAI's `type`, `code` and `param`."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param

    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the answer."""
        return {}

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ConfigError(LoradockError):
    """Settings that cannot be served."""

    type = "config_error"


class BadRequest(LoradockError):
    status = 400
    type = "invalid_request_error"


class AdapterRejected(BadRequest):
    """An upload that is not an adapter for this base; `problems` lists what did not fit, by name."""

    status = 422
    type = "adapter_rejected"

    def __init__(self, message: str, *, problems: list[str] | None = None, code: str | None = None) -> None:
        super().__init__(message, code=code, param="files")
        self.problems = problems or []

    def body(self) -> dict[str, Any]:
        body = super().body()
        if self.problems:
            body["error"]["problems"] = self.problems
        return body


class Unauthorized(LoradockError):
    status = 401
    type = "authentication_error"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(LoradockError):
    status = 403
    type = "permission_error"


class NotFound(LoradockError):
    status = 404
    type = "not_found_error"


class MethodNotAllowed(LoradockError):
    status = 405
    type = "invalid_request_error"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self._allow = allow

    def headers(self) -> dict[str, str]:
        return {"Allow": self._allow}


class ClientTooSlow(LoradockError):
    status = 408
    type = "invalid_request_error"


class ClientLeft(LoradockError):
    status = 499
    type = "invalid_request_error"


class Conflict(LoradockError):
    status = 409
    type = "conflict_error"


class TooLarge(LoradockError):
    status = 413
    type = "invalid_request_error"


class RateLimited(LoradockError):
    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after
        self._headers = headers or {}

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after), **self._headers}


class QuotaExceeded(LoradockError):
    status = 429
    type = "insufficient_quota"


class OutOfSpace(LoradockError):
    status = 507
    type = "insufficient_storage"


class DeadlineExceeded(LoradockError):
    status = 504
    type = "timeout_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="deadline_exceeded")


class EngineUnavailable(LoradockError):
    status = 503
    type = "service_unavailable"

    def __init__(self, message: str, *, retry_after: int = 5) -> None:
        super().__init__(message, code="engine_unavailable")
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class Overloaded(LoradockError):
    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}
