"""What people read of a run: no Python in it, and a page of HTML that is one."""

from __future__ import annotations

import re
from types import SimpleNamespace

from optimize.pipeline import markdown, report

OPTIONS = {
    "adapters": ("tone", "legal"),
    "weights": [0.5, 1.0],
    "keep_lm_head": True,
    "nothing": (),
    "layers": {"a": 1},
}


def page_of(lines):
    return report._page(SimpleNamespace(name="run"), "\n".join(lines), None, [])


def test_the_options_of_a_step_are_words_and_not_tuples():
    done = SimpleNamespace(kind="merge", options=OPTIONS, seconds=3.2, notes={"cpu_seconds": 6, "memory": 1e9})
    head, row = markdown._steps([done])
    assert "CPU seconds" in head
    assert row[1] == "adapters tone, legal, weights 0.5, 1, keep lm head yes, layers a 1"
    assert not re.search(r"[()'\\[\\]{}]", " ".join(row))


def test_a_list_is_a_list_in_the_page():
    html = page_of(["## Answers", "", "- tone: **yes** & no", "- base: no", "", "after"])
    assert "<ul><li>tone: <b>yes</b> &amp; no</li><li>base: no</li></ul>" in html
    assert "<p>- " not in html and html.index("</ul>") < html.index("<p>after</p>")
