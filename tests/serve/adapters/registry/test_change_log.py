"""The history over all names: the latest first, page by page, of whom it concerns."""

from __future__ import annotations

import pytest

from serve.adapters.adapter import Inspection
from serve.adapters.registry.change_log import recent_changes
from serve.adapters.registry.registry import Registry

FOUND = Inspection(rank=8, base="toy", target_modules=("q_proj",), nbytes=1234, tensors=4)


@pytest.fixture
def registry(url):
    with Registry(url) as registry:
        yield registry


def push(registry, *names):
    for number, name in enumerate(names):
        registry.add(name, FOUND, f"{number:064x}", by="ada")


def said(rows):
    return [(row["adapter"], row["what"]) for row in rows]


def test_the_latest_change_comes_first_and_pages_follow_one_another(registry):
    push(registry, "tone", "calm")
    whole = recent_changes(registry, None)
    assert said(whole) == [("calm", "promote"), ("calm", "add"), ("tone", "promote"), ("tone", "add")]
    first = recent_changes(registry, None, limit=3)
    assert first + recent_changes(registry, None, limit=3, before=first[-1]["id"]) == whole
    assert whole[0]["who"] == "ada" and whole[0]["to_version"] == 1


def test_a_tenant_reads_of_its_own_adapters_alone_and_of_such_that_are_gone(registry):
    push(registry, "tone", "acme/tone", "acme-too/tone", "a_me/tone")
    registry.delete("acme/tone", by="ada")
    assert {row["adapter"] for row in recent_changes(registry, "default")} == {"tone"}
    assert said(recent_changes(registry, "acme"))[0] == ("acme/tone", "delete")
    assert {row["adapter"] for row in recent_changes(registry, "acme")} == {"acme/tone"}
    assert {row["adapter"] for row in recent_changes(registry, "a_me")} == {"a_me/tone"}


def test_search_is_for_letters_and_not_for_patterns(registry):
    push(registry, "tone", "T_ne")
    assert {row["adapter"] for row in recent_changes(registry, None, search="t_n")} == {"T_ne"}
    assert {row["adapter"] for row in recent_changes(registry, None, search="ONE")} == {"tone"}
    assert recent_changes(registry, None, search="%") == recent_changes(registry, None, search="t\0") == []
