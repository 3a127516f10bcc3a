"""Formulas as MathML, which browsers render by themselves: no script, no network.

A formula that cannot be converted is a warning, and so an error under ``-W``.
"""

from __future__ import annotations

import re
from typing import Any

from docutils.nodes import SkipNode, math, math_block
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def converted(formula: str, node: math | math_block) -> str:
    # Underscores of names are escaped for LaTeX, which the converter leaves as they are.
    formula = re.sub(r"\\text\{[^}]*\}", lambda match: match[0].replace(r"\_", "_"), formula)
    try:
        return tex2mathml(formula, as_block=isinstance(node, math_block))
    except MathError as error:
        logger.warning("formula %r: %s", formula, error, location=node)
        return ""


def visit(self: HTML5Translator, node: math) -> None:
    self.body.append(converted(node.astext(), node))
    raise SkipNode


def visit_display(self: HTML5Translator, node: math_block) -> None:
    lines = node.astext().strip()
    if "\\\\" in lines and "\\begin" not in lines:
        lines = rf"\begin{{aligned}} {lines} \end{{aligned}}"
    self.body.append(f'<div class="math">{converted(lines, node)}</div>\n')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit, None), (visit_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
