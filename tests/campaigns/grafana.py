"""The dashboards against the types that Grafana publishes with its releases (npm: @grafana/schema): no unknown field.

    python -m tests.campaigns.grafana [--releases 11.0.0 11.6.16 12.0.0 12.4.11]

TypeScript reads each dashboard as a literal of Grafana's `Dashboard`, and options and fields of each panel as those of
its plugin; what may be left out in a saved dashboard may be left out here. Needs node and npm. It is no Grafana: what a
release makes of a dashboard is seen in Grafana alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.telemetry.rendered.dashboards import dashboards
from serve.telemetry.slo import DEFAULT_SLOS

TYPESCRIPT = "typescript@5.9.3"
# By panel: the plugin's name in the package.
PLUGINS = {
    "timeseries": "timeseries/panelcfg/x/TimeSeriesPanelCfg",
    "stat": "stat/panelcfg/x/StatPanelCfg",
    "bargauge": "bargauge/panelcfg/x/BarGaugePanelCfg",
    "state-timeline": "statetimeline/panelcfg/x/StateTimelinePanelCfg",
    "table": "table/panelcfg/x/TablePanelCfg",
    "heatmap": "heatmap/panelcfg/x/HeatmapPanelCfg",
}
# Fields of an annotation that its data source reads; Grafana's types have only those that Grafana itself does.
OF_PROMETHEUS = {"expr", "titleFormat", "step", "useValueForTime"}
WRONG = 'export const wrong: Part<Dashboard> = {refresh: "30s", panelz: []};\n'
# An enumeration's values are written as they are in JSON.
PART = """
type Part<T> = T extends string ? `${T}` : T extends number ? number : T extends (infer E)[] ? Part<E>[]
  : T extends object ? {[K in keyof T]?: Part<T[K]>} : T;
"""
# Most releases do not export the types of their plugins; node10 reads files all the same.
SETTINGS = {
    "strict": True, "noEmit": True, "module": "esnext", "moduleResolution": "node10", "target": "es2022",
    "skipLibCheck": True, "types": [], "lib": ["es2022", "dom"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--releases", nargs="+", default=["11.0.0", "11.6.16", "12.0.0", "12.4.11"])
    asked = parser.parse_args()
    boards = json.loads(json.dumps(dashboards(DEFAULT_SLOS)))
    count = 0
    for release in asked.releases:
        with tempfile.TemporaryDirectory(prefix="loradock-grafana-") as name:
            problems = checked(Path(name), release, boards)
        print(f"Grafana {release}: {len(boards)} dashboards, {len(problems)} problems")
        print(*problems, sep="\n", end="\n" if problems else "")
        count += len(problems)
    return int(count > 0)


def checked(folder: Path, release: str, boards: list[dict[str, Any]]) -> list[str]:
    """What the types of one release do not know."""
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", TYPESCRIPT]
    subprocess.run([*install, f"@grafana/schema@{release}"], cwd=folder, check=True)
    for board in boards:
        (folder / f"{board['uid']}.ts").write_text("".join(program(board)))
    (folder / "wrong.ts").write_text(HEAD + WRONG)
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": SETTINGS, "include": ["*.ts"]}))
    tsc = ["node_modules/.bin/tsc", "--pretty", "false"]
    done = subprocess.run(tsc, cwd=folder, capture_output=True, text=True, check=False)
    problems = [line for line in done.stdout.splitlines() if re.match(r"\S", line)]
    if not any(line.startswith("wrong.ts") and "panelz" in line for line in problems):
        problems.append(f"the types of {release} do not see a field that there is not:\n{done.stdout[:2000]}")
    return [line for line in problems if not line.startswith("wrong.ts")]


HEAD = f'import type {{ Dashboard }} from "@grafana/schema";\n{PART}'


def program(board: dict[str, Any]) -> Iterator[str]:
    yield HEAD
    kinds = sorted({panel["type"] for panel in board["panels"]} - {"row"})
    for kind in kinds:
        name = kind.replace("-", "")
        yield f'import type * as {name} from "@grafana/schema/dist/esm/raw/composable/{PLUGINS[kind]}_types.gen";\n'
    for annotation in board["annotations"]["list"]:
        assert OF_PROMETHEUS & annotation.keys()
    listed = [{k: v for k, v in each.items() if k not in OF_PROMETHEUS} for each in board["annotations"]["list"]]
    plain = {**board, "annotations": {"list": listed}}
    yield f"export const board: Part<Dashboard> = {json.dumps(plain, indent=1)};\n"
    for panel in board["panels"]:
        if (kind := panel["type"]) == "row":
            continue
        name = kind.replace("-", "")
        yield f"export const options{panel['id']}: Part<{name}.Options> = {json.dumps(panel['options'])};\n"
        if custom := panel["fieldConfig"]["defaults"].get("custom"):
            yield f"export const custom{panel['id']}: Part<{name}.FieldConfig> = {json.dumps(custom)};\n"


if __name__ == "__main__":
    sys.exit(main())
