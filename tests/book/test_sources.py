"""The page on what the articles say: rows, verdicts, links and counts."""

import importlib.util
import json
import re
from collections import Counter
from typing import NamedTuple

import extract
import nbformat
import pytest
import yaml
from manifest import ROOT, sources

PAGE = ROOT / "book" / "sources.md"
NOTEBOOK = ROOT / "notebooks" / "90_articles.md"
ARTICLES = ["000", "001", "002", "003", "004"]
KINDS = {
    "F": "formulas",
    "S": "steps",
    "C": "claims",
    "P": "programs",
    "A": "applications",
    "T": "tools",
    "Q": "questions",
    "O": "outlook",
}
VERDICTS = ["right", "vague", "wrong"]
TO_COME = re.compile(r"to come: no issue yet\b")
TEXT = PAGE.read_text(encoding="utf-8")


class Row(NamedTuple):
    """One statement of an article."""

    article: str
    kind: str
    number: int
    says: str
    verdict: str
    book: str

    @property
    def id(self) -> str:
        return f"{self.article}-{self.kind}{self.number}"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def rows() -> list[Row]:
    found = []
    for line in TEXT.splitlines():
        match = re.match(r"\| (\d{3})-([A-Z])(\d+) \|", line)
        if match:
            _, says, verdict, book = cells(line)
            found.append(
                Row(*match.group(1, 2), int(match[3]), says, verdict, book)
            )
    return found


ROWS = rows()
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


def test_ids_are_unique_and_consecutive() -> None:
    order = list(KINDS)
    wanted = [
        (article, kind, number)
        for article in ARTICLES
        for kind in order
        for number in range(1, 1 + sum(r[:2] == (article, kind) for r in ROWS))
    ]
    assert [row[:3] for row in ROWS] == wanted


def test_every_row_of_the_tables_was_read() -> None:
    lines = [line for line in TEXT.splitlines() if re.match(r"\| \d{3}-", line)]
    assert len(lines) == len(ROWS) > 200
    assert {row.verdict for row in ROWS} == set(VERDICTS)


def table(first: str) -> list[list[str]]:
    """Return the body of the table whose head has this second column."""
    (body,) = re.findall(
        rf"^\| article \| {first} .*\n\|[-:|]+\|\n((?:\|.*\n)+)", TEXT, re.M
    )
    return [cells(line) for line in body.splitlines()]


@pytest.mark.parametrize(
    ("first", "field", "values"),
    [("formulas", "kind", [*KINDS]), ("right", "verdict", VERDICTS)],
)
def test_the_counts_at_the_head_are_those_of_the_rows(
    first: str, field: str, values: list[str]
) -> None:
    counts = Counter((row.article, getattr(row, field)) for row in ROWS)
    wanted = []
    for article in [*ARTICLES, "all"]:
        among = ARTICLES if article == "all" else [article]
        line = [sum(counts[a, value] for a in among) for value in values]
        line += [sum(line)] if field == "kind" else []
        wanted.append([article, *map(str, line)])
    assert table(first) == wanted


def test_the_prose_gives_the_right_number() -> None:
    assert f"what is in them: {len(ROWS)} statements" in TEXT
    for article in ARTICLES:
        assert f"\n## Article {article}\n" in TEXT


def internal(text: str) -> list[str]:
    links = re.findall(r"\]\(([^)]+)\)", text)
    return [link for link in links if not link.startswith("https://")]


def equations(text: str) -> list[str]:
    return re.findall(r"\((\d+\.\d+)\)", text)


@each_row
def test_the_row_leads_somewhere(row: Row) -> None:
    assert row.verdict in VERDICTS
    assert row.says
    assert internal(row.book) or equations(row.book) or TO_COME.search(row.book)
    for mention in re.findall(r"to come:.*", row.book):
        assert TO_COME.match(mention), mention
    for link in internal(row.says + row.book):
        path = (PAGE.parent / link).resolve()
        source = path.with_suffix(".md")  # a notebook is made of it
        assert (source if path.suffix == ".ipynb" else path).exists(), link


# an equation that is cited, and a part of it: numbers may move, meanings not
EQUATIONS = {
    "1.1": r"c_i = \sum",
    "1.2": r"q_i = x_i W_q",
    "1.3": r"z_{ij} = \frac{q_i \cdot k_j}",
    "1.4": r"x_i W_q \,(x_1 W_k",
    "1.5": r"\operatorname{Attention}(Q, K, V) =",
    "1.6": r"\operatorname{Var}(q \cdot k)",
    "1.7": r"M_{ij}\, e^{z_{ij}}",
    "1.8": r"\mathrm dV = A^\top",
    "1.11": r"\mathrm dK =",
    "2.1": r"\operatorname{MultiHead}(Q, K, V) =",
    "2.2": r"\text{head}_i = \operatorname{Attention}",
    "2.3": r"\sum_{i=1}^{A} \text{head}_i\, W_i^O",
    "2.5": r"X \begin{bmatrix} W_1^Q",
    "2.8": r"\text{multiply-adds}",
    "3.1": r"f(\Pi X) = \Pi f(X)",
    "3.2": r"\mathbf{1}^\top f(\Pi X)",
    "3.3": r"y_p = x_p + e_p",
    "3.9": r"\text{learned.}",
    "4.8": r"\operatorname{FFN}(x) =",
    "5.1": r"E_{w_i} + E^{\text{seg}}",
    "6.1": r"\operatorname{Dropout}(\operatorname{MultiHead}",
    "6.2": r"\operatorname{Layer}_n",
    "6.3": r"p = \tanh",
    "6.4": r"\operatorname{BertModel}(",
    "6.5": r"(V + M + T)\,H",
    "7.1": r"s_{k+1} = \max",
    "7.5": r"\arg\max_{x, y}\, n_{xy}",
    "7.6": r"\text{segment } 1",
    "8.1": r"P(w_i \mid w_{-i}) =",
    "8.2": r"t_i \cdot E_w + \beta_w",
    "8.3": r"\operatorname{round}(\rho\, n)",
    "8.4": r"\text{[MASK]} & u < 0.8",
    "8.5": r"\ell = -\frac{1}{\lvert M \rvert}",
    "8.9": r"\operatorname{PLL}(w) =",
    "9.1": r"\text{what follows } A",
    "9.2": r"W_y \tanh(W_x x + b_x) + b_y",
    "9.7": r"u^2 / (2n)",
    "11.4": r"\hat m_t}{\sqrt{\hat v_t} + \varepsilon} \tag",
    "11.6": r"\lambda\, \theta_{t-1}",
    "11.7": r"(T - s) / (T - W)",
    "11.8": r"g \cdot \min",
    "12.1": r"\mathcal L_{\text{words}} + \mathcal L_{\text{order}}",
    "17.1": r"(h \odot m)\, W_c + b_c",
    "17.2": r"\log P(y_b \mid x_b)",
    "19.1": r"F_1 =",
    "19.2": r"(h_i \odot m_i)\, W_c + b_c",
    "20.1": r"s_i = h_i \cdot w_s",
    "20.2": r"\sum_{j=0}^{L-1} \exp s_j",
    "20.3": r"\lvert R_s \rvert",
}


def displays() -> dict[str, str]:
    found = {}
    for path in sources():
        for display in re.findall(
            r"\$\$(.*?)\$\$", path.read_text("utf-8"), re.S
        ):
            number = re.search(r"\\tag\{(\d+\.\d+)\}", display)
            if number:
                found[number[1]] = " ".join(display.split())
    return found


def test_the_equations_that_are_cited_are_still_those() -> None:
    assert set(equations(TEXT)) == set(EQUATIONS)
    written = displays()
    for number, part in EQUATIONS.items():
        assert part in written[number], f"({number}) has another meaning now"


@each_row
def test_a_correction_has_evidence(row: Row) -> None:
    """What is called wrong is so by something that is there already."""
    if row.verdict == "wrong":
        assert internal(row.book)


def test_each_program_of_the_articles_was_run() -> None:
    ran = nbformat.read(NOTEBOOK.with_suffix(".ipynb"), 4)
    headings = re.findall(
        r"^## (\d{3}):", "\n".join(c.source for c in ran.cells), re.M
    )
    assert set(headings) == set(ARTICLES)
    programs = {row.article for row in ROWS if row.kind == "P"}
    assert programs == set(ARTICLES)
    for row in ROWS:
        if row.kind == "P" and "whole program" in row.says:
            assert "90_articles.ipynb" in row.book, row.id


def test_the_chapter_says_what_the_record_holds() -> None:
    record = json.loads(
        (ROOT / "book/runs/articles-tensorflow.json").read_text()
    )
    first, second = record["article 000"], record["article 003"]
    assert first["model(tensor, attention mask)"] == "None"
    assert first["the batch's mask_token_id"].startswith("AttributeError")
    told = NOTEBOOK.read_text(encoding="utf-8")
    for version in ("tensorflow", "transformers"):
        assert record["versions"][version] in told
    for said in second.values():
        kind, _, what = said.partition(": ")
        assert what[:20].lower() in told.lower() or "trains" in kind, said


def test_the_pages_are_in_the_book() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    (part,) = (
        part["chapters"]
        for part in contents["parts"]
        if part["caption"] == "The five articles"
    )
    files = [chapter["file"] for chapter in part]
    assert files == ["book/sources", "notebooks/90_articles"]


def test_a_notebook_without_a_module_exports_nothing() -> None:
    assert extract.module(NOTEBOOK) is None


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("notebooks/17_classification", 17),
        ("notebooks/90_articles", 0),  # an appendix has no number
        ("book/sources", 0),
    ],
)
def test_only_chapters_show_a_number(page: str, number: int) -> None:
    file = ROOT / "book" / "_ext" / "bertbook.py"
    spec = importlib.util.spec_from_file_location("bertbook", file)
    assert spec is not None
    assert spec.loader is not None
    bertbook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bertbook)
    assert bertbook.chapter_number(page) == number
