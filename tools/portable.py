"""Complain of notebook prose that Colab, JupyterLab or GitHub would show raw.

The book could render more than these three, so the book alone would not tell.

python tools/portable.py [NOTEBOOK.md ...]    # default: all notebooks
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import jupytext
from manifest import sources
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

MARKDOWN = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)
TEXT = {  # in text, outside code and mathematics
    r"\{[\w:-]+\}$": "a MyST role",
    r"^:::": "a MyST fence",
    r"^\([\w-]+\)=": "a MyST target",
    r"^\+\+\+": "a MyST cell break",
    r"^%": "a MyST comment",
    r"\[!\w+\]": "a GitHub alert: write `> **Note.** ...`",
    r"\[\^\w+\]|^\^\w+$": "a footnote",
    r"\{\{.*\}\}": "a MyST substitution",
    r"\\(begin|end|tag|label|ref|eqref|frac|sum|sqrt)\b": "LaTeX outside $",
    r"\$": "a dollar sign that opens no formula: write USD, or use `code`",
    r"~~": "struck-out text",
}
MATH = {  # in formulas
    r"\\(label|ref|eqref|require|newcommand|def)\b": "is not the same everywhere",
    r"\\begin\{(align|equation|gather|eqnarray|multline)\*?\}": (
        "numbers twice: use aligned and \\tag"
    ),
}
TAGS = "details|summary|br|sub|sup|kbd"
HTML = re.compile(rf"<(?!/?({TAGS})\s*/?>|!--)[^>]*>")
FREE = "remove-cell"


def math(token: Token) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a formula."""
    for pattern, why in MATH.items():
        if re.search(pattern, token.content):
            yield f"a formula that {why}", token.content
    if token.type == "math_inline":
        if "\\tag" in token.content:
            yield "a \\tag in the line: only $$ takes one", token.content
        return
    if token.type == "math_block_label":
        yield "a MyST equation label", f"({token.info})"
    if token.content.count("\\tag{") > 1:
        yield "two \\tag in one display", token.content
    if re.search(r"\n\s*\n", token.content.strip()):
        yield "an empty line in a formula", token.content
    if "\\\\" in token.content and "\\begin{" not in token.content:
        yield "a line break outside an environment: use aligned", token.content


def link(token: Token, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a link or an image."""
    url = unquote(str(token.attrGet("href") or token.attrGet("src") or ""))
    if re.match(r"(https?|mailto):", url):
        return
    if token.type == "image":
        yield "an image that is not on the web: draw it in a cell", url
    elif "#" in url:
        yield "a link to a heading: its name differs from place to place", url
    else:
        path = folder / url
        source = path.with_suffix(".md")
        if path.suffix == ".ipynb" and not source.exists():
            yield "a link to a notebook that is not there", url
        elif path.suffix != ".ipynb" and not path.exists():
            yield "a link to a file that is not there", url
        elif path.suffix == ".md" and path.parent == folder:
            yield "a link to a source: link to the .ipynb", url


def prose(source: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a Markdown cell, and the text that is."""
    inside = 0
    title = False
    for token in MARKDOWN.parse(source):
        if token.type == "fence" and token.info.startswith("{"):
            yield "a MyST directive", token.info
        elif token.type.startswith("math_block"):
            yield from math(token)
        elif token.type == "heading_open":
            title = True
            if inside:
                yield "a heading inside <details>", ""
        elif token.type == "html_block":
            inside += token.content.count("<details>")
            inside -= token.content.count("</details>")
            for match in HTML.finditer(token.content):
                yield "HTML", match[0]
            if re.search(r"</summary>\n.+", token.content):
                yield "no empty line after </summary>", token.content
        for child in token.children or []:
            if child.type == "text":
                if title and re.match(r"\d+\.\s", child.content):
                    yield "a heading that begins like a list", child.content
                for pattern, why in TEXT.items():
                    if re.search(pattern, child.content):
                        yield why, child.content
            elif child.type == "math_inline":
                yield from math(child)
            elif child.type in ("link_open", "image"):
                yield from link(child, folder)
            elif child.type == "html_inline" and HTML.search(child.content):
                yield "HTML", child.content
        title = token.type == "heading_open"
    if inside:
        yield "a <details> that is not closed in its cell", ""
    for row in re.findall(r"^\s*\|.*$", source, re.M):
        for formula in re.findall(r"(?<![\\$])\$(?!\s)([^$]+?)(?<!\s)\$", row):
            if "|" in formula:
                yield "a | in a table's formula: \\mid or \\lvert", formula


def complaints(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the cell, the reason and the text for all that is wrong."""
    silent = False  # was the cell above a code cell that the reader sees?
    for number, cell in enumerate(jupytext.read(path).cells):
        if cell.cell_type == "markdown":
            for why, text in prose(cell.source, path.parent):
                yield number, why, text
            silent = False
            continue
        hidden = FREE in cell.metadata.get("tags", [])
        if silent and not hidden:
            yield number, "two code cells without a sentence between them", ""
        silent = silent or not hidden


def main() -> int:
    """Print every complaint; return the exit status."""
    paths = [Path(name) for name in sys.argv[1:]] or sources()
    wrong = 0
    for path in paths:
        for number, why, text in complaints(path):
            wrong += 1
            excerpt = " ".join(text.split())[:60]
            place = f"{path.parent.name}/{path.name}, cell {number}"
            print(f"{place}: {why}{': ' if excerpt else ''}{excerpt}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
