"""Batches as a whole: made here, listed and cancelled in their table, run by `BatchSchedule`."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping

from serve.auth.auth import Caller
from serve.errors import BadRequest, NotFound
from serve.jobs.batches.batch_rows import BatchRows
from serve.jobs.batches.files import Files
from serve.jobs.batches.metrics import BatchMetrics
from serve.jobs.batches.objects import ENDPOINTS, INPUT, Batch, Status
from serve.jobs.batches.schedule import BatchSchedule
from serve.names import shown

MAX_METADATA = 16
MAX_KEY = 64
MAX_VALUE = 512
_WINDOW = re.compile(r"([1-9][0-9]{0,3})h")


class Batches:
    def __init__(
        self,
        files: Files,
        rows: BatchRows,
        schedule: BatchSchedule,
        metrics: BatchMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = files
        self.rows = rows
        self.schedule = schedule
        self.metrics = metrics
        self._clock = clock

    def create(
        self,
        caller: Caller,
        *,
        input_file: str,
        endpoint: str,
        window: str,
        metadata: Mapping[str, str] | None,
        file_seconds: int | None,
    ) -> Batch:
        """A new batch of the caller's; BadRequest for what cannot be one. Blocks."""
        if endpoint not in ENDPOINTS:
            raise BadRequest(f"endpoint takes {', '.join(ENDPOINTS)}; not {shown(endpoint)}", param="endpoint")
        hours = _WINDOW.fullmatch(window)
        if hours is None or int(hours[1]) > self._files.limits.window_hours:
            raise BadRequest(
                f"completion_window takes hours, as 24h, up to {self._files.limits.window_hours}h; not {shown(window)}",
                param="completion_window",
            )
        check_metadata(metadata or {})
        try:
            file = self._files.rows.get(caller.tenant, input_file)
        except NotFound as missing:
            raise BadRequest(missing.message, param="input_file_id") from missing
        if file.purpose != INPUT:
            raise BadRequest(
                f"{file.id} has the purpose `{file.purpose}`: send a file with `batch`", param="input_file_id"
            )
        now = self._clock()
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=caller.tenant,
            key=caller.key,
            who=caller.name,
            status=Status.VALIDATING,
            endpoint=endpoint,
            input_file=file.id,
            completion_window=window,
            metadata=metadata,
            created=now,
            expires=now + 3600 * int(hours[1]),
            file_seconds=float(file_seconds or self._files.limits.file_seconds),
        )
        self.rows.add(batch)
        return batch


def check_metadata(metadata: Mapping[str, str]) -> None:
    """BadRequest for more than OpenAI's objects take."""
    if len(metadata) > MAX_METADATA:
        raise BadRequest(f"metadata takes up to {MAX_METADATA} entries, not {len(metadata)}", param="metadata")
    for key, value in metadata.items():
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            raise BadRequest(
                f"metadata takes keys of up to {MAX_KEY} characters and values of up to {MAX_VALUE}: see "
                f"{shown(key, 40)}",
                param="metadata",
            )
