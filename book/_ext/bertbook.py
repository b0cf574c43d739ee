r"""Make a rich book of portable notebooks.

The notebooks hold only what Colab, JupyterLab and GitHub show too. In the
book, besides:

- a display with ``\tag{2.1}`` gets the anchor ``eq-2-1``, and "(2.1)" in the
  prose, in docstrings and in the comments of the code becomes a link to it;
  two displays with one number, and "equation (9.9)" where there is none, are
  warnings (the strict build fails on them);
- a quote that begins with ``**Note.**`` and the like becomes an admonition;
- a cell tagged ``export`` names the module that it becomes a part of;
- a chapter's number, which stands in its file name, is shown, and a chapter
  with equations ends with a link to its part of the ledger;
- a code cell has an anchor, ``cell-12``, for the ledger;
- the API page links each module to the notebook that it is made from;
- MathJax comes from book/_extra where tools/vendor.py has put it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

log = logging.getLogger(__name__)

EXTRA = "book/_extra"
MATHJAX = "mathjax/tex-chtml.js"  # below _static/ of the pages
LEDGER = "book/ledger"  # the page that tools/ledger.py writes
CHAPTER = re.compile(r"notebooks/([0-8]\d)_")  # 90 and up: appendices
TAG = re.compile(r"\s*\\tag\{(\d+\.\d+)\}")
SOURCE = re.compile(r"Written by tools/extract\.py from (notebooks/\w+)\.md")
NUMBER = re.compile(r"\((\d+\.\d+)\)")
CITED = re.compile(  # "equation (1.2)", "equations (1.2), (1.3) and (1.4)"
    r"\b(?:eqs?\.|equations?)\s+"
    r"\(\d+\.\d+\)(?:(?:,|\s+and|,\s+and|\s+to|\s*[-–])\s*\(\d+\.\d+\))*",
    re.I,
)
COMMENT = re.compile(r'<span class="(?:c1|sd)">.*?</span>', re.S)
CALLOUTS = {  # first word of the quote -> class of the admonition
    "note": "note",
    "tip": "tip",
    "warning": "warning",
    "history": "history",
    "exercise": "exercise",
}


def anchor(number: str) -> str:
    """Return the id of an equation."""
    return f"eq-{number.replace('.', '-')}"


class Callouts(SphinxTransform):
    """Turn quotes that begin with a bold keyword into admonitions."""

    default_priority = 5  # before texts are translated (20)

    def apply(self, **_: Any) -> None:
        """Replace the quotes of the document."""
        for quote in list(self.document.findall(nodes.block_quote)):
            first = quote.children[0] if quote.children else None
            if isinstance(first, nodes.paragraph):
                self.replace(quote, first)

    def replace(self, quote: nodes.block_quote, first: nodes.paragraph) -> None:
        """Replace one quote if its first paragraph begins with a keyword."""
        inline = list(first.children)
        while inline and not inline[0].astext().strip():
            inline.pop(0)  # markdown-it puts an empty text first
        if not inline or not isinstance(inline[0], nodes.strong):
            return
        name = inline[0].astext().strip().rstrip(".")
        kind = CALLOUTS.get(name.split()[0].lower()) if name else None
        if kind is None:
            return
        title = nodes.title(name, name)
        rest = nodes.paragraph("", "", *inline[1:])
        if isinstance(rest.children[0] if rest.children else None, nodes.Text):
            rest[0] = nodes.Text(rest[0].lstrip())
        callout = nodes.admonition("", title, classes=[kind])
        for node in (title, rest, callout):
            node.source, node.line = first.source, first.line
        if rest.astext().strip():
            callout += rest
        callout += quote.children[1:]
        quote.replace_self(callout)


class EquationLinks(SphinxPostTransform):
    """Link the equations that the prose names."""

    default_priority = 200
    SKIPPED = (
        nodes.reference,
        nodes.literal,
        nodes.literal_block,
        nodes.math,
        nodes.math_block,
        nodes.raw,
        nodes.title,
    )

    def run(self, **_: Any) -> None:
        """Replace the texts of the document."""
        for text in list(self.document.findall(nodes.Text)):
            parents = self.parents(text)
            if any(isinstance(parent, self.SKIPPED) for parent in parents):
                continue
            linked = list(self.link(text))
            if len(linked) > 1:
                text.parent.replace(text, linked)

    @staticmethod
    def parents(node: nodes.Node) -> Iterator[nodes.Node]:
        """Yield the nodes around a node."""
        while node.parent is not None:
            node = node.parent
            yield node

    def link(self, text: nodes.Text) -> Iterator[nodes.Node]:
        """Yield the text's parts; warn of an equation that is nowhere."""
        equations = self.env.bertbook_equations  # type: ignore[attr-defined]
        words = text.astext()
        cited = [match.span() for match in CITED.finditer(words)]
        done = 0
        for match in NUMBER.finditer(words):
            page = equations.get(match[1])
            if page is None:
                if any(a <= match.start() < b for a, b in cited):
                    message = "unknown equation (%s)"
                    log.warning(message, match[1], location=text.parent)
                continue
            yield nodes.Text(words[done : match.start()])
            yield make_refnode(
                self.app.builder,
                self.env.docname,
                page,
                anchor(match[1]),
                nodes.inline("", match[0], classes=["eqref"]),
            )
            done = match.end()
        yield nodes.Text(words[done:])


def read_page(app: Sphinx, doctree: nodes.document) -> None:
    """Number the equations and the chapter, and mark the exported cells."""
    page = app.env.docname
    for node in doctree.findall(nodes.math_block):
        number_equation(app.env, page, node)
    for cell in doctree.findall(nodes.container):
        if "cell_index" in cell:  # the ledger links the cells
            cell["ids"].append(f"cell-{cell['cell_index']}")
        if "tag_export" in cell["classes"]:
            cell.insert(0, badge(app, page))
    if LEDGER in app.env.found_docs and CHAPTER.match(page):
        doctree.extend(proofs(app.env, page))
    chapter = chapter_number(page)
    if chapter:
        # in the side bar, the title bar and the links to the next page
        prefix = f"{chapter}. "
        title, long = app.env.titles[page], app.env.longtitles[page]
        for node in (title,) if title is long else (title, long):
            node.insert(0, nodes.Text(prefix))
        entry = next(iter(app.env.tocs[page].findall(nodes.reference)))
        entry.insert(0, nodes.Text(prefix))


def proofs(env: BuildEnvironment, page: str) -> Iterator[nodes.Node]:
    """Yield a line that leads from a chapter to the proofs of its equations."""
    equations = env.bertbook_equations  # type: ignore[attr-defined]
    if page not in equations.values():
        return
    target = addnodes.pending_xref(
        "", refdomain="std", reftype="ref", refexplicit=True, refwarn=True
    )
    target["reftarget"] = f"ledger-{Path(page).name.replace('_', '-')}"
    target += nodes.inline("", "the ledger", classes=["xref", "std", "std-ref"])
    text = nodes.Text("Which test proves which equation, and how exactly: ")
    yield nodes.paragraph("", "", text, target, nodes.Text("."))


def chapter_number(page: str) -> int:
    """Return the number of the chapter on a page; 0 where there is none."""
    found = CHAPTER.match(page)
    return int(found[1]) if found else 0


def number_equation(
    env: BuildEnvironment, page: str, node: nodes.math_block
) -> None:
    """Give a display its anchor; warn if its number is taken."""
    equations = env.bertbook_equations  # type: ignore[attr-defined]
    found = TAG.search(node.astext())
    if not found:
        return
    number = found[1]
    if number in equations:
        message = "equation (%s) is defined in %s already"
        log.warning(message, number, equations[number], location=node)
    equations[number] = page
    node["ids"] = [anchor(number)]
    # Sphinx would put a text with line breaks into {split}, where \tag is an
    # error: give it a whole environment
    body = TAG.sub("", node.astext()).strip()
    tex = f"\\begin{{equation}}\n{body}\n\\tag{{{number}}}\n\\end{{equation}}"
    node.children = [nodes.Text(tex)]
    node.rawsource = tex
    node["nowrap"] = True


def badge(app: Sphinx, page: str) -> nodes.raw:
    """Return a link to the module that a page's exported cells make."""
    header = app.env.metadata[page].get("bertnb", "{}")
    about = json.loads(header) if isinstance(header, str) else header
    path = f"bertnb/{about['module']}.py"
    theme = app.config.html_theme_options
    branch = theme.get("repository_branch", "main")
    url = f"{theme.get('repository_url', '')}/blob/{branch}/{path}"
    tip = "This cell is a part of the package: see the module"
    html = f'<a class="export-badge" href="{url}" title="{tip}">{path}</a>'
    return nodes.raw("", html, format="html")


def finish_page(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Show the chapter's number, and link the equations that the code names."""
    context["book_path"] = urlparse(app.config.html_baseurl).path or "/"
    body = context.get("body")
    if not body or doctree is None:
        return
    equations = app.env.bertbook_equations  # type: ignore[attr-defined]

    def link(match: re.Match[str]) -> str:
        number = match[1]
        if number not in equations:
            return match[0]
        target = app.builder.get_relative_uri(page, equations[number])
        return f'<a href="{target}#{anchor(number)}">{match[0]}</a>'

    body = COMMENT.sub(lambda comment: NUMBER.sub(link, comment[0]), body)
    chapter = chapter_number(page)
    if chapter:
        label = f'<p class="chapter-number">Chapter {chapter}</p>\n<h1>'
        body = body.replace("<h1>", label, 1)
    context["body"] = body


def describe_module(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, text: list[str]
) -> None:
    """Put the chapter in the place of a module's docstring."""
    found = SOURCE.search("\n".join(text)) if what == "module" else None
    if found:
        text[:] = [f"Made by the notebook :doc:`/{found[1]}`.", ""]


def choose_mathjax(app: Sphinx, config: Config) -> None:
    """Serve MathJax with the pages if it was fetched, else from its CDN."""
    if not Path(app.srcdir, EXTRA, "_static", MATHJAX).exists():
        log.info("MathJax will come from %s", config.mathjax_path)
        return
    config.html_extra_path = [EXTRA]
    config.mathjax_path = MATHJAX
    loader = config.mathjax3_config.setdefault("loader", {})
    loader["paths"] = {"fonts": "[mathjax]/fonts"}


def begin(app: Sphinx) -> None:
    """Make room for the equations' numbers and the pages they stand on."""
    if not hasattr(app.env, "bertbook_equations"):
        app.env.bertbook_equations = {}  # type: ignore[attr-defined]


def forget(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    """Forget the equations of a page that is read again."""
    equations = env.bertbook_equations  # type: ignore[attr-defined]
    for number in [n for n, where in equations.items() if where == page]:
        del equations[number]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect everything to Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("config-inited", choose_mathjax)
    app.connect("builder-inited", begin)
    app.connect("env-purge-doc", forget)
    app.connect("autodoc-process-docstring", describe_module)
    app.connect("doctree-read", read_page, priority=900)  # titles are known
    app.connect("html-page-context", finish_page)
    app.add_transform(Callouts)
    app.add_post_transform(EquationLinks)
    return {"version": "1", "parallel_read_safe": False}
