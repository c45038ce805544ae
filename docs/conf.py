"""Configuration of Sphinx: pages and docstrings are both written in MyST."""

import re
import sys
from importlib import import_module
from pathlib import Path

from docutils import nodes
from docutils.utils import new_document
from docutils.utils.math.latex2mathml import tex2mathml
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "atn-norms"
author = copyright = "The atn-norms developers"
version = release = import_module("atn_norms").__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_design"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "figures", "results/*/tables.md"]  # reports are copied unchanged

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "atn-norms"
html_static_path = ["_static"]
html_css_files = ["formulas.css", "pages.css"]
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "member-order": "bysource",
    "exclude-members": "extra_repr, model_config, model_post_init",
}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: f"atn_norms.layers.{name}" for name in ("NormLike", "WindowLike", "PlacementLike")}


class Markdown(SphinxDirective):
    """Parse the content as MyST."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def as_markdown(app, what, name, obj, options, lines) -> None:
    """Wrap a docstring in the directive; doctests become fenced blocks, which MyST would take for quotations."""
    text = re.sub(
        r"^>>> (?:.+\n?)+", lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", "\n".join(lines), flags=re.MULTILINE
    )
    lines[:] = ["", ".. markdown::", "", *(f"   {line}" for line in text.splitlines()), ""]


def public_bases(app, name, obj, options, bases) -> None:
    """Show the public base of a private base class."""
    bases[:] = [base.__base__ if isinstance(base, type) and base.__name__.startswith("_") else base for base in bases]


def mathml(translator, node) -> None:
    """Render formulas as MathML, which browsers display without a network."""
    # docutils does not support \dots, and puts a subscript after an accent into the accent
    text = re.sub(r"\\(bar|hat) ?(\\[a-z]+|\w)", r"{\\\1{\2}{}}", node.astext().replace(r"\dots", r"\ldots"))
    translator.body.append(tex2mathml(text, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", as_markdown)
    app.connect("autodoc-process-bases", public_bases)
