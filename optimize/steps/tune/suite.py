"""What every model is asked before and after it was trained: easy questions, prompts to refuse and to answer, and text.

`default` comes along and needs nothing from outside; a file of one's own has the same keys, of which some may be left
out.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec

from optimize.errors import Refused
from optimize.options import Part

DEFAULT = "default"


class Question(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question, its right answer, and some that are wrong."""

    question: str
    answer: str
    others: tuple[str, ...]
    about: str = ""


class Suite(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`refuse` are prompts that a model should not answer, `answer` some that it should; `refusals` and `compliances`
    are how either begins."""

    name: str = ""
    questions: tuple[Question, ...] = ()
    refuse: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    compliances: tuple[str, ...] = ()


def loaded(source: str = DEFAULT) -> Suite:
    """The suite in a JSON file, or the one that comes along; Refused when it is none."""
    try:
        if source == DEFAULT:
            read = (resources.files("optimize.steps.tune") / "suite.json").read_bytes()
        else:
            read = Path(source).read_bytes()
        suite = msgspec.json.decode(read, type=Suite)
    except (OSError, msgspec.DecodeError) as error:
        raise Refused(f"the suite {source} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if (suite.refuse or suite.answer) and not (suite.refusals and suite.compliances):
        raise Refused(f"the suite {source} has prompts to refuse or to answer, and not how either begins: give both "
                      "`refusals` and `compliances`")  # fmt: skip
    return suite
