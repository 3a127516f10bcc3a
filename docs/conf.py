"""Configuration of Sphinx: ``sphinx-build -W -c docs -b html . docs/_build``.

The sources are those of the whole repository, so that links between these pages, the README and the
results are relative ones, which lead somewhere wherever they are read.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from adaqn_cuda import __version__  # noqa: E402

project = "adaqn_cuda"
copyright = "the authors of adaqn_cuda, BSD-3-Clause"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["formulas.css"]
html_title = f"adaqn_cuda {release}"
html_show_sourcelink = False
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/*.rst",
    "bench/results/**.md",
    "csrc/cuda/README.md",
]
# The first one is part of another page; in the others there is nothing, and much to look at.
exclude_patterns = ["docs/wheel_matrix.md", "docs/_build", "build", ".venv"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
