"""Where an adapter comes from is what its card says, kept with the version and shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from serve.adapters.provenance import MAX_DATASETS, front_matter, read_license, read_provenance
from tests.support.app import upload

CARD = """---
license: MIT
author: team tone
base_model:
- org/base
datasets:
- org/talks
- org/letters
dataset_digest: sha256:abc
tags: [lora]
---
# Tone
"""


def test_manifest_card_and_configuration_are_asked_in_this_order(tmp_path):
    config = {"base_model_name_or_path": "stated", "revision": "main"}
    assert read_provenance(tmp_path, config) == {"base_model": "stated", "base_revision": "main"}
    (tmp_path / "README.md").write_text(CARD)
    from_card = {
        "trained_by": "team tone", "base_model": "org/base", "base_revision": "main", "data_digest": "sha256:abc",
        "license": "mit", "datasets": ["org/talks", "org/letters"],
    }  # fmt: skip
    assert read_provenance(tmp_path, config) == from_card
    (tmp_path / "manifest.json").write_text(json.dumps({"provenance": {"trained_by": "me", "base_digest": "b" * 64}}))
    assert read_provenance(tmp_path, config) == {**from_card, "trained_by": "me", "base_digest": "b" * 64}
    assert read_license(front_matter(tmp_path / "README.md")) == "mit"


@pytest.mark.parametrize(
    "card",
    [
        "", "---\n", "no front", "---\n[\n---\n", "---\n- a\n---\n", "---\na: &a [x]\nauthor: *a\n---\n",
        "---\nauthor: {}\n---\n", "---\nauthor: \"\\x00\"\n---\n", f"---\nauthor: {'x' * 300}\n---\n",
        "---\n" + "[" * 5000 + "\n---\n", "---\nprovenance: text\n---\n", "---\ndatasets: {a: b}\n---\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", '{"provenance": 3}', "[" * 50_000, '{"provenance": {"license": 1}}']
)
def test_notes_that_say_nothing_that_can_be_read_are_passed_over(tmp_path, card, manifest):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "manifest.json").write_text(manifest)
    assert read_provenance(tmp_path, {"revision": None, "base_model_name_or_path": 3}) == {}


def test_a_long_list_is_cut_and_a_link_is_not_followed(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"provenance": {"datasets": [str(n) for n in range(99)]}}))
    assert len(read_provenance(tmp_path, {})["datasets"]) == MAX_DATASETS
    (tmp_path / "secret").write_text('{"provenance": {"author": "x"}}')
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").symlink_to(tmp_path / "secret")
    assert read_provenance(tmp_path, {}) == {}


async def test_a_version_shows_what_its_card_said_and_its_checks_only_what_was_measured(client, make_adapter):
    (make_adapter() / "README.md").write_text(CARD)
    tried = (await client.post("/v1/adapters", **upload(make_adapter(), dry_run="true"))).json()
    pushed = (await client.post("/v1/adapters", **upload(make_adapter()))).json()
    shown = (await client.get("/v1/adapters/tone")).json()["versions"][0]
    one = (await client.get("/v1/adapters/tone/versions/1")).json()
    for answer in (tried, pushed, shown, one):
        assert answer["provenance"]["trained_by"] == "team tone"
        assert answer["provenance"]["datasets"] == ["org/talks", "org/letters"]
        assert "provenance" not in answer["checks"]


async def test_a_push_by_address_knows_by_itself_where_the_files_came_from(connect, config, make_adapter, tmp_path):
    (make_adapter() / "manifest.json").write_text('{"provenance": {"source": "hf://forged/one", "origin": "hf://a/b"}}')
    async with connect(replace(config, source_roots=(str(tmp_path),))) as client:
        await client.post("/v1/adapters", json={"name": "tone", "source": f"file://{make_adapter()}"})
        provenance = (await client.get("/v1/adapters/tone/versions/1")).json()["provenance"]
    assert provenance == {"origin": "hf://a/b", "source": f"file://{make_adapter()}"}
