"""What one answer is worth by its case, and what a score over many cases says about others like them.

Nothing here is for the event loop: a pattern or a schema may take its whole time limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import regex

from serve.adapters.patterns import occurs
from serve.names import shown
from serve.rollout.golden.golden_schema import UnusableSchema, schema_mismatch
from serve.rollout.golden.golden_set import GoldenCase

PATTERN_SECONDS = 0.5
CONFIDENCE = 0.95
# The normal distribution's quantile for it.
_Z = 1.959964
# A graded score of this or more is counted as a pass.
PASSES = 0.5
# With fewer graded cases nothing is said about others.
FEWEST_GRADED = 5


class Result(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"  # no score: the engine did not take the prompt, or the judge's reply cannot be read


@dataclass(frozen=True, slots=True)
class CaseScore:
    """`value` from 0 to 1, None where there is none; `detail` says why it is not 1."""

    value: float | None
    detail: str = ""

    @property
    def result(self) -> Result:
        if self.value is None:
            return Result.ERROR
        return Result.PASS if self.value >= PASSES else Result.FAIL


def score(case: GoldenCase, answer: str) -> CaseScore:
    """The score of an answer by a case without a judge."""
    problem = ""
    try:
        if case.equals is not None:
            same = answer.strip() == case.equals.strip()
            problem = "" if same else f"it is not {shown(case.equals)}"
        elif case.contains is not None:
            problem = "" if case.contains in answer else f"it does not contain {shown(case.contains)}"
        elif case.regex is not None:
            matches = occurs(case.regex, answer, PATTERN_SECONDS)
            problem = "" if matches else f"nothing in it matches {shown(case.regex)}"
        else:
            problem = schema_mismatch(case.json_schema or {}, answer)
    except TimeoutError:
        return CaseScore(None, f"the regex takes longer than {PATTERN_SECONDS:g} s with this answer: simplify it")
    except UnusableSchema as error:
        return CaseScore(None, f"the json_schema: {error}")
    except regex.error as error:
        return CaseScore(None, f"the regex cannot be used: {shown(error)}")
    return CaseScore(0.0, problem) if problem else CaseScore(1.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over cases, and where that of all cases like these lies with `CONFIDENCE`; `method` says how."""

    cases: int
    score: float | None
    low: float
    high: float
    method: str


def estimate(scores: Sequence[float]) -> Estimate:
    """Of passes and fails by Wilson (1927), of graded scores by Student's t; the cases count as drawn at random."""
    n = len(scores)
    if not n:
        return Estimate(0, None, 0.0, 1.0, "none")
    mean = math.fsum(scores) / n
    if all(value in (0.0, 1.0) for value in scores):
        middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
        return Estimate(n, mean, max(0.0, middle - half), min(1.0, middle + half), "wilson")
    if n < FEWEST_GRADED:
        return Estimate(n, mean, 0.0, 1.0, "none")
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in scores) / (n - 1))
    half = _t_quantile(n - 1) * spread / math.sqrt(n)
    return Estimate(n, mean, max(0.0, mean - half), min(1.0, mean + half), "t")


def _t_quantile(freedom: int) -> float:
    """Student's t for `CONFIDENCE`, two-sided, by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5)."""
    z = _Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
