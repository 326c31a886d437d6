"""What comes in, counted by adapter: empty and overlong prompts, languages, personal data, refusals.

An observer of an exchange worker. It looks at the last message of the user as the client sent it, without template and
system prompt, and keeps numbers alone. Labels are the names of adapters that exist, and fixed sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.asgi.exchange import Exchange
from serve.models.refusals import refuses
from serve.telemetry.personal_data import personal_data

OTHER, UNKNOWN = "other", "unknown"
EMPTY, OVER_CONTEXT, CONTEXT_FULL = PROBLEMS = ("empty", "over_context", "context_full")
# Of a longer message the end is looked at: the question mostly stands there.
CHARACTERS, LANGUAGE_CHARACTERS = 2000, 400
# Languages of an adapter that have a series of their own; rarer ones are `other`.
LANGUAGES = 12


class _Counts:
    """Of one adapter."""

    def __init__(self) -> None:
        self.requests = self.refused = 0
        self.problems: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.personal: Counter[str] = Counter()


class DataQuality(Collector):
    """`observe` runs in the worker's thread, `collect` in any.

    `language_of` gives a text's language, "" where it cannot tell; `context_of` the tokens that an adapter's context
    has room for (0: unknown); `known` says whether a name is an adapter's or a base's. `kinds`: of personal data.
    """

    def __init__(
        self,
        language_of: Callable[[str], str],
        context_of: Callable[[str], int],
        known: Callable[[str], bool],
        *,
        kinds: Sequence[str] = (),
        limit: int = 100,
    ) -> None:
        self._language_of = language_of
        self._context_of = context_of
        self._known = known
        self._kinds, self._limit = tuple(kinds), limit
        self._adapters: dict[str, _Counts] = {}
        self._lock = Lock()

    def start(self) -> None:
        """Nothing is kept from one start to the next."""

    def looked(self) -> None:
        """Every request has been counted."""

    def save(self) -> None:
        """Counters are Prometheus's to keep. What is gone gives its place back."""
        with self._lock:
            for adapter in [name for name in self._adapters if name != OTHER and not self._known(name)]:
                del self._adapters[adapter]

    def stop(self) -> None:
        """Nothing to write."""

    def observe(self, exchange: Exchange) -> None:
        """Count a request that an adapter or a base got, answered or refused."""
        if not exchange.version or not (exchange.generations or exchange.over_context):
            return
        problems = self._problems(exchange)
        text = question(exchange.question or {})
        language, personal = "", []
        if text and text.strip():
            language = self._language_of(text[-LANGUAGE_CHARACTERS:]) or UNKNOWN
            personal = personal_data(text[-CHARACTERS:], self._kinds) if self._kinds else []
        elif text is not None:
            problems.append(EMPTY)
        with self._lock:
            counts = self._of(exchange.adapter)
            counts.requests += 1
            counts.refused += bool(exchange.generations) and refuses(exchange.generations[0].text)
            for problem in problems:
                counts.problems[problem] += 1
            for kind in personal:
                counts.personal[kind] += 1
            if language:
                counts.languages[language if self._shows(counts, language) else OTHER] += 1

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "loradock_input_requests",
            "Requests whose prompts were looked at, since the server started.",
            labels=("adapter",),
        )
        problems = CounterMetricFamily(
            "loradock_input_problems",
            "Prompts that were empty, prompts that were refused because the context has no room for them "
            "(over_context), and answers that ended because the context was full (context_full).",
            labels=("adapter", "problem"),
        )
        languages = CounterMetricFamily(
            "loradock_input_language",
            "Requests by the language that they are probably in.",
            labels=("adapter", "language"),
        )
        personal = CounterMetricFamily(
            "loradock_input_personal_data",
            "Requests that hold personal data of a kind, by pattern.",
            labels=("adapter", "kind"),
        )
        refused = CounterMetricFamily(
            "loradock_answers_refused",
            "Answers that begin as refusals do, of the requests that were looked at.",
            labels=("adapter",),
        )
        with self._lock:
            for adapter, counts in self._adapters.items():
                requests.add_metric((adapter,), counts.requests)
                refused.add_metric((adapter,), counts.refused)
                for problem in PROBLEMS:
                    problems.add_metric((adapter, problem), counts.problems[problem])
                for kind in self._kinds:
                    personal.add_metric((adapter, kind), counts.personal[kind])
                for language, count in counts.languages.items():
                    languages.add_metric((adapter, language), count)
        yield from (requests, problems, languages, personal, refused)

    def _problems(self, exchange: Exchange) -> list[str]:
        problems = [OVER_CONTEXT] if exchange.over_context else []
        full = [made for made in exchange.generations if made.finish_reason == "length"]
        context = self._context_of(exchange.adapter) if full else 0
        if context and any(len(made.prompt) + len(made.output) >= context for made in full):
            problems.append(CONTEXT_FULL)
        return problems

    def _of(self, adapter: str) -> _Counts:
        if adapter not in self._adapters and len(self._adapters) >= self._limit:
            adapter = OTHER
        return self._adapters.setdefault(adapter, _Counts())

    def _shows(self, counts: _Counts, language: str) -> bool:
        return language in counts.languages or len(counts.languages) < LANGUAGES


def question(fields: Mapping[str, Any]) -> str | None:
    """The user's last message, or the prompt; None where there is no text, as of token numbers."""
    messages = fields.get("messages", fields.get("input"))
    if isinstance(messages, list) and messages and all(isinstance(message, Mapping) for message in messages):
        for message in reversed(messages):
            if message.get("role", "user") == "user":
                return _text(message.get("content"))
        return None
    return _text(messages if messages is not None else fields.get("prompt"))


def _text(content: Any) -> str | None:
    """A text, or the texts in a list of texts or of parts; None where there are none, be they pictures or numbers."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    known = [text for text in texts if isinstance(text, str)]
    return "\n".join(known) if known or not content else None
