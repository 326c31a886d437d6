"""`loradock demo`."""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from contextlib import nullcontext
from typing import Annotated

import typer

from serve.cli.terminal import Key, example, told


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `loradock`."""
    epilog = example("loradock demo", "loradock demo --no-wait", "loradock demo --url http://127.0.0.1:8000")
    app.command(epilog=epilog, rich_help_panel=panel)(demo)


def demo(
    url: Annotated[
        str | None, typer.Option("--url", help="A running server (default: one of its own, gone afterwards).")
    ] = None,
    key: Key = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="At the end keep its server for you until you press Enter.")
    ] = True,
) -> None:
    """See what a server does, in three minutes.

    A good version goes live, a bad one is taken back, and a change in what is asked is named.
    """
    import httpx

    from serve.cli.demo.server import own_server
    from serve.cli.demo.story import NAME, Story
    from serve.cli.demo.traffic import Traffic
    from serve.client.adapter_client import AdapterClient
    from serve.errors import NotFound

    began = time.monotonic()

    def say(sentence: str) -> None:
        typer.echo(f"{time.monotonic() - began:4.0f} s  {sentence}")

    with told("demo"):
        if url is None:
            say("Starting a server with the embedded model SmolLM2-135M, on a free port and in a temporary folder.")
        with nullcontext(url) if url else own_server() as address:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            with (
                AdapterClient(address, key) as client,
                httpx.Client(base_url=address, headers=headers, timeout=120) as http,
            ):
                page = f"{address.rstrip('/')}/dashboard#/adapters/{NAME}"
                say(f"The dashboard shows all that follows: {page}")
                _open(page)
                base = str(client.engines()["data"][0]["name"])
                try:
                    Story(client, http, Traffic(address, key, NAME), say).run(base)
                    if wait and url is None and sys.stdin.isatty():
                        say("Done. Look around in the dashboard; Enter ends the demo.")
                        input()
                finally:
                    try:
                        client.remove(NAME, force=True, why="the demo is over")
                    except NotFound:
                        pass
        say("Nothing is left of it." if url is None else f"{NAME} is removed again.")


def _open(page: str) -> None:
    """In the user's browser, where there is a screen; a browser of the terminal would hide what is said."""
    if sys.stdout.isatty() and (
        sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        webbrowser.open(page)
