"""Whether loradock's CPU kernels answer as vLLM's own LoRA path does: greedy answers with their log-probabilities.

For every format of weights the embedded model is answered from, and for every family a small random model. Two offline
engines, one after the other, get the same prompts for the same four adapters and the base, mixed. A token may differ
only where the first engine found both tokens about equally likely: by how many nats is each case's own, and so is how
far log-probabilities may move. Answers of one adapter held against those of another have to be found different.

    python -m tests.campaigns.equality [--prompts 200] [--tokens 16] [--only NAME ...] [--kernels auto] [--model DIR]

Where vLLM has no path of its own for a format on a CPU, or would round activations in another way, it answers from the
same numbers in bfloat16. Where it rounds activations to 8 bits itself, as W8A8 wants, two roads to the same answer part
by what the format costs: both are held against the same numbers in bfloat16, and ours may be no further away.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tests.support.lora import PLAIN, QUESTIONS, SYSTEMS, trained, variant

TOLERANCE = 0.5  # nats: four steps of a bfloat16 logit near 20
ROUNDED = 1.0  # where activations are rounded to 8 bits, in every layer
# The root mean square of what log-probabilities move by, and the most that answers part by, beside vLLM's: chance alone
# makes 1.35 and 2.7 of it in 1 of 100 samples of 6 prompts.
FURTHER, FURTHEST = 1.5, 3.0
SPREAD = 2.2  # the standard deviation of the small models' logits
TOP = 20
STYLES = [*dict.fromkeys(style or "" for style in SYSTEMS), "Think step by step.", "Be brief.", "Be poetic.", "No!"]
# Of the small random models: their windows are shorter than the longest prompts.
LENGTHS, VOCABULARY, RANKS = range(1, 200), 320, {"wide": 16, "eight": 8, "odd": 5, "one": 1}
COLUMNS = ("", "multiplied as", "against", "the same to the end", "part where: p50, most",
           "log-probabilities move: p50, RMS, p99, most", "allowed", "another adapter's told apart")  # fmt: skip
FORMATS = ("bfloat16", "int8", "int4", "W8A8", "W4A16 g32", "W4A16 g64 with zero points", "GPTQ g64", "AWQ g64",
           "W8A16 g64", "FP8", "FP8 in blocks")  # fmt: skip
SMALL = ("llama", "llama3", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "phi4", "granite", "olmo2",
         "smollm3", "cohere2")  # fmt: skip


def prompts(count: int) -> list[str]:
    """Different texts of different lengths."""
    questions = [*QUESTIONS, *PLAIN]
    every = (f"{style} {question}".strip() for style, question in product(STYLES, questions))
    return list(islice(every, count))


def tokens(count: int) -> list[list[int]]:
    """The same for models that know no words."""
    dice = random.Random(0)
    return [[dice.randrange(VOCABULARY) for _ in range(dice.choice(LENGTHS))] for _ in range(count)]


def adapters(folder: Path) -> list[Path]:
    """Four, from one that decides every word to one that nudges; two of them with another rank."""
    made = trained("alpha", "bravo", "charlie")

    def first(rank: int) -> Any:
        def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
            for name, tensor in tensors.items():
                tensors[name] = tensor[:rank] if ".lora_A." in name else tensor[:, :rank]
            config["lora_alpha"] = config["lora_alpha"] * rank // config["r"]
            config["r"] = rank

        return edit

    return [
        variant(made["alpha"], folder / "strong"),
        variant(made["bravo"], folder / "half", scale=0.4),
        variant(made["charlie"], folder / "faint", scale=0.1, edit=first(5)),
        variant(made["alpha"], folder / "slight", scale=0.2, edit=first(1)),
    ]


@dataclass
class Difference:
    """What two runs of the same prompts have in common, and how far apart they are where they are not."""

    answers: int
    same: int
    gaps: list[float]  # between the two tokens where answers part, in the first run's log-probabilities
    drift: list[float]  # of the chosen tokens' log-probabilities, before the answers part

    @property
    def worst(self) -> float:
        return max([*self.gaps, 0.0])

    @property
    def most(self) -> float:
        return max([*self.gaps, *self.drift, 0.0])

    @property
    def spread(self) -> float:
        return math.sqrt(fmean(moved * moved for moved in self.drift))

    @property
    def cells(self) -> str:
        drift = sorted(self.drift)
        moved = f"{median(drift):.3f}, {self.spread:.3f}, {drift[len(drift) * 99 // 100]:.3f}, {drift[-1]:.3f}"
        return f"{self.same:,} of {self.answers:,} | {median(self.gaps or [0]):.3f}, {self.worst:.3f} | {moved}"


def compare(first: list[Any], second: list[Any]) -> Difference:
    """Each run is a list of answers; an answer is a list of (token, {token: log-probability})."""
    found = Difference(len(first), 0, [], [])
    for one, other in zip(first, second, strict=True):
        for (token, likely), (another, others) in zip(one, other, strict=False):
            if token != another:
                # A token that is not among the likeliest is as unlikely as the last of them, or more.
                found.gaps.append(likely[str(token)] - likely.get(str(another), min(likely.values()) - 9))
                break
            found.drift.append(abs(likely[str(token)] - others[str(token)]))
        else:
            found.same += 1
    return found


def of_another(answers: list[Any], choices: int) -> list[Any]:
    """For each prompt what another adapter answered, of so many choices that were asked in turn."""
    return [answers[at - at % choices + (at + 1) % choices] for at in range(len(answers))]


@dataclass(frozen=True, slots=True)
class Served:
    """A checkpoint, its adapters, and how it is served."""

    model: Path
    adapters: tuple[Path, ...]
    kernels: str = "off"  # vLLM's own path
    weights: str = "auto"
    words: bool = False

    def job(self) -> dict[str, Any]:
        folders = [str(folder) for folder in self.adapters]
        return {"model": str(self.model), "adapters": folders, "weights": self.weights, "words": self.words}


@dataclass(frozen=True, slots=True)
class Case:
    """Two ways to the same answers, and by how many nats they may part."""

    name: str
    first: Served
    second: Served
    against: str = "vLLM's own path"
    tolerance: float = TOLERANCE
    beside: Served | None = None  # vLLM's own road where that is as far from `first` as the format's rounding takes it

    @property
    def served(self) -> list[Served]:
        return [self.first, self.second, *([self.beside] if self.beside else [])]


def formats(folder: Path, base: Path, wanted: Sequence[str], kernels: str) -> list[Case]:
    """The embedded model in every format, rounded to the nearest."""
    if not (wanted := [name for name in FORMATS if name in wanted]):
        return []
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.quantized import Scheme, save

    schemes = {
        "int8": Scheme("pack-quantized", bits=8, group=64),
        "int4": Scheme("pack-quantized", group=32),
        "W8A8": Scheme("int-quantized", bits=8),
        "W4A16 g32": Scheme("pack-quantized", group=32),
        "W4A16 g64 with zero points": Scheme("pack-quantized", group=64, points=True),
        "GPTQ g64": Scheme("gptq", group=64),
        "AWQ g64": Scheme("awq", group=64, points=True),
        "W8A16 g64": Scheme("pack-quantized", bits=8, group=64),
        "FP8": Scheme("float-quantized"),
        "FP8 in blocks": Scheme("fp8", group=64),
    }
    loras = tuple(adapters(folder / "adapters"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

    def made(scheme: Scheme, dense: bool = False) -> Path:
        place = folder / f"{scheme.layout}-{scheme.bits}-{scheme.group}-{scheme.points}{'-dense' * dense}"
        if not place.is_dir():
            shutil.copytree(base, place, ignore=shutil.ignore_patterns("*.safetensors"))
            save(model, scheme, place, dense)
        return place

    cases = []
    for name in wanted:
        if name == "bfloat16":
            cases.append(Case(name, Served(base, loras, words=True), Served(base, loras, kernels, words=True)))
            continue
        scheme, rounded_here = schemes[name], name in ("int8", "int4")
        ours = Served(made(scheme, rounded_here), loras, kernels, name if rounded_here else "auto", words=True)
        if rounded_here or name in ("W8A8", "W8A16 g64", "FP8", "FP8 in blocks"):
            first = Served(made(scheme, dense=True), loras, words=True)
            # Adapters over W8A8 crash on vLLM's own path.
            beside = Served(ours.model, loras, "layers", words=True) if name == "W8A8" else None
            cases.append(Case(name, first, ours, "vLLM's own path, the same numbers in bfloat16", ROUNDED, beside))
        else:
            cases.append(Case(name, Served(ours.model, loras, words=True), ours, tolerance=ROUNDED))
    return cases


def families(folder: Path, wanted: Sequence[str], kernels: str) -> list[Case]:
    """A small random model of each family."""
    from tests.campaigns import stepwise

    if not (wanted := [name for name in SMALL if name in wanted]):
        return []
    cases = []
    for name, model in stepwise.models(folder, wanted).items():
        spread(model)
        loras = tuple(stepwise.adapters(model, folder / f"{name}-adapters", RANKS))
        cases.append(Case(name, Served(model, loras), Served(model, loras, kernels)))
    return cases


def spread(folder: Path) -> None:
    """Its logits lie SPREAD apart, so that an adapter is seen in the answers, and no token answers itself.

    Gemma's embeddings are its output layer too, and what comes out of the last norm is mostly the embedding.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    norm, more = model.model.norm.weight, int(model.config.model_type.startswith("gemma"))  # whose norms have 1 more
    with torch.no_grad():
        if more:
            model.config.final_logit_softcapping = 10.0 if model.config.final_logit_softcapping else None
            model.model.embed_tokens.weight.mul_(0.15)
        hidden = torch.cat([model.model(torch.tensor([ids])).last_hidden_state[0, -1:] for ids in tokens(8)])
        logits = model.lm_head(hidden) * getattr(model.config, "logit_scale", 1.0)
        logits /= getattr(model.config, "logits_scaling", 1.0)
        norm.copy_((norm + more) * SPREAD / logits.std(-1).mean() - more)
    model.to(torch.bfloat16).save_pretrained(folder)


def run(kernels: str, jobs: list[dict[str, Any]], count: int, length: int) -> list[dict[str, Any]]:
    """One engine after another, in a process of its own from its start to its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        environ = {**os.environ, "LORADOCK_LORA_KERNELS": kernels, "PYTHONPATH": str(Path(__file__).parents[2])}
        environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        command = [sys.executable, "-m", "tests.campaigns.equality", "--answer", str(folder)]
        command += ["--prompts", str(count), "--tokens", str(length)]
        with (folder / "log").open("w") as log:
            done = subprocess.run(command, env=environ, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError((folder / "log").read_text()[-4000:])
        read: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text())
        return read


def answer(folder: Path, count: int, length: int) -> None:
    """In that process."""
    from serve.models.hardware import cpu_environment

    os.environ.update(cpu_environment(os.environ, together=True))
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # of each family, ten seconds of imports in another process
    made = []
    for job in json.loads((folder / "jobs.json").read_text()):
        os.environ["LORADOCK_CPU_WEIGHTS"] = job["weights"]
        made.append(answered(job, count, length))
        cleanup_dist_env_and_memory()
    (folder / "answers.json").write_text(json.dumps(made))


def answered(job: dict[str, Any], count: int, length: int) -> dict[str, Any]:
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    from serve.cpu_kernels import tally
    from serve.server.launch import IN_PROCESS

    tally._steps.clear()
    # One slot more than there are adapters: vLLM's own path gives the last one's adapter to rows without any.
    options = {"enable_lora": True, "max_loras": 5, "max_lora_rank": 16, "enable_prefix_caching": False}
    options |= {"distributed_executor_backend": IN_PROCESS, "skip_tokenizer_init": not job["words"]}
    llm: Any = LLM(job["model"], max_model_len=256, kv_cache_memory_bytes=1 << 28, max_num_seqs=32, **options)
    loras = [None, *(LoRARequest(Path(path).name, n, path) for n, path in enumerate(job["adapters"], 1))]
    every = prompts(count) if job["words"] else [TokensPrompt(prompt_token_ids=ids) for ids in tokens(count)]
    asked = [(prompt, lora) for prompt in every for lora in loras]
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=TOP, detokenize=job["words"])
    chosen = [lora for _, lora in asked]
    answers = llm.generate([prompt for prompt, _ in asked], params, lora_request=chosen, use_tqdm=False)
    rows = [
        [
            (token, {str(other): value.logprob for other, value in likely.items()})
            for token, likely in zip(one.outputs[0].token_ids, one.outputs[0].logprobs or [], strict=True)
        ]
        for one in answers
    ]
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    fused = getattr(runner, "loradock_fused", None)
    torch.set_default_dtype(torch.float32)
    return {"answers": rows, "weights": fused.weights if fused else "", "steps": tally.steps()}


def judged(case: Case, known: Mapping[Served, Any]) -> tuple[list[str], list[str]]:
    """The case's rows, and what is wrong with it."""
    first, second = known[case.first], known[case.second]
    found = compare(first["answers"], second["answers"])
    other = compare(first["answers"], of_another(second["answers"], len(case.first.adapters) + 1))
    told = sum(gap > case.tolerance for gap in other.gaps) / other.answers
    rows, wrong, allowed = [], [], case.tolerance
    if case.beside:
        theirs = compare(first["answers"], known[case.beside]["answers"])
        rows.append(" | ".join([case.name, "vLLM's layers", case.against, theirs.cells, "", ""]))
        allowed = max(allowed, FURTHEST * theirs.most)
        if found.spread > FURTHER * theirs.spread:
            wrong.append(f"log-probabilities move by {found.spread:.3f}, and {theirs.spread:.3f} in vLLM's layers")
    if found.most > allowed:
        wrong.append(f"answers part by {found.worst:.3f} nats, log-probabilities by {max(found.drift):.3f}")
    if told < 0.5:
        wrong.append(f"only {told:.0%} of another adapter's answers are told apart")
    if case.second.kernels == "auto" and [step for step in second["steps"] if step[0] != "fused"]:
        wrong.append(f"not every step was computed in one call: {second['steps']}")
    cells = [case.name, second["weights"].partition(";")[0] or case.second.kernels, case.against, found.cells]
    rows.append(" | ".join([*cells, f"{allowed:.2g}", f"{told:.0%}"]))
    return rows, [f"{case.name}: {each}" for each in wrong]


def main() -> None:
    from serve.models.embedded import ensure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[*FORMATS, *SMALL], choices=[*FORMATS, *SMALL], metavar="NAME")
    parser.add_argument("--kernels", default="auto", choices=["auto", "compile"])
    parser.add_argument("--model", type=Path, help="instead of the embedded one, for the formats")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer:
        answer(given.answer, given.prompts, given.tokens)
        return
    wrong = []
    print(f"{given.prompts} prompts x (4 adapters and the base), {given.tokens} tokens. In nats\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = formats(folder, given.model or ensure("smollm2"), given.only, given.kernels)
        # A process for each of these, and one for all of the small ones.
        turns = [[case] for case in cases] + [families(folder, given.only, given.kernels)]
        known: dict[Served, Any] = {}
        for turn in turns:
            every = [served for case in turn for served in case.served]
            for kernels in dict.fromkeys(served.kernels for served in every):
                missing = [served for served in every if served.kernels == kernels and served not in known]
                made = run(kernels, [each.job() for each in missing], given.prompts, given.tokens) if missing else []
                known.update(zip(missing, made, strict=True))
            for case in turn:
                rows, found = judged(case, known)
                print("\n".join(f"| {row} |" for row in rows), flush=True)
                wrong += found
            turn.clear()
            needed = {case.first for later in turns for case in later}
            known = {served: known[served] for served in known if served in needed}
    if wrong:
        sys.exit("\n".join(["", "more than rounding explains:", *wrong]))


if __name__ == "__main__":
    main()
