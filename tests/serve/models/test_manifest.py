"""The server shows the manifest of the export that it serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.models.manifest import summary_of

MANIFEST = {
    "key": "abc",
    "parent": {"name": "smollm2", "files": {}},
    "steps": [{"step": "quantize", "options": {"scheme": "w8a8"}, "notes": {"kept": {}}}],
    "scores": {"perplexity": 18.0, "top1": 0.93, "samples": ["long"]},
    "gate": {"passed": True, "bounds": [{"bound": "max_kl"}]},
}


def test_an_export_is_gist_by_its_manifest(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert summary_of(str(tmp_path)) == {
        "key": "abc",
        "parent": "smollm2",
        "steps": [{"step": "quantize", "scheme": "w8a8"}],
        "scores": {"perplexity": 18.0, "top1": 0.93},
        "gate": "passed",
        "gate_passed": True,
    }


@pytest.mark.parametrize(
    ("gate", "shown"),
    [
        ({"passed": True, "bounds": []}, ("not judged", None)),  # as older exports say it
        ({"judged": False, "passed": None, "bounds": []}, ("not judged", None)),
        ({"judged": True, "passed": False, "bounds": [{}]}, ("not passed", False)),
        ({"judged": False, "passed": False, "bounds": [{}]}, ("not passed", False)),
        ({"judged": False, "passed": None, "bounds": [{}]}, ("not judged", None)),
    ],
)
def test_an_export_that_nobody_judged_says_so(gate, shown, tmp_path: Path):
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, "gate": gate}))
    said = summary_of(str(tmp_path))
    assert said is not None and (said["gate"], said["gate_passed"]) == shown


def test_any_other_model_is_not(tmp_path: Path):
    assert summary_of(str(tmp_path)) is None
    for broken in ("{", "[]", '{"key": 1}'):
        (tmp_path / "manifest.json").write_text(broken)
        assert summary_of(str(tmp_path)) is None
    assert summary_of("org/name") is None
