"""An ONNX export with KV cache inputs, checked against PyTorch, and ONNX Runtime to ask it.

The graph comes from transformers' own exporter, in fp32; int8 and int4 are ONNX Runtime's weight quantizer over it,
a scale for every 32 weights; activations are rounded to 8 bits, 32 at a time, where they are multiplied. One file,
model.onnx, with its weights beside it in model.onnx.data.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimize.checkpoint.checkpoint import copy_side_files
from optimize.checkpoint.model import settle, tokenizer
from optimize.errors import OptimizeError, Refused
from optimize.job import Job, Progress

GRAPH = "model.onnx"
GREEDY = 64  # tokens of the parity check
TOLERANCE = 1e-4  # of fp32's logits
PROBE = "The harbour was quiet that morning, and the boats lay still beside the wall while the baker carried bread."
BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # weights that share a scale


class Session:
    """ONNX Runtime over an export: logits of whole windows, or token by token with the cache."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        if not (folder / GRAPH).is_file():
            raise Refused(f"{folder} is no ONNX export: it has no {GRAPH}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = onnxruntime.get_available_providers()
        wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in providers]
        self.session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=wanted)
        self.provider = self.session.get_providers()[0]
        names = [item.name for item in self.session.get_inputs()]
        self.placed = "position_ids" in names
        self.cache = [name for name in names if "past_key_values" in name]
        config = json.loads((folder / "config.json").read_text())
        heads = config["num_key_value_heads"]
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.empty = np.zeros((1, heads, 0, width), np.float32)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, vocabulary) without a cache."""
        return torch.cat([torch.from_numpy(self.step(row.numpy(), None)[0]) for row in ids.split(1)])

    def step(self, ids: np.ndarray, cache: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (1, tokens, vocabulary) of `ids` (1, tokens) behind what the cache holds, and the cache after."""
        cache = cache or [self.empty] * len(self.cache)
        past, now = cache[0].shape[2], ids.shape[1]
        feed = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((1, past + now), np.int64),
            **dict(zip(self.cache, cache, strict=True)),
        }
        if self.placed:
            feed["position_ids"] = np.arange(past, past + now, dtype=np.int64)[None]
        first, *rest = self.session.run(None, feed)
        return first, rest

    def greedy(self, ids: list[int], count: int, ends: frozenset[int] = frozenset()) -> list[int]:
        """`count` tokens after `ids`, or fewer when one of `ends` comes."""
        generated: list[int] = []
        logits, cache = self.step(np.array([ids]), None)
        while len(generated) < count:
            token = int(logits[0, -1].argmax())
            if token in ends:
                break
            generated.append(token)
            logits, cache = self.step(np.array([[token]]), cache)
        return generated


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    folder, out = Path(job.model), job.folder / "model"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    precision = job.options["precision"]
    progress(0, 4, "exporting the graph")
    model = _reference(folder)
    aside = job.folder / "fp32"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    _export(model, aside / GRAPH)
    progress(1, 4, f"weights to {precision}")
    _rounded(aside, out, precision)
    shutil.rmtree(aside, ignore_errors=True)
    copy_side_files(folder, out)
    shutil.copyfile(folder / "config.json", out / "config.json")
    progress(2, 4, "checking against PyTorch")
    notes = _parity(model, folder, out)
    if precision == "fp32" and (notes["logits_off"] > TOLERANCE or notes["greedy_same"] < GREEDY):
        raise OptimizeError(f"the ONNX graph does not compute what PyTorch does: {notes}")
    return {"precision": precision, **notes, "scores": {"logit_difference": notes["logits_off"]}}


def answered(folder: Path, prompt: str, tokens: int) -> tuple[str, float]:
    """A greedy answer to `prompt`, and tokens a second."""
    session, words = Session(folder), tokenizer(folder)
    text = prompt
    if words.chat_template:
        message = [{"role": "user", "content": prompt}]
        text = words.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ends = {words.eos_token_id}
    file = folder / "generation_config.json"
    if file.is_file():
        stops = json.loads(file.read_text()).get("eos_token_id") or []
        ends |= set(stops if isinstance(stops, list) else [stops])
    start = time.monotonic()
    ids = words(text, add_special_tokens=not words.chat_template).input_ids
    generated = session.greedy(ids, tokens, frozenset(ends))
    seconds = time.monotonic() - start
    return words.decode(generated, skip_special_tokens=True).strip(), max(1, len(generated)) / seconds


def _reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def _export(model: Any, file: Path) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    # Sizes that differ from one another and from the model's own, so that each axis becomes a symbol of its own.
    past, now, rows = 7, 3, 2
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = model(torch.arange(5, 5 + rows * past).view(rows, past), use_cache=True).past_key_values
        inputs = {
            "input_ids": torch.arange(5, 5 + rows * now).view(rows, now),
            "attention_mask": torch.ones(rows, past + now, dtype=torch.long),
            "position_ids": torch.arange(past, past + now).expand(rows, now).contiguous(),
            "past_key_values": cache,
            "use_cache": True,
        }
        OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, output_path=str(file)))


def _rounded(source: Path, out: Path, precision: str) -> None:
    """The graph with weights of `precision`, in `out`."""
    import onnx

    if precision == "fp32":
        for file in source.iterdir():
            shutil.copyfile(file, out / file.name)
        return
    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        # Inputs and outputs stay fp32, so that the caller need not know the precision.
        half = convert_float_to_float16(onnx.load(source / GRAPH), keep_io_types=True, disable_shape_infer=True)
        onnx.save(half, out / GRAPH, save_as_external_data=True, location=f"{GRAPH}.data")
        return
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source / GRAPH), bits=BITS[precision], block_size=BLOCK, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out / GRAPH), use_external_data_format=True)


def _parity(model: Any, folder: Path, out: Path) -> dict[str, Any]:
    """The prefill's logits and a greedy decode through the cache, against PyTorch."""
    session, words = Session(out), tokenizer(folder)
    ids = words(PROBE, add_special_tokens=False).input_ids
    with torch.no_grad():
        reference = model(torch.tensor([ids])).logits
        whole = torch.tensor([ids])
        cache, expected = None, []
        for _ in range(GREEDY):
            made = model(whole, past_key_values=cache, use_cache=True)
            cache, whole = made.past_key_values, made.logits[:, -1:].argmax(-1)
            expected.append(int(whole))
    off = float((session.logits(torch.tensor([ids])) - reference).abs().max())
    start = time.monotonic()
    generated = session.greedy(ids, GREEDY)
    speed = GREEDY / (time.monotonic() - start)
    same = next((at for at, (a, b) in enumerate(zip(generated, expected, strict=True)) if a != b), GREEDY)
    print(f"{speed:.1f} tokens/s through ONNX Runtime")
    return {"logits_off": round(off, 6), "greedy_same": same, "provider": session.provider}
