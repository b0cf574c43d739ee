"""The page on where BERTs differ: its rows, chapters and proofs exist."""

import ast
import functools
import re
from typing import NamedTuple

import pytest
import yaml
from manifest import ROOT

PAGE = ROOT / "book" / "errata.md"
TEXT = PAGE.read_text(encoding="utf-8")


class Row(NamedTuple):
    """One difference."""

    question: str
    original: str
    others: str
    ours: str
    place: str


def rows() -> list[Row]:
    found = []
    for line in TEXT.splitlines():
        if not line.startswith("| ") or line.startswith("| question"):
            continue
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        found.append(Row(*(cell.strip() for cell in cells)))
    return found


ROWS = rows()
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.question)


@functools.cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


@functools.cache
def headings(notebook: str) -> set[str]:
    text = (ROOT / "notebooks" / f"{notebook}.md").read_text(encoding="utf-8")
    return set(re.findall(r"^#+ (.+)$", text, re.M))


def test_every_row_was_read() -> None:
    tables = re.findall(r":::\{table\}\n.*?\n:::", TEXT, re.S)
    assert len(ROWS) == sum(t.count("\n|") - 2 for t in tables) > 80
    assert len({row.question for row in ROWS}) == len(ROWS)


@each_row
def test_the_row_has_a_proof(row: Row) -> None:
    links, proofs = row.place.split("): ", 1)
    chapters = re.findall(r"\]\(\.\./notebooks/(\w+)\.ipynb", links + ")")
    assert chapters
    parts = set().union(*map(headings, chapters))
    for proof in re.split(r', (?=`|")', proofs):
        if match := re.fullmatch(r"`(tests/\w+/test_\w+\.py)::(\w+)`", proof):
            assert match[2] in functions(match[1]), proof
        else:
            assert proof.startswith('"'), proof
            assert proof.strip('"') in parts, proof


@each_row
def test_the_row_says_what_we_do(row: Row) -> None:
    assert row.ours != "–"


def test_the_page_is_in_the_book() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    assert "book/errata" in files
