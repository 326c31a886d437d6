"""The process that converts: what reaches it, what it may take, and what its client is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serve.adapters.adapter import CONFIG, WEIGHTS, Limits
from serve.adapters.conversion import conversion
from serve.adapters.conversion.conversion import convert
from serve.adapters.conversion.kinds import convertible
from serve.errors import AdapterRejected
from tests.support.waiting import settled

MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.embed_tokens": (16, 40)}
LIMITS = Limits(max_rank=8)
SLEEPER = "import os, time; open(os.environ['PID_FILE'], 'w').write(str(os.getpid())); time.sleep(60)"


def loha(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LOHA", "r": 1, "alpha": 2, "target_modules": ["q_proj"], **changes}
    (folder / CONFIG).write_text(json.dumps(settings))
    draw = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.hada_w"
    own = {f"{name}{number}_a": torch.randn(16, 1, generator=draw) for number in (1, 2)}
    own |= {f"{name}{number}_b": torch.randn(1, 16, generator=draw) for number in (1, 2)}
    save_file(own if tensors is None else tensors, folder / WEIGHTS)
    return folder


async def converted(folder: Path, limits: Limits = LIMITS) -> conversion.Conversion:
    into = folder / "into"
    into.mkdir()
    settings = convertible(folder)
    assert settings is not None
    return await convert(folder, into, settings, MODULES, limits)


async def refused(folder: Path) -> str:
    with pytest.raises(AdapterRejected) as refusal:
        await converted(folder)
    return " | ".join([refusal.value.message, *refusal.value.problems])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias none"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "MiSS adapter with init_weights bat"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": "((a{999}){999}){999}"}, "counted repeats"),
        ({"target_modules": "(x+x+)+y|" + "(.*.*.*.*.*.*.*.*)*z"}, "target_modules"),
        ({"target_modules": "nothing_of_it"}, "matches no module"),
    ],
)
async def test_a_hostile_configuration_reaches_no_process(tmp_path, monkeypatch, changes, sentence) -> None:
    monkeypatch.setattr(conversion.subprocess, "Popen", None)
    assert sentence in await refused(loha(tmp_path, **changes))


async def test_hostile_values_reach_no_process(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(conversion.subprocess, "Popen", None)
    name = "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"
    assert "NaN or infinity" in await refused(loha(tmp_path / "nan", {name: torch.full((16, 1), torch.nan)}))
    assert "I64; save" in await refused(loha(tmp_path / "ids", {name: torch.ones(16, 1, dtype=torch.int64)}))


async def test_a_rank_that_takes_all_memory_is_refused_and_takes_none(tmp_path) -> None:
    assert "takes more than" in await refused(loha(tmp_path, r=2_000_000_000))


async def test_what_is_no_adapter_of_these_kinds_is_left_to_the_inspection(tmp_path) -> None:
    for text in ("{", "[]", '{"peft_type": "LORA"}', '{"peft_type": ["LOHA"]}', '{"peft_type": "IA3"}'):
        (tmp_path / CONFIG).write_text(text)
        assert convertible(tmp_path) is None


async def test_a_conversion_ends_with_its_time_and_with_whoever_waits_for_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "PROGRAM", tmp_path / "sleeper.py")
    monkeypatch.setattr(conversion, "_LOOK_SECONDS", 0.01)
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    converting = asyncio.create_task(converted(loha(tmp_path / "left")))
    assert await settled(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    converting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await converting
    pid = int((tmp_path / "pid").read_text())
    assert await settled(lambda: not Path(f"/proc/{pid}").exists())
    monkeypatch.setattr(conversion, "SECONDS", 0.05)
    assert "was not converted within 0.05 s" in await refused(loha(tmp_path / "slow"))


async def test_a_program_that_breaks_is_a_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "PROGRAM", tmp_path / "broken.py")
    (tmp_path / "broken.py").write_text("import peft_that_is_not_installed")
    assert "install loradock with its extra" in await refused(loha(tmp_path / "missing"))
    (tmp_path / "broken.py").write_text("""print('{"problems": ["rank 9 would be needed", "\\\\u001b[31m"]}')""")
    assert "cannot be converted: 2 things are wrong, first of all that rank 9" in await refused(loha(tmp_path / "no"))
    (tmp_path / "broken.py").write_text("raise SystemError('worse')")
    assert "SystemError: worse" in await refused(loha(tmp_path / "worse"))
