"""Sphinx reads this: `make docs` builds the site into docs/_build, and every warning is an error."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import generate  # noqa: E402

from serve import __version__  # noqa: E402

generate.write(DOCS / "generated")

project = "loradock"
author = "the loradock authors"
copyright = "the loradock authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser"]
exclude_patterns = ["_build", "generated"]  # generated/ is included into pages
myst_heading_anchors = 4  # `page.md#heading` is checked
myst_enable_extensions = ["colon_fence"]
nitpicky = True

html_theme = "furo"
html_title = "loradock"
html_show_sphinx = False
html_search_scorer = str(DOCS / "search_scorer.js")
