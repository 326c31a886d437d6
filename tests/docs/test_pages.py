"""README and docs agree with the code: commands, flags, configurations, files, links, the picture."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml

from docs import generate, make_screenshot
from optimize.recipe import parse
from serve import config
from serve.telemetry.rendered import rules
from serve.telemetry.slo import DEFAULT_SLOS
from tests.support.pages import Page, pages
from tests.support.server import ROOT

README, *DOCS = pages()
CHART = yaml.safe_load((ROOT / "docker/helm/loradock/values.yaml").read_text())
each = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)


@pytest.fixture(scope="module")
def commands() -> dict[tuple[str, ...], Any]:
    return {tuple(words): command for words, command in generate.commands()}


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.text.splitlines()) <= 120


def test_the_pages_for_users_are_read_in_an_evening():
    for_people_who_change_it = ("docs/lab/", "docs/architecture.md", "docs/decisions.md", "docs/contributing.md")
    for_people_who_change_it += ("docs/families.md", "docs/upstream.md")  # tables
    words = {page.name: len(page.text.split()) for page in DOCS if not page.name.startswith(for_people_who_change_it)}
    assert sum(words.values()) <= 30_000, words
    assert words["docs/benchmarks.md"] <= 4_000


@each
def test_every_link_of_the_readme_and_every_file_that_a_page_names_is_there(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", page.text)
    missing = [link for link in links if not (page.path.parent / link).exists()]
    named = re.findall(r"`((?:serve|optimize|tests|docs|grafana|docker)/[\w./-]*)`", page.text)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def lines(page: Page) -> list[list[str]]:
    """The words of every `loradock ...` line on a page, shown or run."""
    found = []
    for block in page.of("bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line):
                command = part.strip().removeprefix("$ ")
                if command.startswith("loradock "):  # else it may be what a command said, which is no shell's
                    found.append(shlex.split(command, comments=True))
    return found


@each
def test_every_command_on_a_page_exists_with_its_flags(page, commands):
    known = {
        name.replace("_", "-") for name in {*config.SETTINGS, *config.engine_options(), "config", "help", "help-all"}
    }
    for words in lines(page):
        words = ["loradock", "finetune", "events", *words[3:]] if words[1:3] == ["finetune", "logs"] else words
        name = max((name for name in commands if tuple(words[: len(name)]) == name), key=len, default=None)
        assert name, f"there is no command {words}"
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if name == ("loradock", "serve"):
            missing = [flag for flag in flags if flag.removeprefix("--").removeprefix("no-") not in known]
        elif name[:2] == ("loradock", "optimize"):
            missing = [flag for flag in flags if flag not in OPTIMIZE_FLAGS]
        else:
            own = {flag for given in commands[name].params for flag in (*given.opts, *given.secondary_opts)}
            missing = [flag for flag in flags if flag not in own | {"--help"}]
        assert not missing, f"{' '.join(words)}: {missing}"


OPTIMIZE_FLAGS = {"--list", "--plan", "--out", "--adapter", "--set", "--model", "--resume", "--keep-rejected", "--json",
                  "--method", "--train"}  # fmt: skip


@each
def test_every_yaml_on_a_page_is_a_configuration_or_a_recipe(page, tmp_path):
    for block in page.of("yaml"):
        if block.startswith("# recipe"):
            assert parse(block, tmp_path).steps
            continue
        if block.startswith("# values"):
            assert (asked := yaml.safe_load(block)).keys() <= CHART.keys()
            assert asked["storage"].keys() <= CHART["storage"].keys()
            continue
        file = tmp_path / "loradock.yaml"
        file.write_text(block)
        read = config.load(["--config", str(file)], {})
        assert read.policies and read.slos


def test_the_configuration_page_shows_what_a_file_may_hold(tmp_path):
    page = next(page for page in DOCS if page.name == "docs/configuration.md")
    file = tmp_path / "loradock.yaml"
    file.write_text(page.of("yaml")[0])
    read = config.load(["--config", str(file)], {})
    assert (read.port, read.max_upload_bytes, read.engine["max_lora_rank"]) == (8000, 512 << 20, 32)
    assert [base.name for base in read.bases] == ["my-model", "small"]


def test_what_is_generated_holds_every_command_route_setting_and_package(commands):
    text = generate.cli()
    assert all(f"## {' '.join(name)}\n" in text for name in commands)
    assert ("loradock", "adapters", "push") in commands and "--promote / --no-promote" in text
    routes = generate.http_api()
    assert "### POST /v1/adapters/{name}/promote" in routes and "`expected_version`" in routes
    assert len(re.findall(r"^Scope: ", routes, re.MULTILINE)) == len(re.findall(r"^### ", routes, re.MULTILINE)) > 30
    settings = generate.settings()
    assert all(f"| `{name}` |" in settings for name in config.SETTINGS)
    packages = generate.packages()
    for root in ("serve", "optimize"):
        folders = [path.parent.name for path in (ROOT / root).glob("*/__init__.py")]
        assert all(f"`{root}/{name}/`" in packages for name in folders)


def test_each_alert_has_a_section_of_the_runbook_that_its_annotation_names():
    page = next(page for page in DOCS if page.name == "docs/runbook.md")
    sections = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", page.text, re.MULTILINE | re.DOTALL))
    alerts = [rule for group in rules.groups(DEFAULT_SLOS) for rule in group["rules"] if "alert" in rule]
    assert sorted(sections) == sorted(rule["alert"] for rule in alerts)
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        section = sections[rule["alert"]]
        assert f"**Means** ({rule['labels']['severity']})" in section and re.search(r"\*\*(Do|do)\*\*", section)


def test_every_route_says_what_it_does():
    silent = re.findall(r"^### (.*)\n\nScope: ", generate.http_api(), re.MULTILINE)
    assert not silent


def test_the_picture_of_the_dashboard_is_of_todays_page():
    recorded = (ROOT / "docs/images/dashboard.sha256").read_text().strip()
    assert recorded == make_screenshot.digest(), "the page has changed: run `python -m docs.make_screenshot`"
    for picture in make_screenshot.PICTURES:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 150_000
