"""The ASGI endpoint for inference: auth > rate limits > router > engine > tap.

vLLM's own app answers; this stands before it, turns the public model name into the leased version's id, and keeps the
lease exactly as long as the response is open, however it ends.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from serve.adapters.fair_threads import in_the_name_of
from serve.asgi.cancellation import CancellableCall, Deadline, cancelled_on_disconnect
from serve.asgi.connection import has_left, recognise
from serve.asgi.error_response import HonestStatus, send_error
from serve.asgi.error_shapes import AnthropicErrors, is_anthropic
from serve.asgi.exchange import Exchange, Tap, identified
from serve.asgi.fast_stream import FastStream
from serve.asgi.internal_client import RecordedAnswer
from serve.asgi.pacing import PacedConnection
from serve.asgi.request_body import read
from serve.asgi.trace_context import trace_of
from serve.auth.auth import Auth, Caller
from serve.auth.auth import Scope as KeyScope
from serve.auth.rate_limits import Meter, Meters, RateLimitHeaders
from serve.engine.payer import Cause, Payer
from serve.errors import BadRequest, ClientLeft, ClientTooSlow, EngineUnavailable, LoradockError
from serve.gateway.auto import Auto
from serve.gateway.fan_out import FanOut, RequestBounds
from serve.gateway.forwarding import is_sent_on
from serve.gateway.guard import Guards
from serve.gateway.reading import Reading
from serve.gateway.request import (
    COUNTS_TOKENS,
    INVOCATIONS,
    RENAMED,
    RESPONSES,
    InferenceRequest,
    body_limit,
    for_engine,
    requested_timeout,
    stored_response,
)
from serve.gateway.router import Route, Router
from serve.gateway.tenant_isolation import check_response_owner
from serve.rollout.canary.shadow import MAX_ANSWER, Shadows
from serve.rollout.registry_sync import RegistrySync
from serve.telemetry.tracing.tracing import Tracing

log = logging.getLogger(__name__)


@dataclass(slots=True)
class InFlight:
    """A request on its way: who asks, with which body, and where the answer goes."""

    caller: Caller
    payer: Payer
    request: InferenceRequest | None
    seats: int
    receive: Receive
    send: Send
    tap: Tap
    deadline: Deadline
    # A guard has put something of its own in the answer's way.
    is_guarded: bool = False

    @asynccontextmanager
    async def wanted(self) -> AsyncIterator[None]:
        """Beside the engine's call: ends at the deadline, and when the client leaves."""
        self.deadline.resume()
        async with cancelled_on_disconnect(self.receive):
            yield


class Inference:
    """Every inference route: the connection, the trace, the deadline, and an error's answer.

    `take` gets an Exchange of each request when it has ended. With a `follower` of a shared registry, a request sees
    every change that other servers made before it. `client_timeout` is how long a client may keep the server waiting.
    """

    def __init__(
        self,
        intake: Intake,
        take: Callable[[Exchange], None],
        tracing: Tracing | None = None,
        follower: RegistrySync | None = None,
        client_timeout: float = 60.0,
    ) -> None:
        self.intake = intake
        self._take = take
        self._tracing = tracing
        self._follower = follower
        self._client_timeout = client_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse_socket(receive, send)
            return
        scope, request_id = identified(scope)
        connection = PacedConnection(scope, receive, send, self._client_timeout)
        trace = self._tracing.begin(scope) if self._tracing else None
        trace_id = trace.trace_id if trace and trace.sampled else trace_of(scope)
        tap = Tap(connection.send, request_id, trace_id, trace)
        try:
            async with Deadline(requested_timeout(Headers(scope=scope))) as deadline:
                if self._follower:
                    await self._follower.fresh()
                    tap.registry_was_read(self._follower.age)
                    self._follower.check_age()
                    if self._follower.age is not None and is_sent_on(scope):
                        raise EngineUnavailable("this home cannot look at the registry: another server may know more")
                await self.intake.answer(scope, connection, tap, deadline)
        except ClientTooSlow as error:
            tap.failed(error)
            if tap.begun:
                log.warning("%s broke off: %s", scope["path"], error)
            else:
                await send_error(error, scope, receive, tap)
        except LoradockError as error:
            await self._refuse(error, scope, receive, tap)
        except Exception:
            tap.crashed()
            raise
        finally:
            tap.offer(self._take)

    async def _refuse(self, error: LoradockError, scope: Scope, receive: Receive, tap: Tap) -> None:
        # In a frame of its own: one that the error came through would hold it, and with it the body, until garbage is
        # collected.
        answer = self._follower.doubted(error) if self._follower else error
        tap.failed(answer)
        await send_error(answer, scope, receive, tap)


class Intake:
    """Judges the caller and reads the request, before the forwarder has it answered.

    `bounds` say how much one request may ask for, `media` that images or sound may come with it. `resolver` may have a
    model registered that nobody knows yet.
    """

    def __init__(
        self,
        auth: Auth,
        meters: Meters,
        router: Router,
        forwarder: Forwarder,
        bounds: RequestBounds | None = None,
        media: bool = False,
        resolver: Resolver | None = None,
        *,
        auto: Auto,
    ) -> None:
        self.forwarder = forwarder
        self.resolver = resolver
        self._auth = auth
        self._auto = auto
        self._meters = meters
        self._router = router
        self._bounds = bounds or RequestBounds()
        self._media = media

    async def answer(self, scope: Scope, connection: PacedConnection, tap: Tap, deadline: Deadline) -> None:
        arrived = scope
        if path := RENAMED.get(scope["path"]):
            scope = {**scope, "path": path}
        stored = stored_response(scope["method"], scope["path"])
        headers = Headers(scope=scope)
        caller = self._auth.caller(headers, KeyScope.INFERENCE)
        recognise(scope)
        if stored is not None:
            check_response_owner(stored, caller.tenant)
        meter = self._meters.of(caller.key, caller.limits)
        metered = meter.request() if meter else nullcontext()
        with in_the_name_of(caller.tenant), metered, self._meters.bodies.held(caller.tenant) as take:
            request, fan_out = None, FanOut()
            if stored is None:
                limit = body_limit(scope["path"], self._media)
                request = InferenceRequest(await read(connection.read, headers, limit, scope["path"], take))
                if scope["path"] == INVOCATIONS:
                    scope = {**scope, "path": request.invoked(headers)}
                tap.asked(request.fields, len(request.body))
                request.check(scope["path"])
                await self._bring_unknown(request, caller)
                tap.chose(self._auto.settle(request, scope["path"], caller))
                fan_out = FanOut.of(scope["path"], request.fields, len(request.body))
                fan_out.check(self._bounds.of(caller.limits))
                if meter:
                    _check_countable(request, meter)
            send = RateLimitHeaders(tap.send, meter).send if meter else tap.send
            payer = Payer(caller.tenant, Cause.REQUEST, meter)
            in_flight = InFlight(caller, payer, request, fan_out.seats, connection.receive, send, tap, deadline)
            if not await self._answered_at_home(arrived, in_flight):
                await self.forwarder.answer(scope, in_flight)

    async def _answered_at_home(self, scope: Scope, in_flight: InFlight) -> bool:
        """Whether the request was another server's to answer, and that one did. It is charged where it is answered."""
        request = in_flight.request
        tap = in_flight.tap
        forwarding = self._router.forwarding
        if request is None or forwarding is None:
            return False
        peer = self._router.peer(request.model, in_flight.caller, scope)
        if peer is None:
            return False
        forwarded = forwarding.call(peer, request.body, tap.request_id.echo)
        registry_age = tap.registry_age
        tap.registry_was_read(None)  # how old what the other one knows is, it says itself
        call = CancellableCall(in_flight.receive, tap.send, lambda: None)
        try:
            with in_flight.deadline.hand_over(call):
                await call.run(forwarded, scope)
        finally:
            forwarding.ended(forwarded)
        in_flight.deadline.resume()
        if not forwarded.taken:
            tap.registry_was_read(registry_age)
            return False
        tap.leave_out()
        if meter := in_flight.payer.meter:
            meter.give_back()
        return True

    async def _bring_unknown(self, request: InferenceRequest, caller: Caller) -> None:
        """Have a model that nobody knows looked for elsewhere, before it is a 404."""
        if self.resolver is None:
            return
        for name in filter(None, (request.model, *request.fallbacks)):
            if self._router.knows(name, caller) or await self.resolver.bring(name, caller):
                return


class Resolver(Protocol):
    async def bring(self, name: str, caller: Caller) -> bool:
        """Have the model registered; whether it is there then."""


class Forwarder:
    """Has a request answered by the engine and version that it is routed to, past the model's guards."""

    def __init__(
        self, router: Router, guards: Guards | None, shadows: Shadows, wants_logprobs: Callable[[str], bool]
    ) -> None:
        self._router = router
        self._guards = guards
        self._shadows = shadows
        self._wants_logprobs = wants_logprobs

    async def answer(self, scope: Scope, in_flight: InFlight) -> None:
        send = in_flight.send
        async with self._guarded(scope["path"], in_flight) as in_flight.send:
            in_flight.is_guarded = in_flight.send is not send
            await self._answer_leased(scope, in_flight)

    @asynccontextmanager
    async def _guarded(self, path: str, in_flight: InFlight) -> AsyncIterator[Send]:
        """Where the answer goes, past the guards of the model that is asked."""
        request = in_flight.request
        caller = in_flight.caller
        payer = in_flight.payer
        send = in_flight.send
        if self._guards is None or request is None or COUNTS_TOKENS.fullmatch(path):
            yield send
            return
        name, watch = self._guards.watched(self._router.names_of(request.model, caller)), in_flight.tap.watch
        if name is None:
            yield send
            return
        base = self._router.base_of(request.model, caller)
        reading = Reading(base, path, request.unanswered(path, base.name, caller.tenant))
        background = bool(request.fields.get("background"))
        async with self._guards.over(name, payer, reading, watch, send, in_flight.wanted, background) as guarded:
            yield guarded

    async def _answer_leased(self, scope: Scope, in_flight: InFlight) -> None:
        """The answer of whichever engine and version the request is routed to; and a shadow's, if it has one."""
        request = in_flight.request
        caller = in_flight.caller
        tap = in_flight.tap
        if has_left(scope):
            raise ClientLeft("the client left before its request was looked at")
        async with self._leased(in_flight) as route:
            tap.routed(route, caller.tenant, self._wants_logprobs(route.adapter))
            fields: Mapping[str, Any] = {}
            receive, send = in_flight.receive, in_flight.send
            if is_anthropic(scope["path"]):
                send = AnthropicErrors(send).send
            scope = for_engine(scope, route)
            if tap.trace:
                scope = tap.trace.forwarded(scope)
            if request:
                fields = request.rewritten(scope["path"], route, caller.tenant)
                if scope["path"] == RESPONSES:
                    self._router.answered(fields["request_id"], route)
                scope, receive = request.replay(scope, receive, fields)
            recorded = RecordedAnswer(MAX_ANSWER, send) if route.shadow else None
            if recorded:
                send = recorded.send
            call = CancellableCall(receive, HonestStatus(send).send, route.engine.failing)
            seen = recorded is not None or in_flight.is_guarded  # somebody looks at each piece of the answer
            fast_stream = FastStream.of(scope, fields, call.send, None if seen else call)
            tap.streams(fast_stream)
            with route.lease.watched(tap.watch), route.engine.alarm(call.cut), in_flight.deadline.hand_over(call):
                await call.run(route.app, scope, fast_stream.send if fast_stream else None)
        if recorded and route.shadow:
            # As the engine got it, so within the caller's tenant; and on nobody's key.
            live, path = int(route.version[1:]), scope["path"]
            seats = in_flight.seats
            self._shadows.offer(route.shadow, live, path, fields, recorded, seats, tap.watch, tap.trace)

    @asynccontextmanager
    async def _leased(self, in_flight: InFlight) -> AsyncIterator[Route]:
        """The request's route, held until the block ends. A client that leaves before it is there loses its place."""
        request = in_flight.request
        caller = in_flight.caller
        payer = in_flight.payer
        tap = in_flight.tap
        tap.queued(caller.tenant, caller.key)
        async with AsyncExitStack() as held:
            if request is None:
                lease = self._router.lease(None, caller, payer, addressed=tap.addressed)
                yield await held.enter_async_context(lease)
                return
            async with cancelled_on_disconnect(in_flight.receive):
                fields, seats = request.fields, in_flight.seats
                lease = self._router.lease(request.model, caller, payer, fields, seats, tap.addressed)
                route = await held.enter_async_context(lease)
            yield route


def _check_countable(request: InferenceRequest, meter: Meter) -> None:
    if meter.counts_tokens and request.fields.get("background"):
        raise BadRequest(
            "this key's tokens are limited, and a background response cannot be counted: ask without background",
            param="background",
        )


async def _refuse_socket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1000, "reason": "this server speaks HTTP"})
