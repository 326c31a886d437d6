"""Exports as others make them: llm-compressor's layout by compressed-tensors' own compressor, PEFT's merge saved by
transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def llm_compressor(base: Path, folder: Path, order: str = "") -> dict[str, torch.Tensor]:
    """W4A16_ASYM of the model in `base`, its targets and what it ignores as regular expressions; with `order` a group's
    columns lie anywhere. What each rounded weight is, by their own decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32, actorder=order or None)
    scheme = QuantizationScheme(targets=["re:.*(self_attn|mlp).*"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors, right = {}, {}
    for name, stored in load_file(base / "model.safetensors").items():
        weight = stored.float()
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        groups = weight.view(len(weight), -1, 32)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        parts = {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zero}
        if order:
            places = torch.arange(weight.shape[1]) // 32
            parts["weight_g_idx"] = places[torch.randperm(len(places))].int()
        made = compressor.compress(parts, scheme)
        right[name] = compressor.decompress(made, scheme)["weight"].float()
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in made.items()}
    shutil.copytree(base, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    group = {**scheme.model_dump(mode="json"), "format": "pack-quantized"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    config |= {"ignore": ["re:.*lm_head"], "quantization_status": "compressed"}
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, "quantization_config": config}))
    return right


def peft_merged(base: Path, adapter: Path, folder: Path) -> None:
    """`merge_and_unload`, saved in bfloat16 with the tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
