"""Uploads of every kind of adapter with exactly one thing wrong, each beside the sound one that it was made of.

The sound ones are over the embedded model, with random weights that move every token. What refuses a wrong one
therefore refuses what is wrong with it.
"""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.support import gguf_files
from tests.support.lora import CONFIG, WEIGHTS
from tests.support.server import BASE

HIDDEN, VOCABULARY, LAYERS, RANK = 576, 49_152, 30, 4
PREFIX = "base_model.model."
# What a LoRA adapts here, and what the kinds that are converted do.
MODULES = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(LAYERS)]
FEW = [MODULES[4], MODULES[20]]
FIRST = PREFIX + MODULES[0]
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
SCORE, BIAS = f"{PREFIX}score.weight", f"{PREFIX}score.bias"
WORDS = ("<call>", "ACME-7")
MILLION = 1_000_000


@dataclass
class Upload:
    """An adapter's files, before they are written."""

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]
    notes: dict[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        notes = {
            name: note if isinstance(note, bytes) else json.dumps(note).encode() for name, note in self.notes.items()
        }
        return {CONFIG: json.dumps(self.settings).encode(), WEIGHTS: save(self.tensors), **notes}

    def put(self, name: str, change: Callable[[np.ndarray], Any]) -> None:
        """Change a tensor in place, or for what is answered."""
        changed = change(self.tensors[name])
        if isinstance(changed, np.ndarray):
            self.tensors[name] = changed

    @property
    def added(self) -> list[dict[str, Any]]:
        tokens: list[dict[str, Any]] = self.notes["tokenizer.json"]["added_tokens"]
        return tokens


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong, and what the refusal says of it."""

    what: str
    edit: Callable[[Any], Any]
    says: str


def drawn(*shape: int, size: float, seed: int = 0) -> np.ndarray:
    return (size * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def entry(number: int, value: float) -> Callable[[np.ndarray], None]:
    def put(values: np.ndarray) -> None:
        values.flat[number] = value

    return put


def tensor(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Upload], None]:
    return lambda upload: upload.put(name, change)


def without(name: str) -> Callable[[Upload], Any]:
    return lambda upload: upload.tensors.pop(name)


def beside(name: str, values: np.ndarray) -> Callable[[Upload], None]:
    return lambda upload: upload.tensors.__setitem__(name, values)


def setting(**changes: Any) -> Callable[[Upload], None]:
    return lambda upload: upload.settings.update(changes)


# Sound ones


def lora(seed: int = 0, rank: int = RANK, size: float = 0.1) -> Upload:
    tensors = {}
    for number, module in enumerate(MODULES, 100 * seed):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = drawn(rank, HIDDEN, size=0.04, seed=number)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = drawn(HIDDEN, rank, size=size, seed=number)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["o_proj"]}
    return Upload({**settings, "base_model_name_or_path": BASE}, tensors)


def ranked() -> Upload:
    """With a rank and an alpha of one module's own."""
    made = lora()
    made.settings |= {
        "rank_pattern": {"layers.0.self_attn.o_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 3},
    }
    made.put(f"{FIRST}.lora_A.weight", lambda a: a[:2])
    made.put(f"{FIRST}.lora_B.weight", lambda b: np.ascontiguousarray(b[:, :2]))
    return made


@cache
def weights() -> dict[str, np.ndarray]:
    """The base's own weights of the modules, in float32."""
    import torch
    from safetensors import safe_open

    from serve.models.embedded import ensure

    with safe_open(ensure(BASE) / "model.safetensors", "pt") as file:
        return {module: file.get_tensor(f"{module}.weight").to(torch.float32).numpy() for module in MODULES}


MAGNITUDE = f"{FIRST}.lora_magnitude_vector"


def dora() -> Upload:
    """Magnitudes some percent off the norms, as if they were trained; a few of them are negative."""
    made = lora()
    made.settings["use_dora"] = True
    for number, module in enumerate(MODULES):
        a, b = (made.tensors[f"{PREFIX}{module}.lora_{half}.weight"] for half in "AB")
        norms = np.linalg.norm(weights()[module] + b @ a, axis=1)
        magnitudes = norms * (1 + drawn(HIDDEN, size=0.05, seed=number))
        magnitudes[:2] *= -1
        made.tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitudes.astype(np.float32)
    return made


def head() -> Upload:
    made = lora()
    made.settings |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    made.settings |= {"id2label": {"0": "good", "1": "bad", "2": "neither"}}
    made.tensors[SCORE] = drawn(3, HIDDEN, size=0.1)
    return made


def words() -> Upload:
    """Rows of two common tokens and of two that the base does not have, with their tokenizer."""
    made = lora()
    numbers = [260, 282, *range(VOCABULARY, VOCABULARY + len(WORDS))]
    made.settings["trainable_token_indices"] = numbers
    made.tensors[ROWS] = drawn(len(numbers), HIDDEN, size=0.1)
    tokens = [{"id": VOCABULARY + number, "content": word} for number, word in enumerate(WORDS)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    made.notes["tokenizer.json"] = {"version": "1.0", "added_tokens": [{**token, **flags} for token in tokens]}
    return made


def _converted(kind: str, **settings: Any) -> Upload:
    return Upload({"peft_type": kind, "target_modules": FEW, "base_model_name_or_path": BASE, **settings}, {})


def loha() -> Upload:
    made = _converted("LOHA", r=2, alpha=2)
    for number, module in enumerate(FEW):
        for factor in ("w1", "w2"):
            made.tensors[f"{PREFIX}{module}.hada_{factor}_a"] = drawn(HIDDEN, 2, size=0.7, seed=number)
            made.tensors[f"{PREFIX}{module}.hada_{factor}_b"] = drawn(2, HIDDEN, size=0.7, seed=number)
    return made


def lokr() -> Upload:
    made = _converted("LOKR", r=2, alpha=2, decompose_factor=4)
    for number, module in enumerate(FEW):
        made.tensors[f"{PREFIX}{module}.lokr_w1"] = drawn(4, 4, size=0.7, seed=number)
        made.tensors[f"{PREFIX}{module}.lokr_w2_a"] = drawn(HIDDEN // 4, 2, size=0.7, seed=number)
        made.tensors[f"{PREFIX}{module}.lokr_w2_b"] = drawn(2, HIDDEN // 4, size=0.7, seed=number)
    return made


def vera() -> Upload:
    made = _converted("VERA", r=8)
    made.tensors[f"{PREFIX.removesuffix('model.')}vera_A"] = drawn(8, HIDDEN, size=0.3)
    made.tensors[f"{PREFIX.removesuffix('model.')}vera_B"] = drawn(HIDDEN, 8, size=0.3)
    for number, module in enumerate(FEW):
        made.tensors[f"{PREFIX}{module}.vera_lambda_b"] = drawn(HIDDEN, size=1, seed=number)
        made.tensors[f"{PREFIX}{module}.vera_lambda_d"] = drawn(8, size=1, seed=number)
    return made


@dataclass
class OneFile:
    """A GGUF file."""

    data: bytes

    def files(self) -> dict[str, bytes]:
        return {"adapter.gguf": self.data}

    def cut(self, length: int) -> None:
        self.data = self.data[:length]

    def write(self, at: int, new: bytes) -> None:
        self.data = self.data[:at] + new + self.data[at:][len(new) :]


def gguf() -> OneFile:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in lora().files().items():
            (Path(folder) / name).write_bytes(data)
        return OneFile(gguf_files.adapter(Path(folder) / "adapter.gguf", Path(folder)).read_bytes())


# What is wrong with each


A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
HADA, LOKR, VERA = (f"{PREFIX}{FEW[0]}.{factor}" for factor in ("hada_w2_b", "lokr_w2_a", "vera_lambda_d"))
ENDLESS = r"(.|..|...)*(?!.)(?<=0)"
NAN, INFINITE = "holds NaN or infinity", "not finite|all as likely"


def _token(**changes: Any) -> Callable[[Upload], None]:
    """The second of the tokens that it adds."""
    return lambda upload: upload.added[1].update(changes)


def _names(count: int) -> Callable[[Upload], None]:
    return setting(id2label={str(number): f"l{number}" for number in range(count)})


def _rows(first: int, second: int) -> Callable[[Upload], None]:
    return setting(trainable_token_indices=[first, second, VOCABULARY, VOCABULARY + 1])


def _bias_alone(upload: Upload) -> None:
    upload.tensors[BIAS] = upload.tensors.pop(SCORE)[:, 0].copy()


def _many_tokens(count: int, first: int = VOCABULARY) -> Callable[[Upload], None]:
    def add(upload: Upload) -> None:
        tokens = [{"id": first + number, "content": f"<x{number}>"} for number in range(count)]
        upload.notes["tokenizer.json"]["added_tokens"] = tokens

    return add


def _gap(upload: Upload) -> None:
    """A number between its tokens is nobody's."""
    upload.settings["trainable_token_indices"][-1] = upload.added[1]["id"] = VOCABULARY + 2


def _beyond(upload: Upload) -> None:
    """Rows of a token that is far beyond the vocabulary."""
    upload.settings["trainable_token_indices"][-1] = upload.added[1]["id"] = VOCABULARY + 2000


TYPE = struct.pack("<Q", 7)


def replaced(old: bytes, new: bytes) -> Callable[[OneFile], None]:
    def replace(file: OneFile) -> None:
        assert old in file.data
        file.data = file.data.replace(old, new, 1)

    return replace


def alpha(value: float) -> bytes:
    return b"alpha" + struct.pack("<If", 6, value)


def size(rank: int) -> bytes:
    return b"lora_a" + struct.pack("<IQQ", 2, HIDDEN, rank)


# Kinds that a process of its own makes LoRA of.
CONVERTED = ("LoHa", "LoKr", "VeRA")
CATALOGUE: dict[str, tuple[Callable[[], Any], list[Wrong]]] = {
    "LoRA": (
        ranked,
        [
            Wrong("a rank pattern that lies", setting(rank_pattern={"layers.0.self_attn.o_proj": 3}), "rank 3 want"),
            Wrong("no rank pattern", setting(rank_pattern={}), r"is \[2, 576\]; the base and rank 4 want"),
            Wrong("a pattern of every module", setting(rank_pattern={".*": 2}), r"is \[4, 576\]; the base and rank 2"),
            Wrong("a rank above the bound", setting(rank_pattern={"layers.0.self_attn.o_proj": 17}), "17 is above"),
            Wrong("a rank of a billion", setting(rank_pattern={"layers.0": 10**9}), "rank 1000000000 is above"),
            Wrong("a rank that is no number", setting(rank_pattern={"layers.0": "2"}), "whole numbers above 0"),
            Wrong("a rank below 0", setting(rank_pattern={"layers.0": -2}), "whole numbers above 0"),
            Wrong("a pattern without an end", setting(rank_pattern={ENDLESS: 2}), "in rank_pattern takes too long"),
            Wrong("an alpha without an end", setting(alpha_pattern={"layers.1": 1e300}), "finite numbers above 0"),
            Wrong("an alpha of 0", setting(alpha_pattern={"layers.1": 0}), "finite numbers above 0"),
            Wrong("a large alpha", setting(alpha_pattern={"layers.1.self_attn.o_proj": 9.9e29}), INFINITE),
            Wrong("numbers that overflow", tensor(B, lambda b: b * 1e37), INFINITE),
            Wrong("half a pair", without(B), "has lora_A and no lora_B"),
        ],
    ),
    "DoRA": (
        dora,
        [
            Wrong("one NaN", tensor(MAGNITUDE, entry(9, np.nan)), NAN),
            Wrong("one infinity", tensor(MAGNITUDE, entry(9, -np.inf)), NAN),
            Wrong("zeros", tensor(MAGNITUDE, np.zeros_like), "is zero throughout"),
            Wrong("one too few", tensor(MAGNITUDE, lambda m: m[:-1]), r"is \[575\]; the base wants \[576\]"),
            Wrong("a million", beside(MAGNITUDE, np.ones(MILLION, np.float32)), r"is \[1000000\]; the base wants"),
            Wrong("none at all", tensor(MAGNITUDE, lambda m: m[:0]), r"is \[0\]; the base wants \[576\]"),
            Wrong("a column", tensor(MAGNITUDE, lambda m: m[:, None]), r"is \[576, 1\]; the base wants \[576\]"),
            Wrong("whole numbers", tensor(MAGNITUDE, lambda m: m.astype(np.int32)), "is I32; save the adapter as"),
            Wrong("one that is missing", without(MAGNITUDE), "has no lora_magnitude_vector"),
            Wrong("two of a module", beside(f"{MAGNITUDE}.weight", np.ones(HIDDEN, np.float32)), "second lora_magni"),
            Wrong("one of no module", beside(f"{PREFIX}model.x.lora_magnitude_vector", np.ones(9)), "fits no module"),
            Wrong("magnitudes of a LoRA", setting(use_dora=False), "is a magnitude, and use_dora is not set"),
            Wrong("one that overflows", tensor(MAGNITUDE, entry(9, 3e38)), "too large for the base"),
            Wrong("all that overflow", tensor(MAGNITUDE, lambda m: m * 1e30), "too large for the base"),
            Wrong("no true or false", setting(use_dora="yes"), "use_dora is yes; it must be true or false"),
        ],
    ),
    "head": (
        head,
        [
            Wrong("a million labels", beside(SCORE, np.ones((MILLION, 4), np.float16)), "1000000 labels; up to 127"),
            Wrong("a label too many", beside(SCORE, drawn(128, HIDDEN, size=0.1)), "128 labels; up to 127"),
            Wrong("no label", tensor(SCORE, lambda w: w[:0]), "must have a row for each label"),
            Wrong("a line", tensor(SCORE, np.ravel), "must have a row for each label"),
            Wrong("a column too few", tensor(SCORE, lambda w: w[:, :-1].copy()), "576 columns"),
            Wrong("one NaN", tensor(SCORE, entry(9, np.nan)), NAN),
            Wrong("numbers that overflow", tensor(SCORE, lambda w: w * 1e38), INFINITE),
            Wrong("zeros", tensor(SCORE, np.zeros_like), "says the same of every text"),
            Wrong("whole numbers", tensor(SCORE, lambda w: w.astype(np.int8)), "is I8; save the adapter as"),
            Wrong("another head", beside(f"{PREFIX}classifier.weight", drawn(3, HIDDEN, size=1)), "2 classification"),
            Wrong("a bias alone", _bias_alone, "0 classification heads with a weight"),
            Wrong("a bias of more", beside(BIAS, np.ones(5, np.float32)), r"is \[5\], and its weight \[3, 576\]"),
            Wrong("names twice", setting(id2label={"0": "good", "1": "good"}), "different printable names"),
            Wrong("a million names", _names(MILLION // 2), f"{CONFIG} is above"),
            Wrong("more names than fit", _names(128), "up to 127 numbers"),
            Wrong("a name that turns text", setting(id2label={"0": "\u202egood"}), "printable names"),
            Wrong("no names", setting(id2label=["good", "bad"]), "it must map up to 127 numbers"),
        ],
    ),
    "tokens": (
        words,
        [
            Wrong("a control token inside", _token(content="<|im_start|>user"), "would swallow <\\|im_start\\|>"),
            Wrong("a control token's end", _token(content="a<|im_end|>"), "would swallow <\\|im_end\\|>"),
            Wrong("a control token's begin", _token(content="x<|im_"), "would swallow"),
            Wrong("another number", _gap, "has the number 49154, and this base's tokenizer gives it 49153"),
            Wrong("a number below 0", _token(id=-1), "is no token"),
            Wrong("a number twice", _token(id=VOCABULARY), "a text or a number twice"),
            Wrong("a text twice", _token(content=WORDS[0]), "a text or a number twice"),
            Wrong("a line's end", _token(content="a\nb"), "is no token"),
            Wrong("a text that turns", _token(content="\u202eab"), "is no token"),
            Wrong("a text of spaces", _token(content="   "), "is no token"),
            Wrong("a long text", _token(content="x" * 129), "is no token"),
            Wrong("a million tokens", _many_tokens(MILLION), "this upload is above"),
            Wrong("many tokens", _many_tokens(MILLION // 4), "MiB of added tokens"),
            Wrong("tokens in the place of others", _many_tokens(1025, 5), "1025 tokens; this server takes"),
            Wrong("a token in the place of another", _token(id=5), "has the number 5, and this base's tokenizer gives"),
            Wrong("half a tokenizer", lambda u: u.notes.update({"tokenizer.json": b'{"added_tokens": [{"id":'}),
                  "is not the JSON that a tokenizer is saved as"),
            Wrong("a row far beyond", _beyond, "at most 1024 beyond"),
            Wrong("a row too few", tensor(ROWS, lambda r: r[:-1]), "has 3 rows, and trainable_token_indices names 4"),
            Wrong("a row twice", _rows(260, 260), "names 3 tokens"),
            Wrong("a row of no token", _rows(-1, 282), "a list of token numbers"),
            Wrong("a column too few", tensor(ROWS, lambda r: r[:, :-1].copy()), "576 columns"),
            Wrong("one NaN", tensor(ROWS, entry(9, np.nan)), NAN),
            Wrong("no rows", without(ROWS), "has no rows of tokens"),
            Wrong("no indices", setting(trainable_token_indices=None), "names no tokens of it"),
        ],
    ),
    "LoHa": (
        loha,
        [
            Wrong("a factor that is missing", without(HADA), "hada_w2_b"),
            Wrong("a factor that lies across", tensor(HADA, lambda f: f.T.copy()), r"is \[576, 2\]; the base and the"),
            Wrong("one NaN", tensor(HADA, entry(9, np.nan)), NAN),
            Wrong("whole numbers", tensor(HADA, lambda f: f.astype(np.int32)), "is I32"),
            Wrong("numbers that overflow", tensor(HADA, lambda f: f * 3e37), INFINITE),
            Wrong("a pattern without an end", setting(target_modules=ENDLESS), "in target_modules takes too long"),
        ],
    ),
    "LoKr": (
        lokr,
        [
            Wrong("a factor that is missing", without(LOKR), "lokr_w2_a"),
        ],
    ),
    "VeRA": (
        vera,
        [
            Wrong("a factor that is missing", without(VERA), "vera_lambda_d"),
            Wrong("no projection", without("base_model.vera_A"), "vera_A"),
        ],
    ),
    "GGUF": (
        gguf,
        [
            Wrong("half of it", lambda file: file.cut(len(file.data) // 2), "does not lie where it may"),
            Wrong("its head alone", lambda file: file.cut(24), "GGUF"),
            Wrong("another version", lambda file: file.write(4, struct.pack("<I", 99)), "99"),
            Wrong("2^60 tensors", lambda file: file.write(8, struct.pack("<Q", 1 << 60)), "GGUF"),
            Wrong("2^60 fields", lambda file: file.write(16, struct.pack("<Q", 1 << 60)), "GGUF"),
            Wrong("another architecture", replaced(b"llama", b"lloma"), "the architecture 'lloma'"),
            Wrong("a model", replaced(TYPE + b"adapter", TYPE + b"modeled"), "is a modeled, not an adapter"),
            Wrong("an alpha that is none", replaced(alpha(RANK), alpha(np.nan)), "alpha"),
            Wrong("a size that lies", replaced(size(RANK), size(RANK + 1)), "does not lie where it may"),
            Wrong("one NaN", lambda file: file.write(len(file.data) - 4, struct.pack("<f", np.nan)), NAN),
        ],
    ),
}  # fmt: skip


def wrong(kind: str, number: int) -> Any:
    """The sound one of a kind with its number's thing wrong."""
    make, wrongs = CATALOGUE[kind]
    made = copy.deepcopy(make())
    wrongs[number].edit(made)
    return made
