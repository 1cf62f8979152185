"""What the site needs beyond Sphinx: MathML, the texts of --help, links that serve on the site and beside it."""

import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

ROOT = Path(__file__).parents[1]
EXAMPLES = ("chapter", "attention", "metric", "slope", "map", "million")
# One element a letter is what `convert` makes of words.
_LETTERS = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')


def reading_order(filename: str) -> int:
    """The place of an example in the gallery."""
    return EXAMPLES.index(Path(filename).stem)


def mathml(node: nodes.Node, display: str) -> str:
    """LaTeX as MathML, which browsers draw themselves."""
    formula = node.astext().strip()
    found = convert(formula.replace(r"\arg", r"\operatorname{arg}"), display=display)
    if "\\" in found:
        logging.getLogger(__name__).warning("latex2mathml does not know all of %r", formula, location=node)
    return _LETTERS.sub(lambda word: "<mi>" + re.sub("<[^>]+>", "", word[0]) + "</mi>", found)


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    number = get_node_equation_number(writer, node) if node["number"] else ""
    writer.body.append(f'<div class="math">{mathml(node, "block")}{number}</div>\n')
    raise nodes.SkipNode


class Help(Directive):
    """What `nwfast COMMAND --help` prints; without a command that of `nwfast`."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One literal block."""
        from nwfast.cli import _parser

        with mock.patch.dict(os.environ, COLUMNS="88"):
            parser = _parser()
            for command in self.arguments:
                parser = parser._subparsers._group_actions[0].choices[command]
            text = parser.format_help()
        return [nodes.literal_block(text, text, language="text")]


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    """Let links to files of the repository lead to the pages that show these files."""
    text = re.sub(r"\n\n```(?=\n)", "\n```", source[0])  # an empty line ends a doctest
    up = r"\]\((?:\.\./)+"
    text = re.sub(up + r"examples/(\w+)\.py\)", r"](/gallery/\1.rst)", text)
    text = re.sub(up + r"examples/README\.rst\)", r"](/gallery/index.rst)", text)
    text = re.sub(up + r"ARCHITECTURE\.md(#[\w-]+)?\)", r"](/architecture.md\1)", text)
    source[0] = re.sub(r"\[(README)" + up + r"README\.md\)", r"\1", text)  # which is not on the site


def _unlinked(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Node | None:
    """A name in backticks that is no public one, an argument mostly, as code; wrong names of ours stay errors."""
    wanted = node.get("reftarget", "")
    if node.get("refdomain") != "py" or node.get("reftype") != "obj" or wanted.startswith("nwfast."):
        return None
    return nodes.literal(content.astext(), content.astext())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register it all."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.add_directive("nwfast-help", Help)
    app.connect("source-read", _read)
    app.connect("missing-reference", _unlinked)
    return {"parallel_read_safe": True}
