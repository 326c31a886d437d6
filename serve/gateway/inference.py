"""The ASGI endpoint for inference: auth > limits > router > engine > tap.

vLLM's own app answers; this stands before it, turns the public model name into the leased version's id, and keeps the
lease exactly as long as the response is open, however it ends. Two more things of a request are kept to its tenant:
the prefix cache that it may hit, and the stored responses that it may name.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from serve.asgi.cancellation import CancellableCall
from serve.asgi.exchange import Exchange, Tap, identified
from serve.asgi.fast_stream import FLOW, FastStream, Flow
from serve.auth.auth import Auth, Caller
from serve.auth.auth import Scope as KeyScope
from serve.auth.rate_limits import Meter, Meters
from serve.auth.token_usage import Usage
from serve.engine.engine import LOW_PRIORITY
from serve.errors import BadRequest, ClientLeft, ClientTooSlow, DeadlineExceeded, LoradockError, NotFound, TooLarge
from serve.gateway.router import Route, Router
from serve.names import DEFAULT
from serve.rollout.shadow import Kept, Shadows

log = logging.getLogger(__name__)

# What a client may reach of vLLM's app; its admin, lora and debugging routes stay unreachable.
PATHS = re.compile(
    r"/v1/(chat/completions(/batch)?|completions|responses|messages(/count_tokens)?|embeddings|score|rerank)"
    r"|/(tokenize|detokenize|pooling|classify|score|rerank|v2/rerank)"
)
STORED = re.compile(r"/v1/responses/(?P<id>[^/]+)(/cancel)?")
# Those that know no cache_salt, and fill no cache.
UNSALTED = re.compile(r"/(de)?tokenize|/v1/messages/count_tokens")
# Those that know no priority.
PLACELESS = re.compile(r"/(de)?tokenize|/v1/messages(/count_tokens)?")
# vLLM's header for the rank that is to answer.
RANK = b"x-data-parallel-rank"
MAX_BODY = 64 << 20
MAX_TIMEOUT = 86_400

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class Inference:
    """Every inference route."""

    def __init__(
        self,
        auth: Auth,
        router: Router,
        meters: Meters,
        take: Callable[[Exchange], None],
        shadows: Shadows | None = None,
        wants_logprobs: Callable[[str], bool] = lambda adapter: False,
        client_timeout: float = 60.0,
    ) -> None:
        self._client_timeout = client_timeout
        self._auth = auth
        self._router = router
        self._meters = meters
        self._take = take
        self._shadows = shadows
        self._wants_logprobs = wants_logprobs
        # Returns once this server sees every change that others made before.
        self.fresh: Callable[[], Awaitable[None]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse_socket(receive, send)
            return
        scope, request_id = identified(scope)
        pace = _Pace(receive, send, self._client_timeout, scope.get("extensions", {}).get(FLOW))
        tap = Tap(pace.send, request_id)
        try:
            await self._in_time(scope, pace, tap)
        except ClientTooSlow as error:
            if tap.begun:
                log.warning("%s broke off: %s", scope["path"], error)
            else:
                await answer_error(error, scope, receive, tap)
        except LoradockError as error:
            await answer_error(error, scope, receive, tap)
        finally:
            tap.offer(self._take)

    async def _in_time(self, scope: Scope, pace: _Pace, tap: Tap) -> None:
        """The answer, or DeadlineExceeded at the client's own deadline, which ends the work in the engine too."""
        seconds = _timeout(Headers(scope=scope))
        loop = asyncio.get_running_loop()
        due = None if seconds is None else loop.time() + seconds
        late = DeadlineExceeded(f"X-Request-Timeout: the answer was not whole after {seconds:g} s") if seconds else None
        limit = asyncio.timeout_at(due)
        try:
            async with limit:
                await self._answer(scope, pace, tap, limit, late)
        except TimeoutError as error:
            if late is None or not limit.expired():
                raise
            raise late from error

    async def _answer(
        self, scope: Scope, pace: _Pace, tap: Tap, limit: asyncio.Timeout, late: DeadlineExceeded | None
    ) -> None:
        receive: Receive = pace.receive
        path = scope["path"]
        stored = STORED.fullmatch(path)
        if not stored and not PATHS.fullmatch(path):
            raise NotFound(f"there is nothing at {path}: see /v1/models and the README for what there is")
        if self.fresh:
            await self.fresh()
        caller = self._auth.caller(Headers(scope=scope), KeyScope.INFERENCE)
        if stored:
            _check_response(stored["id"], caller.tenant)
        meter = self._meters.of(caller.key, caller.limits)
        usage = Usage(tap.send, meter) if meter else None
        sending = usage.send if usage else tap.send
        kept: Kept | None = None
        with meter.request() if meter else nullcontext():
            try:
                asked = await _Asked.read(scope, pace.read) if scope["method"] == "POST" and not stored else None
                if asked and meter and usage:
                    _check_countable(asked, meter)
                    usage.asked = len(asked.body)
                model, fields = (asked.model, asked.fields) if asked else (None, {})
                async with AsyncExitStack() as held:
                    async with _staying(receive if asked else None):
                        route = await held.enter_async_context(self._router.lease(model, caller, fields))
                    tap.routed(route, caller.tenant)
                    tap.watch.logprobs = self._wants_logprobs(route.adapter)
                    if asked:
                        fields = asked.rewritten(scope["path"], route, caller)
                        scope, receive = asked.replayed(_ranked(scope, route.rank), receive, fields)
                    if route.shadow and self._shadows:
                        kept = Kept(sending)
                        sending = kept.send
                    call = CancellableCall(receive, _Honest(sending).send, route.engine.failing)
                    fast_stream = tap.watch.fast_stream = FastStream.of(scope, fields, call.send)
                    with tap.watched(), route.engine.alarm(call.cut), _at(limit.when(), call, late):
                        limit.reschedule(None)  # from here on the app is told, so that it ends what it began
                        await call.run(route.app, scope, fast_stream.send if fast_stream else None)
            finally:
                if meter and usage and not stored:
                    meter.charge(usage.tokens)
        if kept and route.shadow and self._shadows:
            # As the engine got it, so within the caller's tenant; and on nobody's key.
            self._shadows.offer(route.shadow, int(route.version[1:]), scope, fields, kept)


@asynccontextmanager
async def _staying(receive: Receive | None) -> AsyncIterator[None]:
    """ClientLeft, if the client leaves before the block ends: who waits for a turn holds a place in line."""
    if receive is None:
        yield
        return
    left = asyncio.timeout(None)

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        left.reschedule(asyncio.get_running_loop().time())

    try:
        async with left:
            listening = asyncio.create_task(listen())
            try:
                yield
            finally:
                listening.cancel()
    except TimeoutError as error:
        if not left.expired():
            raise
        raise ClientLeft("the client left before it was its turn") from error


@contextmanager
def _at(due: float | None, call: CancellableCall, late: DeadlineExceeded | None) -> Iterator[None]:
    """The call ends at the deadline, if there is one."""
    if due is None or late is None:
        yield
        return
    timer = asyncio.get_running_loop().call_at(due, call.cut, late)
    try:
        yield
    finally:
        timer.cancel()


def _timeout(headers: Headers) -> float | None:
    """The client's X-Request-Timeout in seconds."""
    given = headers.get("x-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise BadRequest(f"X-Request-Timeout takes seconds above 0 and up to {MAX_TIMEOUT}, not {given[:40]!r}")
    return seconds


class _Pace:
    """A client that neither sends nor reads for so long is let go: it holds a connection, and a turn at the engine."""

    __slots__ = ("_flow", "_receive", "_seconds", "_send")

    def __init__(self, receive: Receive, send: Send, seconds: float, flow: Flow | None = None) -> None:
        self._flow = flow
        self._receive = receive
        self._send = send
        self._seconds = seconds

    @property
    def receive(self) -> Receive:
        """Whatever comes next, or its leave: it may take as long as it likes."""
        return self._receive

    async def read(self) -> Message:
        """A piece of the request's body."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._receive()
        except TimeoutError as error:
            raise ClientTooSlow(f"no more of the request came for {self._seconds:g} s: send it again") from error

    async def send(self, message: Message) -> None:
        if self._flow is not None and not self._flow.write_paused:  # then nothing waits in there
            await self._send(message)
            return
        patience = asyncio.timeout(self._seconds)
        try:
            async with patience:
                await self._send(message)
        except TimeoutError as error:
            if not patience.expired():
                raise
            raise ClientTooSlow(f"the client read nothing of its answer for {self._seconds:g} s") from error


class _Asked:
    """A JSON request body, read whole."""

    __slots__ = ("body", "fields", "model")

    def __init__(self, body: bytes) -> None:
        self.body = body
        try:
            self.fields = _decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"the request body is not a JSON object: {error}") from error
        priority = self.fields.get("priority", 0)
        if isinstance(priority, int) and not 0 <= priority < LOW_PRIORITY:
            raise BadRequest(
                f"priority takes 0 to {LOW_PRIORITY - 1}: 0 is a client's turn, more waits longer", param="priority"
            )
        model = self.fields.get("model")
        if model is not None and not isinstance(model, str):
            raise BadRequest("model takes a string: GET /v1/models lists the names", param="model")
        self.model = model or None

    @classmethod
    async def read(cls, scope: Scope, receive: Receive) -> _Asked:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client left before its request was whole")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > MAX_BODY:
                raise TooLarge(f"the request body is above {MAX_BODY >> 20} MiB")
            more = message.get("more_body", False)
        return cls(b"".join(chunks))

    def rewritten(self, path: str, route: Route, caller: Caller) -> dict[str, Any]:
        """The fields, asking for the route's model by the backend's name for it, within the caller's tenant."""
        changes = self._changes(path, route, caller.tenant)
        return {**self.fields, **changes} if changes else self.fields

    def replayed(self, scope: Scope, receive: Receive, fields: dict[str, Any]) -> tuple[Scope, Receive]:
        """The same request with these fields."""
        body = self.body
        if fields is not self.fields:
            body = _encode(fields)
            length = (b"content-length", str(len(body)).encode())
            headers = [h for h in scope["headers"] if h[0] not in (b"content-length", b"transfer-encoding")]
            scope = {**scope, "headers": [*headers, length]}
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return scope, replay

    def _changes(self, path: str, route: Route, tenant: str) -> dict[str, Any]:
        changes: dict[str, Any] = {} if route.model == self.model else {"model": route.model}
        asked = self.fields.get("priority", 0)
        if isinstance(asked, int) and route.priority not in (None, asked) and not PLACELESS.fullmatch(path):
            changes["priority"] = route.priority
        salt = None if UNSALTED.fullmatch(path) else salted(self.fields.get("cache_salt"), tenant)
        if salt is not None:
            changes["cache_salt"] = salt
        if path == "/v1/responses":
            previous = self.fields.get("previous_response_id")
            if isinstance(previous, str):
                _check_response(previous, tenant)
            if tenant != DEFAULT:
                changes["request_id"] = _response_id(tenant)
        return changes


def _ranked(scope: Scope, rank: int | None) -> Scope:
    """The request for a data-parallel rank, which is ours to choose and no client's."""
    headers = [header for header in scope["headers"] if header[0] != RANK]
    if rank is not None:
        headers.append((RANK, str(rank).encode()))
    return {**scope, "headers": headers} if headers != scope["headers"] else scope


def salted(salt: Any, tenant: str) -> str | None:
    """The cache_salt that the engine gets for a client's; None leaves the request as it is.

    It holds no @, as every adapter's id does, and begins with the tenant, whose name holds no colon: so no client can
    reach an adapter's part of the prefix cache, nor another tenant's. Without a salt the keys of tenant `default`
    share one cache, and each other tenant has its own: what is cached there shows in how fast an answer begins.
    """
    if isinstance(salt, str) and salt:
        return f"{tenant}:{hashlib.sha256(salt.encode('utf-8', 'surrogatepass')).hexdigest()[:48]}"
    # vLLM refuses what is neither a text nor null.
    return tenant if salt is None and tenant != DEFAULT else None


# A stored response lives in this process; so does what proves whose it is.
_SIGNING = secrets.token_bytes(32)
_SIGNED = re.compile(r"resp_(?P<nonce>[0-9a-f]{32})(?P<mark>[0-9a-f]{32})")


def _response_id(tenant: str, nonce: str = "") -> str:
    """A response's id that only this tenant may name again."""
    nonce = nonce or secrets.token_hex(16)
    return f"resp_{nonce}{hmac.new(_SIGNING, f'{nonce}{tenant}'.encode(), 'sha256').hexdigest()[:32]}"


def _check_response(id: str, tenant: str) -> None:
    """NotFound, if the stored response is not this tenant's; vLLM knows no tenants."""
    signed = _SIGNED.fullmatch(id)
    if tenant == DEFAULT:
        mine = not signed
    else:
        mine = signed is not None and hmac.compare_digest(id, _response_id(tenant, signed["nonce"]))
    if not mine:
        raise NotFound(f"Response with id '{id}' not found.", param="response_id")


def _check_countable(asked: _Asked, meter: Meter) -> None:
    if meter.counts_tokens and asked.fields.get("background"):
        raise BadRequest(
            "this key's tokens are limited, and a background response cannot be counted: ask without background",
            param="background",
        )


class _Honest:
    """Holds an answer's status back until its first bytes, so that an error before the first token is an HTTP error.

    vLLM opens a 200 stream and then writes the error into it.
    """

    __slots__ = ("_send", "_start", "_told")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._told = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._told:
            return
        if self._start is not None:
            start, self._start = self._start, None
            if start["status"] == 200 and message.get("body", b"").startswith(b'data: {"error"'):
                start, message = _unstreamed(start, message)
                self._told = True
            await self._send(start)
        await self._send(message)


def _unstreamed(start: Message, message: Message) -> tuple[Message, Message]:
    """A stream that opens with an error as the plain error that it is."""
    error = json.loads(message["body"].removeprefix(b"data: ").split(b"\n\n", 1)[0])
    code = error["error"].get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return (
        {**start, "status": status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    )


async def answer_error(error: LoradockError, scope: Scope, receive: Receive, tap: Tap) -> None:
    """The error as OpenAI's JSON, if the status has not gone out yet."""
    if tap.begun:
        log.warning("%s broke off: %s", scope["path"], error)
        if tap.events:
            await tap.send(
                {"type": "http.response.body", "body": _last_event(error, scope["path"]), "more_body": False}
            )
        return
    response = JSONResponse(error.body(), status_code=error.status, headers=error.headers())
    await response(scope, receive, tap.send)


def _last_event(error: LoradockError, path: str) -> bytes:
    """How a stream that has begun says that it ends here, as its API has it."""
    body = error.body()["error"]
    if path == "/v1/responses":
        return b"event: error\ndata: " + _encode({"type": "error", **body}) + b"\n\n"
    if path == "/v1/messages":
        return b"event: error\ndata: " + _encode({"type": "error", "error": body}) + b"\n\n"
    return b"data: " + _encode({"error": {**body, "code": error.status}}) + b"\n\n"


async def _refuse_socket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1000, "reason": "this server speaks HTTP"})
