"""What was asked and answered, as text on the disk, for `loradock optimize` to calibrate on; only when it is asked for.

One file of JSON lines an hour, `{"adapter": ..., "text": ...}`, the prompt as the model saw it (chat template and all)
and its answer, with what `redact` matches blacked out. A file is gone `hours` later, and takes no more than `limit`
bytes. Requests offer and go on; a thread writes, and what it cannot keep up with is dropped.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve.asgi.exchange import Exchange

QUEUE = 256
HOUR = 3600

log = logging.getLogger(__name__)


class Capture:
    """The folder, and the thread that writes into it. `model_of` gives an adapter's or base's checkpoint folder."""

    def __init__(
        self,
        folder: Path,
        model_of: Callable[[str], str],
        *,
        redact: Sequence[str] = (),
        hours: float = 24.0,
        limit: int = 16 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._model_of, self._limit = folder, model_of, limit
        self._redact = [re.compile(pattern) for pattern in redact]
        self._hours, self._clock = hours, clock
        self._queue: queue.Queue[Exchange | None] = queue.Queue(QUEUE)
        self._tokenizers: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self.dropped = 0

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        self._thread.start()

    def offer(self, exchange: Exchange) -> None:
        if exchange.status != 200 or not exchange.generations:
            return
        try:
            self._queue.put_nowait(exchange)
        except queue.Full:
            self.dropped += 1

    def stop(self) -> None:
        """Write what was offered, and end."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(5)

    def _run(self) -> None:
        while (exchange := self._queue.get()) is not None:
            try:
                self._keep(exchange)
            except Exception as error:  # a full disk, a tokenizer that is not there: traffic goes on
                log.warning("a request was not captured: %s", error)

    def _keep(self, exchange: Exchange) -> None:
        hour = int(self._clock() // HOUR)
        for old in self._folder.glob("*.jsonl"):
            if old.stem.isdigit() and int(old.stem) < hour - self._hours:
                old.unlink(missing_ok=True)
        tokenizer = self._tokenizer(self._model_of(exchange.adapter))
        one = exchange.generations[0]
        text = tokenizer.decode([*one.prompt, *one.output], skip_special_tokens=False)
        for pattern in self._redact:
            text = pattern.sub("[redacted]", text)
        line = json.dumps({"adapter": exchange.adapter, "text": text}, ensure_ascii=False) + "\n"
        path = self._folder / f"{hour}.jsonl"
        held = path.stat().st_size if path.exists() else 0
        if held + len(line.encode()) > self._limit:
            self.dropped += 1
            return
        with path.open("a") as file:
            file.write(line)

    def _tokenizer(self, model: str) -> Any:
        if model not in self._tokenizers:
            from tokenizers import Tokenizer

            self._tokenizers[model] = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        return self._tokenizers[model]
