"""Our own warnings in vLLM's processes, which have no terminal: the server asks for them once an engine has started."""

from __future__ import annotations

import logging
import sys

LOGGERS = ("serve", "loradock")
MOST = 50


class Notices(logging.Handler):
    """The first warnings of this process, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._messages) < MOST:
            self._messages[record.getMessage()] = None

    @property
    def messages(self) -> list[str]:
        return list(self._messages)


notices = Notices()


def install() -> None:
    """Keep the warnings of this process; in a process of vLLM's they are also written to its output."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if notices in logger.handlers:
            continue
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler(sys.stderr))
            logger.handlers[-1].setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
        logger.addHandler(notices)
