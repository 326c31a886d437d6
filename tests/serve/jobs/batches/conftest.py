"""Lines of a batch's input."""

from __future__ import annotations

import json
from typing import Any

from tests.support.app import CHAT


def request(id: str, model: str | None = "base", url: str = CHAT, **body: Any) -> dict[str, Any]:
    """A line of an input."""
    return {"custom_id": id, "method": "POST", "url": url, "body": {"model": model, "messages": [], **body}}


def lines_of(rows: list[Any]) -> bytes:
    """Rows as JSON lines; a text is a line as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
