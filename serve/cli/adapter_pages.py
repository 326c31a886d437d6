"""What `loradock adapters` prints: the list, and the page of one adapter."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from serve.cli.terminal import age, nbytes, portion, table
from serve.errors import NotFound

NOTHING = "-"
# Whether the model `auto` may choose it.
_AUTO = {"yes": "takes part", "gathering": "not yet: it has no reference of its prompts", "default": "answers the rest"}


def listed(answer: dict[str, Any]) -> str:
    """Each adapter with its live version, and what else gets traffic or stays in memory."""
    rows: list[tuple[str, ...]] = [("NAME", "LIVE", "CANARY", "SHADOW", "PIN", "RANK", "SIZE", "AGE", "VERSIONS")]
    for adapter in answer["data"]:
        versions = adapter.get("versions") or []
        about = _about(adapter)
        pinned = [version for version in versions if version.get("pinned")]
        rows.append(
            (
                str(adapter.get("name")),
                numbered(live_version(adapter)),
                *(_portion(adapter.get(kind)) for kind in ("canary", "shadow")),
                numbered(pinned[0].get("version")) if pinned else NOTHING,
                str(about.get("rank", NOTHING)),
                nbytes(about.get("bytes")),
                age(about.get("created"), time.time()),
                str(len(versions)),
            )
        )
    autos = [str(adapter.get("auto", "no")) for adapter in answer["data"]]
    if set(autos) > {"no"}:
        rows = [(*row, auto) for row, auto in zip(rows, ("AUTO", *autos), strict=True)]
    return table(rows) if len(rows) > 1 else "no adapters yet; begin with: loradock adapters push NAME PATH"


def shown(answer: dict[str, Any], analysis: dict[str, Any] | None = None) -> str:
    """One adapter as a page: what it is, its versions, how its canary does, what happened to it."""
    parts = [[str(answer.get("name")), *_facts(answer), *_provenance(answer)]]
    parts.append(["Versions", *_indented(_versions(answer))])
    if answer.get("canary") or answer.get("shadow"):
        lines = [
            shared(answer, kind, does)
            for kind, does in (("canary", "answers"), ("shadow", "also answers, unseen,"))
            if answer.get(kind)
        ]
        parts.append(["Traffic", *_indented("\n".join([*lines, *(_compared(analysis) if analysis else [])]))])
    if events := answer.get("history"):
        parts.append(["History", *_indented("\n".join(map(_event, events)))])
    return "\n\n".join("\n".join(part) for part in parts)


def only(answer: dict[str, Any], version: str) -> dict[str, Any]:
    """The page's answer with that one version: by number, alias or digest."""
    aliases = answer.get("aliases") or {}
    number = str(aliases.get(version, version)).removeprefix("v")
    versions = [
        each
        for each in answer.get("versions") or []
        if str(each.get("version")) == number or (len(version) >= 8 and str(each.get("digest")).startswith(version))
    ]
    if not versions:
        raise NotFound(f"{answer.get('name')} has no version {version}: `loradock adapters show {answer.get('name')}`")
    return answer | {"versions": versions}


def pushed(answer: dict[str, Any]) -> str:
    """What became of a push, or would."""
    warning = f"\nwarning: {text}" if (text := (answer.get("checks") or {}).get("warning")) else ""
    if answer.get("dry_run"):
        return _tried(answer) + warning
    version = f"{answer.get('name')}@{numbered(answer.get('version'))}"
    if live_version(answer) == answer.get("version"):
        return f"{version} ({answer.get('id')}) is live{warning}"
    return f"{version} ({answer.get('id')}) is stored; make it live with: loradock adapters promote {version}{warning}"


def shared(answer: dict[str, Any], kind: str, does: str) -> str:
    """Which share of the requests the canary or shadow has."""
    share = answer.get(kind)
    if not share:
        return f"{answer.get('name')} has no {kind} any more"
    return f"{answer.get('name')}@{numbered(share['version'])} {does} {portion(share['weight'])} of the requests"


def pinned(answer: dict[str, Any]) -> str:
    """Which version stays in memory."""
    versions = [version["version"] for version in answer.get("versions", []) if version.get("pinned")]
    if not versions:
        return f"{answer.get('name')} is pinned: whichever version is live stays, and none is live now"
    return f"{answer.get('name')}@{numbered(versions[0])} is pinned"


def validated(answer: dict[str, Any], target: str) -> str:
    """What a validation measured."""
    report = (answer.get("checks") or {}).get("validation") or {}
    rows: list[tuple[str, ...]] = [("check", "verdict", "measured", "from", "to", "at most", "")]
    for name, check in (report.get("checks") or {}).items():
        numbers = (f"{check[part]:.3g}" for part in ("measured", "low", "high", "limit"))
        rows.append((name, check["verdict"], *numbers, check["what"]))
    told = [f"cannot be measured: {report['problem']}"] if report.get("problem") else []
    lost = [f"lost: {each}" for each in report.get("lost") or []]
    shown = "\n".join([table(rows), *told, *lost])
    return "\n".join([f"{target}: {report.get('verdict')}", *_indented(shown)])


def removed(answer: dict[str, Any], target: str) -> str:
    """Which versions are gone."""
    versions = ", ".join(map(numbered, answer.get("deleted") or []))
    return f"{target} is removed" + (f" ({versions})" if versions and "@" not in target else "")


def live_version(answer: dict[str, Any]) -> int | None:
    """The live version: an adapter names its number, a version says whether it is the one."""
    live = answer.get("live")
    if isinstance(live, bool):
        return answer.get("version") if live else None
    return live


def numbered(version: Any) -> str:
    return NOTHING if version is None else f"v{version}"


def _about(adapter: dict[str, Any]) -> dict[str, Any]:
    """The live version, or the newest."""
    versions = adapter.get("versions") or [{}]
    live = live_version(adapter)
    return next((version for version in versions if version.get("version") == live), versions[-1])


def _portion(share: dict[str, Any] | None) -> str:
    return f"{numbered(share['version'])} {portion(share['weight'])}" if share else NOTHING


def _facts(answer: dict[str, Any]) -> list[str]:
    about, tenant = _about(answer), answer.get("tenant")
    rows: list[tuple[str, ...]] = [("live", numbered(live_version(answer)))]
    if aliases := answer.get("aliases"):
        rows.append(("aliases", ", ".join(f"{alias} = {numbered(version)}" for alias, version in aliases.items())))
    if former := answer.get("former_names"):
        rows.append(("also asked as", ", ".join(former)))
    if engine := about.get("engine"):
        rows.append(("engine", str(engine)))
    if (auto := answer.get("auto", "no")) != "no":
        rows.append(("auto", _AUTO.get(auto, auto)))
    if visibility := answer.get("visibility"):
        rows.append(("visibility", f"{visibility}, tenant {tenant}" if tenant else str(visibility)))
    return _indented(table(rows))


def _provenance(answer: dict[str, Any]) -> list[str]:
    """Where the live version comes from, or the newest."""
    stated = _about(answer).get("provenance") or {}
    rows = [
        (field.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
        for field, value in stated.items()
    ]
    return (
        ["", f"Provenance of {numbered(_about(answer).get('version'))}, as it says", *_indented(table(rows))]
        if rows
        else []
    )


def _versions(answer: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("VERSION", "STATE", "RANK", "SIZE", "AGE", "TAGS", "ID")]
    for version in answer.get("versions", []):
        rows.append(
            (
                numbered(version.get("version")),
                _state(answer, version),
                str(version.get("rank", NOTHING)),
                nbytes(version.get("bytes")),
                age(version.get("created"), time.time()),
                ", ".join(version.get("tags") or []) or NOTHING,
                str(version.get("id", NOTHING)),
            )
        )
    return table(rows)


def _state(answer: dict[str, Any], version: dict[str, Any]) -> str:
    number = version.get("version")
    states = ["live"] if number == live_version(answer) else []
    states += [kind for kind in ("canary", "shadow") if (answer.get(kind) or {}).get("version") == number]
    states += ["pinned"] if version.get("pinned") else []
    states += version.get("aliases") or []
    return ", ".join(states) or NOTHING


def _compared(analysis: dict[str, Any]) -> list[str]:
    """How the canary does, and what it takes until it has proved itself."""
    requests, askers = analysis.get("requests", 0), analysis.get("askers", 0)
    canary, live = numbered(analysis["canary"]), numbered(analysis["live"])
    line = f"{canary} against {live}: {analysis['verdict']} after {requests} requests of {askers} askers"
    if analysis.get("dealt_by") == "request":
        line += ", dealt by request: few askers"
    rows = [("CHECK", "EFFECT", "MORE REQUESTS UNTIL PROVED")]
    for check in analysis.get("checks", []):
        if check.get("worse"):
            rows.append((check["check"], f"{check['effect']}", "worse"))
        elif check.get("requests_to_proof"):
            rows.append((check["check"], f"{check['effect']}", _expected(check["requests_to_proof"])))
    if len(rows) == 1:
        return [line, "too early to say how many requests it takes until it is proved"]
    return [line, *table(rows).splitlines()]


def _expected(requests: dict[str, int | None]) -> str:
    if requests["high"] == 0:
        return "proved"
    low, expected, high = (requests[bound] for bound in ("low", "expected", "high"))
    if low is None:
        return "not in sight"
    return f"{'not in sight' if expected is None else expected} ({low} to {'no end' if high is None else high})"


def _event(event: Any) -> str:
    """A change in a line: when, what, to which version, by whom, why."""
    if not isinstance(event, dict):
        return str(event)
    before, after = event.get("from_version"), event.get("to_version")
    words = [str(event.get("what", "")).ljust(12)]
    if before is not None or after is not None:
        words.append(f"{numbered(before)} to {numbered(after)}" if before is not None else numbered(after))
    if event.get("label"):
        words.append(str(event["label"]))
    if event.get("weight") is not None:
        words.append(f"{portion(event['weight'])} of the requests")
    words += [f"by {event['who']}"] if event.get("who") else []
    line = "  ".join([_when(event.get("when")), *words])
    return f"{line}: {event['why']}" if event.get("why") else line.rstrip()


def _tried(answer: dict[str, Any]) -> str:
    """What the server found, and what a push would do."""
    name, version = answer.get("name"), answer.get("version")
    checks = answer.get("checks") or {}
    measured = [f"{key} {value:.4g}" for key, value in checks.items() if isinstance(value, int | float)]
    about = f"rank {answer.get('rank')}, {nbytes(answer.get('bytes'))}, {', '.join(answer.get('target_modules') or [])}"
    what = f"these bytes are {name}@{numbered(version)} already" if version else "it would be a new version"
    lines = [f"{name} fits {answer.get('engine')} ({about}): {what}, and become {answer.get('becomes')}"]
    lines += [f"measured: {', '.join(measured)}"] if measured else []
    return "\n".join([*lines, "nothing was kept: this was a dry run"])


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _when(moment: Any) -> str:
    """Seconds since 1970 as a local time."""
    if not isinstance(moment, int | float):
        return str(moment or NOTHING)
    return datetime.fromtimestamp(moment).astimezone().isoformat(" ", timespec="seconds")
