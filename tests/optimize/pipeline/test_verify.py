"""An export is held against its manifest: files, original, texts, figures, signature; and made again by its recipe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from optimize import cli
from optimize.pipeline.verify import Figure

STEPS = """
steps:
- merge: {adapters: [tone]}
- quantize: {scheme: w4a16}
"""
TEXTS = ("calibration.txt", "evaluation.txt")


def command(*words: str | Path, expect: int = 0) -> None:
    def none_come_along(name: str) -> Path:
        raise AssertionError(name)

    assert cli.run([str(word) for word in words], none_come_along) == expect


def verified(capsys: pytest.CaptureFixture[str], *words: str | Path, expect: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    command("verify", *words, "--json", expect=expect)
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def results(found: dict[str, Any]) -> dict[str, str]:
    return {figure["name"]: figure["result"] for figure in found["figures"]}


@pytest.fixture
def exported(
    written: Callable[[str], Path], adapter: Any, texts: dict[str, Path], base: Path, tmp_path: Path, steps_here: None
) -> tuple[Path, list[str | Path]]:
    """A merged and quantized export beside a living adapter, and what `verify` has to be told."""
    tone, other = adapter(seed=1), adapter(seed=2)
    recipe = written(f"adapters: {{tone: {tone}, other: {other}}}\n{STEPS}")
    out = tmp_path / "out"
    command(recipe, "--out", out, "--set", 'evaluate.prompts=["the river \U0001f6a4"]')
    sources = ["--model", base, "--adapter", f"tone={tone}", "--adapter", f"other={other}"]
    return out, [out, *sources, "--data", texts["evaluation"].parent]


def test_every_figure_is_measured_again_and_is_the_same(exported, capsys):
    found = verified(capsys, *exported[1])
    assert found["verified"] and not found["problems"] and found["files"] > 3
    again = results(found)
    # What was merged is merged again, and its figure too; only what rounding measured of itself is not.
    assert {"perplexity", "perplexity_base", "kl", "top1", "merge_kl", "adapters.other.cosine", "bytes"} <= set(again)
    assert set(again.values()) == {"same"}


def test_the_whole_recipe_made_again_gives_the_same_bytes(exported, capsys):
    found = verified(capsys, *exported[1], "--rebuild")
    assert found["verified"] and "every file came out the same" in found["notes"]
    assert set(results(found).values()) == {"same"}


def test_a_changed_file_a_wrong_figure_and_a_new_file_are_found(exported, capsys):
    out, words = exported
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["scores"]["top1"] -= 0.1
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "generation_config.json").write_text("{}")
    (out / "more.txt").write_text("more")
    found = verified(capsys, *words, expect=3)
    assert not found["verified"] and results(found)["top1"] == "differs"
    assert sorted(found["problems"]) == [
        "generation_config.json is not the file of the manifest", "more.txt is not in the manifest",
    ]  # fmt: skip


def test_weights_that_cannot_be_read_any_more_are_what_was_found(exported, capsys):
    out, words = exported
    os.truncate(out / "model.safetensors", 5000)
    found = verified(capsys, *words, expect=3)
    assert found["problems"] == ["model.safetensors is not the file of the manifest"]
    assert "its figures cannot be measured: " in " ".join(found["notes"])
    assert set(results(found).values()) == {"not repeated"}


@pytest.mark.parametrize("manifest", ["{}", "[1]", '{"files": {', '{"manifest_version": 3, "short_name": "x"}'])
def test_a_manifest_of_another_program_or_half_of_one_is_no_claim(manifest, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(manifest)
    command("verify", tmp_path, expect=2)
    assert "is none that `loradock optimize` wrote, or not all of it: it lacks " in capsys.readouterr().err


def test_another_original_adapter_or_text_is_refused(exported, adapter, base, tmp_path, texts, capsys):
    out, words = exported
    strange = adapter(seed=3)
    command("verify", *[word if not str(word).startswith("tone=") else f"tone={strange}" for word in words], expect=2)
    assert "the adapter 'tone'" in capsys.readouterr().err
    other = tmp_path / "base"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    command("verify", *[word if word != base else other for word in words], expect=2)
    assert "config.json differs" in capsys.readouterr().err
    moved = tmp_path / "texts"
    shutil.copytree(texts["evaluation"].parent, moved)
    text = moved / texts["evaluation"].name
    text.write_text(text.read_text().replace("river", "lake"))
    command("verify", *[moved if word == texts["evaluation"].parent else word for word in words], expect=2)
    assert "the evaluation text is not the export's" in capsys.readouterr().err
    command("verify", out, "--model", base, "--data", texts["evaluation"].parent, expect=2)
    assert "say --adapter other=FOLDER" in capsys.readouterr().err


def test_an_export_of_others_is_measured_and_held_against_what_is_claimed(exported, base, texts, capsys):
    out, words = exported
    claimed = json.loads((out / "manifest.json").read_text())["scores"]
    (out / "manifest.json").unlink()
    command("verify", out, expect=2)
    assert "name the model that it came from with --model" in capsys.readouterr().err
    on = [f"evaluate.text={texts['evaluation']}", "evaluate.samples=8", "evaluate.tokens=48", "evaluate.engine=false"]
    words = [out, "--model", base, *(word for setting in on for word in ("--set", setting))]
    # Nothing is merged there: what it is held against is the base.
    found = verified(capsys, *words, "--expect", f"bytes={claimed['bytes']}")
    assert results(found)["bytes"] == "same" and results(found)["kl"] == "measured"
    assert "there is no manifest.json: nothing is claimed but by --expect" in found["notes"]
    found = verified(capsys, *words, "--expect", "perplexity=1", expect=3)
    assert results(found)["perplexity"] == "differs"
    command("verify", *words, "--expect", "perplexity=low", expect=2)
    command("verify", *words, "--rebuild", expect=2)


def test_a_gguf_file_of_others_is_no_checkpoint_and_the_command_says_so(base, tmp_path, capsys):
    """It blamed the tokenizer (exit code 1), and said of the file's own name that there is no such folder."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command("verify", tmp_path, "--model", base, expect=2)
    command("verify", tmp_path / "model.gguf", "--model", base, expect=2)
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "no manifest.json, and no config.json either: of others, a checkpoint or an ONNX export is" in first
    assert second.endswith("model.gguf is no folder: name the one that holds the export")


def test_an_original_that_comes_along_is_found_by_the_name_that_the_recipe_gave(
    written, base, texts, tmp_path, capsys, steps_here
):
    """The manifest had the name of its folder, which nobody can fetch."""
    recipe = written("steps: [{quantize: {scheme: w8a8, method: rtn}}]\ngate: {max_size: 2}\n")
    recipe.write_text(recipe.read_text().replace(f"model: {base}", "model: small"))
    out = tmp_path / "out"

    def along(name: str) -> Path:
        assert name == "small"
        return base

    words = ["verify", out, "--data", texts["evaluation"].parent]
    for command_line in ([recipe, "--out", out], words):
        assert cli.run([str(word) for word in command_line], along) == 0
    assert json.loads((out / "manifest.json").read_text())["recipe"]["model"] == "small"


def pair(folder: Path, kind: Any) -> tuple[Path, Path]:
    private = kind()
    files = folder / "private.pem", folder / "public.pem"
    plain = serialization.NoEncryption()
    files[0].write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    files[1].write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return files


@pytest.mark.parametrize("kind", [lambda: ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate])
def test_a_signed_manifest_is_its_makers_alone(kind, written, base, texts, tmp_path, capsys, steps_here):
    private, public = pair(tmp_path, kind)
    out = tmp_path / "signed"
    command(written("steps: []"), "--out", out, "--sign", private)
    words = [out, "--model", base, "--data", texts["evaluation"].parent, "--key", public]
    assert "signed by the owner of public.pem" in verified(capsys, *words)["notes"]
    assert "signed; --key FILE" in " ".join(verified(capsys, *words[:-2])["notes"])
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"kl": 0', '"kl": 1'))
    command("verify", *words, expect=3)
    assert "not what the owner of" in capsys.readouterr().err
    (out / "manifest.json.sig").unlink()
    command("verify", *words, expect=3)
    assert "not signed" in capsys.readouterr().err
    command("verify", *words[:-1], private, expect=2)
    assert "no public key in PEM" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, claimed, measured, result",
    [
        ("perplexity", 36.07, 36.2, "close"),
        ("perplexity", 36.07, 37.0, "differs"),
        ("adapters.tone.kl", 0.1, 0.111, "close"),
        ("kl", 0.1, 0.2, "differs"),
        ("bytes", 1000, 1001, "differs"),
        ("engine_top1", 0.9, 0.91, "close"),
        ("tasks.original.arc_easy", 0.5, 0.51, "close"),
        ("top1", 0.9, None, "not repeated"),
        ("top1", None, 0.9, "measured"),
    ],
)
def test_what_another_processor_may_change_is_close_and_more_differs(name, claimed, measured, result):
    assert Figure(name, claimed, measured).result == result
