"""The documentation site, which `make site` builds into build/site: docs/*.md as they are, and the docstrings."""

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import uncork

project, version = "uncork", uncork.__version__
copyright, release = "The uncork maintainers", version
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["build.py", "keep.py"]
html_theme, html_title = "furo", f"uncork {version}"
html_theme_options = {"navigation_with_keys": True}
html_static_path, html_css_files = ["_static"], ["site.css"]
html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 3

# The notebook of examples/ is a page too; Sphinx follows links, so it is copied. The build runs it: it has no outputs.
shutil.copy2(Path(__file__).parents[1] / "examples" / "bottleneck.ipynb", Path(__file__).parent)
nb_execution_mode, nb_execution_raise_on_error, nb_execution_timeout = "force", True, 300

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes and types
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
copybutton_prompt_text = ">>> "

_FUNCTION = re.compile(r"(<mi>(?:exp|log|max|min|tanh)</mi>)(?=<(?!mo\b))")


def _page(app: Sphinx, name: str, source: list[str]) -> None:
    """Pages link to files of the repository that are not pages: they are named instead. Fenced math is a directive."""
    source[0] = source[0].replace("```math", "```{math}")
    source[0] = re.sub(r"\]\(\.\./(?:docs/|examples/(?=\w+\.ipynb))", "](", source[0])  # from and to the notebook
    out = re.escape("../" * (name.count("/") + 1))
    outside = re.compile(rf"\[([^\]]+)\]\({out}([^)#]+)[^)]*\)")
    source[0] = outside.sub(lambda m: m[1] if m[1].strip("`") == m[2] else f"{m[1]} (`{m[2]}`)", source[0])


def _docstring(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """What the sources write shorter than napoleon reads it: several arguments on a line, what is returned, a table."""
    try:
        names = "|".join(inspect.signature(of).parameters) or "self"
    except (TypeError, ValueError):
        names = "self"
    text = "\n".join(lines)
    start, args, rest = text.partition("\nArgs:\n")
    own, end, rest = rest.partition("\n\n")
    own = re.sub(rf"([.;]) (?=(?:{names})(?:, (?:{names}))*: )", r"\1\n    ", own)
    # A sentence among the arguments that begins with none of them ("The rest is as in ...") is a paragraph after them.
    sentence = re.compile(rf"^    (?!(?:{names})(?:, (?:{names}))*: )\S.*(?:\n {{8}}.*)*\n?", re.MULTILINE)
    said = [" ".join(found.split()) for found in sentence.findall(own)]
    own = "\n".join([sentence.sub("", own).rstrip("\n"), *(f"\n{one}" for one in said)])
    text = start + args + own + end + rest
    text = text.replace("\nReturns:\n", "\n:Returns:\n")
    text = re.sub(r": ([A-Z])\.$", r": \\\1.", text, flags=re.MULTILINE)  # not the first of a list
    text = re.sub(r"(?:^\|.*$\n?)+", _table, text, flags=re.MULTILINE)
    lines[:] = text.split("\n")


def _table(match: re.Match[str]) -> str:
    """A table of Markdown as one of reStructuredText."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[0].strip().split("\n")]
    lines = [f"{'     ' if i else '   * '}- {cell}" for row in rows if row[0].strip("-") for i, cell in enumerate(row)]
    return "\n".join([".. list-table::", "   :header-rows: 1", "", *lines, "", ""])


def _mathml(latex: str, display: str) -> str:
    """A formula as MathML, which browsers draw by themselves: no script, nothing from a network."""
    return _FUNCTION.sub(r'\1<mspace width="0.17em"/>', convert(latex, display=display))


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{_mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("source-read", _page)
    app.connect("autodoc-process-docstring", _docstring, priority=1)  # before napoleon
