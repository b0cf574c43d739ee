"""Follow each numbered equation to its code, its tests and their last figures.

python tools/ledger.py --check          # fail where code has no proof
python tools/ledger.py --into FOLDER    # the same, and write FOLDER/ledger.md
python tools/ledger.py --measure        # run the proofs, write the record

An equation that exported code names in a comment or a docstring, "(8.5)", is
one of the model: a test must be marked `@pytest.mark.equation("8.5")`.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jupytext
from manifest import ROOT, repository, sources

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from bertbook import CHAPTER, NUMBER, TAG  # the book's own rules

RECORD = ROOT / "book" / "runs" / "ledger.jsonl"
PYTEST = ["-m", "pytest", "-q", "-m", "equation", "--hypothesis-seed=0"]
DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.S)
HEADING = re.compile(r"^(#+) (.+)$", re.M)
MAGIC = re.compile(r"^[%!].*$", re.M)
WRAPPED = re.compile(r"\\(begin|end)\{aligned\}")


@dataclass(frozen=True)
class Line:
    """A line of the package that names an equation."""

    path: str
    number: int
    owner: str  # the function or class around it, if any


@dataclass(frozen=True)
class Proof:
    """A test that is marked with the equations that it proves."""

    path: str
    number: int
    name: str
    equations: tuple[str, ...]

    @property
    def id(self) -> str:
        """The name by which pytest knows the test."""
        return f"{self.path}::{self.name}"


@dataclass
class Equation:
    """A numbered equation, and all that belongs to it."""

    number: str
    page: str  # the notebook, without its ending
    heading: str
    tex: str
    cells: list[int] = field(default_factory=list)  # that name it
    near: int | None = None  # the next cell of its section
    lines: list[Line] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)


@dataclass
class Ledger:
    """All equations, and what is wrong or wanting."""

    equations: dict[str, Equation] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)  # page -> title
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, tuple[float, float] | None] = field(default_factory=dict)

    def proofs(self) -> list[Proof]:
        """Return the tests that prove something, each once."""
        found = {p.id: p for e in self.equations.values() for p in e.proofs}
        return [found[name] for name in sorted(found)]


def order(number: str) -> tuple[int, int]:
    """Return what sorts (2.10) behind (2.9)."""
    chapter, place = number.split(".")
    return int(chapter), int(place)


def first_row(display: str) -> str:
    """Return the first row of a display, if it can stand alone."""
    tex = " ".join(TAG.sub("", display).split())
    row = WRAPPED.sub("", tex).split("\\\\")[0].replace("&", "").strip()
    whole = row.count("{") == row.count("}")
    if whole and row.count("\\begin") == row.count("\\end"):
        tex = row
    return tex.rstrip(" .,")


def named(code: str) -> Iterator[tuple[int, str]]:
    """Yield the lines where comments and docstrings name an equation."""
    begins = True  # a string that begins a statement is a docstring
    source = io.StringIO(MAGIC.sub("", code))
    for token in tokenize.generate_tokens(source.readline):
        text = token.type == tokenize.STRING and begins
        if text or token.type == tokenize.COMMENT:
            lines = token.string.split("\n")
            for number, line in enumerate(lines, token.start[0]):
                for match in NUMBER.finditer(line):
                    yield number, match[1]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins = token.type in (
                tokenize.NEWLINE,
                tokenize.INDENT,
                tokenize.DEDENT,
            )


def read_chapter(ledger: Ledger, path: Path) -> None:
    """Collect a notebook's equations, and the cells that compute with them."""
    page = f"{path.parent.name}/{path.stem}"
    heading, said = "", set[str]()  # what the paragraph above a cell names
    for place, cell in enumerate(jupytext.read(path).cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            at = 0
            for found in DISPLAY.finditer(cell.source):
                for title in HEADING.finditer(cell.source[at : found.start()]):
                    heading = title[2]
                at = found.start()
                if tag := TAG.search(found[1]):
                    tex = first_row(found[1])
                    ledger.equations[tag[1]] = Equation(
                        tag[1], page, heading, tex
                    )
            for title in HEADING.finditer(cell.source[at:]):
                heading = title[2]
            for title in HEADING.finditer(cell.source):
                ledger.titles.setdefault(page, title[2])
            last = cell.source.split("\n\n")[-1]
            said = {
                found[1]
                for found in (*NUMBER.finditer(last), *TAG.finditer(last))
            }
        elif cell.cell_type == "code" and "remove-cell" not in tags:
            if "export" not in tags:
                said |= {name for _, name in named(cell.source)}
                for name in said & ledger.equations.keys():
                    if ledger.equations[name].page == page:
                        ledger.equations[name].cells.append(place)
                for one in ledger.equations.values():
                    here = (one.page, one.heading) == (page, heading)
                    if here and one.near is None:
                        one.near = place
            said = set()


def read_module(ledger: Ledger, path: Path) -> None:
    """Collect the lines of a module that name an equation."""
    source = path.read_text(encoding="utf-8")
    owners = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    for number, name in named(source):
        around = [
            node.name
            for node in owners
            if node.lineno <= number <= (node.end_lineno or node.lineno)
        ]
        if name in ledger.equations:  # (0.975) is a number, and no equation
            where = f"{path.parent.name}/{path.name}"
            ledger.equations[name].lines.append(
                Line(where, number, around[0] if around else "")
            )


def marks(test: ast.FunctionDef, where: str) -> Iterator[str]:
    """Yield the equations in the marks of a test."""
    for decorator in test.decorator_list:
        for node in ast.walk(decorator):
            if not isinstance(node, ast.Call):
                continue
            if not ast.unparse(node.func).endswith("mark.equation"):
                continue
            for argument in node.args:
                value = getattr(argument, "value", None)
                if not isinstance(value, str):
                    message = f'{where}: write equations as text, "8.5"'
                    raise TypeError(message)
                yield value


def read_tests(ledger: Ledger, path: Path) -> None:
    """Collect the tests that are marked with an equation."""
    where = path.relative_to(ROOT).as_posix()
    for test in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(test, ast.FunctionDef):
            continue
        try:
            names = list(marks(test, f"{where}:{test.lineno}"))
        except TypeError as error:
            ledger.errors.append(str(error))
            continue
        proof = Proof(where, test.lineno, test.name, tuple(names))
        for name in names:
            if name in ledger.equations:
                ledger.equations[name].proofs.append(proof)
            else:
                ledger.errors.append(
                    f"{where}:{test.lineno}: {test.name} is marked with "
                    f"equation ({name}), which no notebook has"
                )


def read_record(ledger: Ledger) -> None:
    """Read the last figures; note the tests that have none."""
    lines = RECORD.read_text("utf-8").splitlines() if RECORD.exists() else []
    if lines:
        ledger.facts = json.loads(lines[0])
    for line in map(json.loads, lines[1:]):
        exact = line["difference"] is None
        figure = None if exact else (line["difference"], line["bound"])
        ledger.figures[line["test"]] = figure
    for proof in ledger.proofs():
        if proof.id not in ledger.figures:
            ledger.notes.append(
                f"{proof.id} is not measured yet: tools/ledger.py --measure"
            )


def read() -> Ledger:
    """Read notebooks, package, tests and record."""
    ledger = Ledger()
    for path in sources():
        read_chapter(ledger, path)
    for path in sorted((ROOT / "bertnb").glob("*.py")):
        read_module(ledger, path)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        read_tests(ledger, path)
    for one in ledger.equations.values():
        if one.lines and not one.proofs:
            line = one.lines[0]
            ledger.errors.append(
                f"equation ({one.number}) of {one.page}.md is in the package "
                f"({line.path}:{line.number}) but no test proves it: mark the "
                f'one that does with @pytest.mark.equation("{one.number}")'
            )
    read_record(ledger)
    return ledger


def power(figure: float) -> str:
    """Return a figure in two digits: 0, 0.012 or 3.1e-15 as TeX."""
    mantissa, exponent = f"{figure:.1e}".split("e")
    if figure == 0 or -4 < int(exponent) < 2:
        return f"{figure:.2g}"
    mantissa = mantissa.removesuffix(".0")
    factor = "" if mantissa == "1" else f"{mantissa} \\cdot "
    return f"{factor}10^{{{int(exponent)}}}"


def blob(path: str, number: int) -> str:
    """Return the address of a line in the repository."""
    return f"{repository()}/blob/main/{path}#L{number}"


def code_of(one: Equation) -> str:
    """Return the links to the package's lines, under their owners."""
    owners: dict[tuple[str, str], list[str]] = {}
    for line in one.lines:
        place = (line.path, line.owner)
        file = "" if place in owners else Path(line.path).name
        link = f"[`{file}:{line.number}`]({blob(line.path, line.number)})"
        owners.setdefault(place, []).append(link)
    parts = []
    for (path, owner), links in owners.items():
        name = f"`{owner}`" if owner else ""
        if owner and not owner.startswith("_"):
            module = path.removesuffix(".py").replace("/", ".")
            name = f"{{py:obj}}`{owner} <{module}.{owner}>`"
        parts.append(f"{name} {', '.join(links)}".strip())
    return "<br>".join(parts) or "no code"


def proof_of(ledger: Ledger, one: Equation) -> str:
    """Return the tests with their figures, and the chapter's own cells."""
    parts = []
    for proof in sorted(one.proofs, key=lambda proof: proof.id):
        words = proof.name.removeprefix("test_").replace("_", " ")
        text = f'[{words}]({blob(proof.path, proof.number)} "{proof.id}"): '
        if proof.id not in ledger.figures:
            text += "*not measured*"
        elif (figure := ledger.figures[proof.id]) is None:
            text += "holds"
        else:
            text += f"${power(figure[0])} \\le {power(figure[1])}$"
        parts.append(text)
    places = one.cells or ([] if one.near is None else [one.near])
    if places:
        links = ", ".join(
            f'<a href="../{one.page}.html#cell-{place}">{place}</a>'
            for place in places
        )
        where = "the chapter" if one.cells else "its section"
        word = "cells" if len(places) > 1 else "cell"
        parts.append(f"in {where}: {word} {links}")
    return "<br>".join(parts) or "a derivation"


def rows(ledger: Ledger, equations: list[Equation]) -> Iterator[str]:
    """Yield a chapter's table."""
    yield "```{list-table}"
    yield ":class: ledger"
    yield ":header-rows: 1"
    yield ":widths: 36 28 36"
    yield "* - equation"
    yield "  - in the package"
    yield "  - proof, with the largest difference"
    for one in equations:
        yield f"* - ({one.number}) <br> ${one.tex}$"
        yield f"  - {code_of(one)}"
        yield f"  - {proof_of(ledger, one)}"
    yield "```"


def totals(ledger: Ledger) -> str:
    """Return the head of the page: what there is, and the worst of it."""
    every = list(ledger.equations.values())
    model = [one for one in every if one.lines]
    tests = ledger.proofs()
    figures = [f for p in tests if (f := ledger.figures.get(p.id))]
    exact = sum(ledger.figures.get(p.id, 0) is None for p in tests)
    sharp = [d for d, bound in figures if bound <= 1e-4]
    text = (
        f"The book has **{len(every)} numbered equations**. "
        f"**{len(model)}** of them are named by a line of the package, and "
        f"each of these has a test; the build of this page fails without. "
        f"In all, **{len(tests)} tests** prove "
        f"{sum(bool(one.proofs) for one in every)} equations: "
        f"{len(figures)} measure a difference, {exact} demand what is true or false. "
    )
    if sharp:
        text += (
            f"Of the {len(sharp)} that compare numbers (bounds up to "
            f"${power(1e-4)}$), the largest difference is "
            f"${power(max(sharp))}$; "
        )
        text += (
            f"the other {len(figures) - len(sharp)} have wider bounds, as for "
            "samples of random numbers."
        )
    return text


def page(ledger: Ledger) -> str:
    """Return the page in MyST Markdown."""
    lines = ["# The ledger", "", totals(ledger), ""]
    if facts := ledger.facts:
        versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
        lines += [
            f"The differences were measured by `{facts['command']}` at commit "
            f"{facts['commit']} on {facts['hardware']['cpu']}, with {versions}. "
            "`make test` measures them again on your machine, against the same "
            "bounds.",
            "",
        ]
    lines += [
        "Each line: the equation, with a link to where it is derived; the "
        "lines of the package that name it; the tests that prove it, each "
        "with the largest difference that it measured and the bound that it "
        "may not exceed; and the cells of the chapter that compute with it, as "
        "their comments or the paragraph above them say; where none says so, "
        "the next cell of its section.",
        "",
    ]
    pages: dict[str, list[Equation]] = {}
    for one in sorted(ledger.equations.values(), key=lambda e: order(e.number)):
        pages.setdefault(one.page, []).append(one)
    for name, equations in sorted(pages.items()):
        chapter = CHAPTER.match(name)
        number = int(chapter[1]) if chapter else 0
        title = f"{number}. {ledger.titles[name]}" if number else ""
        label = Path(name).name.replace("_", "-")
        lines += [
            f"(ledger-{label})=",
            f"## {title or ledger.titles[name]}",
            "",
        ]
        lines += [f"From [{ledger.titles[name]}](../{name}.ipynb).", ""]
        lines += [*rows(ledger, equations), ""]
    rest = [
        one
        for one in ledger.equations.values()
        if not (one.lines or one.proofs or one.cells or one.near)
    ]
    lines += ["## Definitions and derivations, without code", ""]
    if rest:
        lines += [
            "No line of the package, no test and no cell computes these: they "
            "define a word, or are a step on the way to the next.",
            "",
        ]
        lines += [f"- ({one.number}), {one.heading}" for one in rest]
    else:
        lines += ["None: a cell of its chapter or a test checks each."]
    return "\n".join(lines) + "\n"


def measure() -> int:
    """Run the proofs and write their figures; return the exit status."""
    from nb import QUIET

    os.environ.update(QUIET, HF_HUB_OFFLINE="1", BERTNB_SIZE="tiny")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.json")
        command = [*PYTEST, f"--record-ledger={raw}", "tests"]
        done = subprocess.run([sys.executable, *command], cwd=ROOT)
        if done.returncode:
            print("ledger: a proof fails; the record stays", file=sys.stderr)
            return 1
        tests = json.loads(raw.read_text("utf-8"))
    from bertnb.configuration import BertConfig  # slow: only where all passed
    from bertnb.recipe import PretrainConfig, run_facts

    facts = run_facts(PretrainConfig("ledger", BertConfig()))
    del facts["config"], facts["resumed_at"]
    for peer in ("numpy", "transformers"):
        facts["versions"][peer] = version(peer)
    lines: list[dict[str, Any]] = [
        {"command": "python tools/ledger.py --measure", **facts}
    ]
    for test in tests:
        figures = {
            key: None if test[key] is None else float(f"{test[key]:.1e}")
            for key in ("difference", "bound")
        }
        lines.append({"test": test["test"], **figures})
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    print(f"wrote {RECORD.relative_to(ROOT)}")
    return 0


def main() -> int:
    """Check, write or measure; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check")
    parser.add_argument("--into", type=Path, metavar="FOLDER")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if options.measure:
        return measure()
    ledger = read()
    for note in ledger.notes:
        print(f"ledger: note: {note}", file=sys.stderr)
    for error in ledger.errors:
        print(f"ledger: {error}", file=sys.stderr)
    if ledger.errors:
        return 1
    if options.into:
        options.into.mkdir(parents=True, exist_ok=True)
        text = page(ledger)
        (options.into / "ledger.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
