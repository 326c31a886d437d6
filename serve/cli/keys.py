"""`loradock keys`: who may use a running server, and how much.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from serve.cli.arguments import Commands
from serve.cli.terminal import URL, Json, Key, Url, connected, example, say, table

keys_app = typer.Typer(
    name="keys",
    help="Create, list and revoke API keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)


# How help groups the options.
LIMITS, REQUEST = "Limits of the key", "Limits of one request"


def _limit(flag: str, help: str) -> Any:
    return typer.Option(
        flag, min=1, metavar="N", help=f"{help} (default: no limit).", show_default=False, rich_help_panel=LIMITS
    )


def _bound(flag: str, help: str) -> Any:
    return typer.Option(
        flag,
        min=1,
        metavar="N",
        help=f"{help} (default: the server's limit).",
        show_default=False,
        rich_help_panel=REQUEST,
    )


@keys_app.command(
    epilog=example(
        "loradock keys create batch-jobs --tenant acme --requests-per-minute 60 --tokens-per-minute 40000",
        "loradock keys create ci --tenant acme --scope adapters:write --adapters 20 --json | jq -r .secret",
    )
)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for; histories and logs show it.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose key it is.")] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="inference, adapters:write, finetune:work, metrics or admin; again for more (default: inference).",
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, _limit("--requests-per-minute", "Requests in a minute")] = None,
    tokens_per_minute: Annotated[int | None, _limit("--tokens-per-minute", "Tokens in a minute, in and out")] = None,
    concurrent: Annotated[int | None, _limit("--concurrent", "Requests at once")] = None,
    adapters: Annotated[int | None, _limit("--adapters", "Adapters its tenant keeps")] = None,
    adapter_bytes: Annotated[int | None, _limit("--adapter-bytes", "Bytes that they take")] = None,
    sequences: Annotated[int | None, _bound("--sequences", "Answers in one request, n times its prompts")] = None,
    prompt_logprobs: Annotated[int | None, _bound("--prompt-logprobs", "Alternatives for each prompt token")] = None,
    batch: Annotated[int | None, _bound("--batch", "Inputs in one request for embeddings or scores")] = None,
    changes_per_minute: Annotated[
        int | None, _limit("--changes-per-minute", "Changes in a minute, no inference")
    ] = None,
    reads_per_minute: Annotated[int | None, _limit("--reads-per-minute", "Reads in a minute, no inference")] = None,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Create a key and print its secret, once.

    The server keeps only its hash.
    """
    asked = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent": concurrent,
        "adapters": adapters,
        "adapter_bytes": adapter_bytes,
        "sequences": sequences,
        "prompt_logprobs": prompt_logprobs,
        "batch": batch,
        "changes_per_minute": changes_per_minute,
        "reads_per_minute": reads_per_minute,
    }
    limits = {limit: value for limit, value in asked.items() if value is not None}
    with connected("keys", url, key) as client:
        answer = client.create_key(name, tenant, scope or ["inference"], limits)
    say(answer, as_json, _created)


@keys_app.command("list", epilog=example("loradock keys list --tenant acme"))
def list_(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Of this tenant only.")] = None,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the keys, without their secrets."""
    with connected("keys", url, key) as client:
        answer = client.keys(tenant)
    say(answer, as_json, _listed)


@keys_app.command(epilog=example("loradock keys revoke key_0123456789abcdef"))
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="As `loradock keys list` shows it.")],
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Revoke a key.

    Later requests with it are refused, answers that have begun finish.
    """
    with connected("keys", url, key) as client:
        answer = client.revoke_key(id)
    say(answer, as_json, lambda body: f"{body.get('tenant')}/{body.get('name')} ({id}) is revoked")


def _created(answer: dict[str, Any]) -> str:
    who = f"{answer.get('tenant')}/{answer.get('name')} ({answer.get('id')})"
    return f"{who} may {', '.join(answer.get('scopes', []))}; keep its secret now, it is not shown again:\n" + str(
        answer.get("secret")
    )


def _listed(answer: dict[str, Any]) -> str:
    rows = [("ID", "TENANT", "NAME", "SCOPES", "LIMITS", "CREATED", "REVOKED")]
    for key in answer.get("data", []):
        limits = [f"{limit}={value}" for limit, value in key.get("limits", {}).items() if value is not None]
        words = (str(key.get("id")), str(key.get("tenant")), str(key.get("name")), ",".join(key.get("scopes", [])))
        rows.append((*words, ",".join(limits) or "-", _day(key.get("created")), _day(key.get("revoked"))))
    return table(rows) if len(rows) > 1 else "no keys were issued yet; begin with: loradock keys create NAME"


def _day(seconds: Any) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d") if isinstance(seconds, (int, float)) else "-"
