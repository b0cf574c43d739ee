"""Examples.

Written by tools/extract.py from notebooks/16_examples.md: edit that notebook, not this file.
"""

import csv
import gzip
import json
import math
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

from bertnb.configuration import BertnbError

__all__ = [
    "TextExample",
    "to_iob2",
    "TokenExample",
    "Answer",
    "QuestionExample",
    "read_texts",
    "read_articles",
    "span_tags",
    "read_tokens",
    "squad_question",
    "read_questions",
]


# %% An example for each kind of question
def _check_text(name: str, value: object) -> None:
    """Refuse what is no text, and what no file of UTF-8 can hold."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}: expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, a lone surrogate, at {error.start}"
        ) from error


@dataclass(frozen=True)
class TextExample:
    """A text or a pair of texts, and what is known of it.

    Args:
        text: what is classified. May be empty.
        label: the name of its class, or a number, or None: not known.
        text_pair: the second text, where there are two.

    Raises:
        TypeError: a text is not a str.
        ValueError: a text holds a lone surrogate, or the label is a number
            that is not finite.
    """

    text: str
    label: str | float | None = None
    text_pair: str | None = None

    def __post_init__(self) -> None:
        _check_text("text", self.text)
        if self.text_pair is not None:
            _check_text("text_pair", self.text_pair)
        if (
            isinstance(self.label, Real)
            and not isinstance(self.label, int)
            and not math.isfinite(self.label)
        ):
            raise ValueError(f"label={self.label}: expected a finite number")


# %% Entities as tags
_TAG = re.compile(r"O|[BI]-.+")


def to_iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags in IOB1, IOB2 or IO as IOB2: an entity begins with B-.

    An I- that continues nothing of its type begins an entity, as in IOB1 and
    IO, and as seqeval reads it. Tags that are IOB2 come back unchanged.

    Raises:
        ValueError: a tag is none of O, B-TYPE and I-TYPE.
    """
    found: list[str] = []
    before = "O"
    for tag in tags:
        if not _TAG.fullmatch(tag):
            raise ValueError(f"tag {tag!r}: expected O, B-TYPE or I-TYPE")
        begins = tag[0] == "I" and tag[1:] != before[1:]
        found.append("B" + tag[1:] if begins else tag)
        before = tag
    return tuple(found)


@dataclass(frozen=True)
class TokenExample:
    """A sentence as words, and a tag for each.

    Args:
        words: the words. May be none.
        tags: as many, in IOB2 (`to_iob2` makes them), or None: not known.

    Raises:
        TypeError: a word is not a str.
        ValueError: the numbers differ, the tags are not IOB2, or a word
            holds a lone surrogate.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for number, word in enumerate(self.words):
            _check_text(f"word {number}", word)
        if self.tags is None:
            return
        if len(self.tags) != len(self.words):
            raise ValueError(
                f"{len(self.words)} words, but {len(self.tags)} tags"
            )
        if tuple(self.tags) != (right := to_iob2(self.tags)):
            raise ValueError(
                f"tags={' '.join(self.tags)!r} are not IOB2: to_iob2 makes "
                f"{' '.join(right)!r} of them"
            )


# %% Questions as spans
@dataclass(frozen=True)
class Answer:
    """A piece of a context: its text, and where it starts, in characters."""

    text: str
    start: int


@dataclass(frozen=True)
class QuestionExample:
    """A question about a text, and which pieces of the text answer it.

    Args:
        question, context: texts.
        answers: all that count as right; (): the context has no answer;
            None: not known.
        id: a name for the question.

    Raises:
        TypeError: a text is not a str.
        ValueError: an answer is empty, or not in the context at its start.
    """

    question: str
    context: str
    answers: tuple[Answer, ...] | None = None
    id: str = ""

    def __post_init__(self) -> None:
        _check_text("question", self.question)
        _check_text("context", self.context)
        for text, start in ((a.text, a.start) for a in self.answers or ()):
            if not text or not 0 <= start == self.context.find(text, start):
                found = self.context.find(text) if text else -1
                hint = f"it is at {found}" if found >= 0 else "it is nowhere"
                raise ValueError(
                    f"answer {text!r} is not at character {start} of the "
                    f"context; {hint}"
                )


# %% Tables
@contextmanager
def _at(where: object, expected: str = "") -> Iterator[None]:
    """Put the place in front of an error's message."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BertnbError(f"{where}: {text}{expected}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines of a file, numbered from 1, with their ends."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                # a byte order mark is no part of the first line
                yield (
                    number,
                    line.decode("utf-8-sig" if number == 1 else "utf-8"),
                )
        except UnicodeDecodeError as error:
            raise BertnbError(
                f"{path}:{number}: not UTF-8 text, byte {error.start} is "
                f"{error.object[error.start]:#x}: convert the file first, as iconv does"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BertnbError(
                f"{path}: not a whole gzip file: {error}"
            ) from error


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Give the fields of each row of a table, with the line it begins on."""
    if _kind(path) == ".tsv":  # no quoting: a quote is a character
        for number, line in _lines(path):
            yield number, line.rstrip("\r\n").split("\t")
        return
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    while True:
        begins = rows.line_num + 1
        limit = csv.field_size_limit(2**31 - 1)  # else 131,072 characters
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise BertnbError(
                f"{path}:{begins}: {error}: in a field in quotes, each quote is written twice"
            ) from error
        finally:
            csv.field_size_limit(limit)
        yield begins, row


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Give the rows under a header as name -> field; empty rows are left out."""
    header: list[str] = []
    for number, fields in _fields(path):
        if not any(fields):
            continue
        if not header:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise BertnbError(
                    f"{path}:{number}: a column occurs twice: {', '.join(header)}"
                )
            continue
        if len(fields) != len(header):
            more = _kind(path) == ".csv" and len(fields) > len(header)
            raise BertnbError(
                f"{path}:{number}: {len(fields)} fields, but {len(header)} "
                f"columns, {', '.join(header)}"
                + "; a field with a comma needs quotes"
                * more
            )
        yield number, dict(zip(header, fields, strict=True))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the objects of a file that has one on each line."""
    for number, line in _lines(path):
        if line.strip():
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise BertnbError(
                    f"{path}:{number}: not JSON, column {error.colno}: {error.msg}"
                ) from error
            if not isinstance(values, dict):
                raise BertnbError(
                    f"{path}:{number}: {line.strip()[:30]!r}: expected an object, {{...}}"
                )
            yield number, values


def _label(value: object, numbers: bool) -> str | float:
    """Return a label as it counts: a number, or the name without spaces."""
    name = str(value).strip()
    with suppress(ValueError):
        if numbers and not isinstance(value, bool):
            return float(name)
    if not numbers and name and type(value) in (str, int):
        return name
    raise ValueError(
        f"label {value!r}: expected "
        + ("a number" if numbers else "the name of a class")
    )


def _some(examples: list[Any], path: Path) -> list[Any]:
    """Return the examples of a file, which must have one."""
    if not examples:
        raise BertnbError(f"{path}: no examples in it")
    return examples


def read_texts(
    path: str | Path,
    text: str = "text",
    label: str | None = "label",
    text_pair: str | None = None,
    numbers: bool = False,
) -> list[TextExample]:
    """Read a table of texts with their labels.

    Args:
        path: a file .csv (with quotes, as spreadsheets write it), .tsv (fields
            are what is between tabs) or .jsonl (an object a line), with a
            header where it is a table; also with .gz. UTF-8.
        text, label, text_pair: the names of the columns; None: not read.
        numbers: labels are numbers; False: names of classes.

    Raises:
        BertnbError: a row is bad; the message names file and line.
        FileNotFoundError: there is no such file.
        ValueError: the name of the file ends otherwise.
    """
    path, examples = Path(path), []
    if _kind(path) not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"path={str(path)!r}: expected .csv, .tsv or .jsonl")
    for number, row in (
        _objects(path) if _kind(path) == ".jsonl" else _table(path)
    ):
        with _at(f"{path}:{number}"):
            for column in (text, label, text_pair):
                if column is not None and column not in row:
                    raise ValueError(
                        f"no column {column!r}; there are {', '.join(row)}"
                    )
            examples.append(
                TextExample(
                    row[text],
                    None if label is None else _label(row[label], numbers),
                    None if text_pair is None else row[text_pair],
                )
            )
            if not row[text].strip():
                raise ValueError(f"column {text!r} holds no text")
    return _some(examples, path)


# %% Words and characters
def read_articles(
    path: Path, separator: str | None
) -> Iterator[tuple[int, TokenExample]]:
    """Give the sentences of a CoNLL file, with the numbers of their articles.

    Articles are what is between lines that begin with -DOCSTART-, numbered
    from 0. Arguments and errors are those of `read_tokens`.
    """
    rows: list[list[str]] = []
    article, width, least = 0, 0, 2 if separator else 1
    for number, line in chain(_lines(path), [(0, "")]):
        line = line.rstrip(" \t\r\n")
        if line and not line.startswith("-DOCSTART-"):
            rows.append(re.split(re.escape(separator or "") or "[ \t]+", line))
            width = width or len(rows[0])
            with _at(f"{path}:{number}"):
                if not least <= len(rows[-1]) == width or not rows[-1][0]:
                    raise ValueError(
                        f"{line!r}: expected {max(width, least)} columns, "
                        "the word first"
                    )
                to_iob2(rows[-1][-1:] if width > 1 else ())
            continue
        if rows:
            words = tuple(row[0] for row in rows)
            known = to_iob2([row[-1] for row in rows]) if width > 1 else None
            yield article, TokenExample(words, known)
        rows = []
        article += line.startswith("-DOCSTART-")


def span_tags(text: str, label: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return an IOB2 tag for each character of a text.

    Args:
        text: the text.
        label: {type: {entity: [[first, last], ...]}}, characters from 0, the
            last included. Of entities that overlap, the longest counts, with
            a warning.
        where: the place, for the warning.

    Raises:
        ValueError: `label` is not like that, or an entity is not where it
            says.
    """
    tags = ["O"] * len(text)
    try:
        spans = [
            (int(first), int(last), kind, words)
            for kind, entities in label.items()
            for words, places in entities.items()
            for first, last in places
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            'label is not {"TYPE": {"entity": [[first, last], ...]}}'
        ) from error
    for first, last, kind, words in sorted(spans, key=lambda s: s[0] - s[1]):
        if first < 0 or text[first : last + 1] != words or not words:
            raise ValueError(
                f"entity {words!r} is not at characters {first} to {last}"
            )
        if any(tag != "O" for tag in tags[first : last + 1]):
            warnings.warn(
                f"{where}: {words!r} overlaps another entity: left out",
                stacklevel=1,
            )
        else:
            tags[first] = f"B-{kind}"
            tags[first + 1 : last + 1] = [f"I-{kind}"] * (last - first)
    return tuple(tags)


def read_tokens(
    path: str | Path, separator: str | None = None
) -> list[TokenExample]:
    """Read sentences of tagged words, in whatever scheme, as IOB2.

    Args:
        path: CoNLL columns: a word a line, its tag last, an empty line
            between sentences, IOB1, IOB2 or IO; one column: words without
            tags. Or .jsonl (.json) with an object a line, as in CLUENER:
            "text", and "label": {type: {entity: [[first, last], ...]}}; each
            character is a word. Of entities that overlap, the longest counts,
            with a warning. UTF-8, also with .gz.
        separator: what stands between columns; None: spaces and tabs.

    Raises:
        BertnbError: a line is bad; the message names file and line.
        FileNotFoundError: there is no such file.
    """
    path, examples = Path(path), []
    if _kind(path) not in (".jsonl", ".json"):
        examples = [example for _, example in read_articles(path, separator)]
    else:
        for number, row in _objects(path):
            where = f"{path}:{number}"
            with _at(where):
                text, label = row["text"], row.get("label")
                known = None if label is None else span_tags(text, label, where)
                examples.append(TokenExample(tuple(text), known))
    return _some(examples, path)


# %% Questions in a file
def squad_question(asked: dict[str, Any], context: str) -> QuestionExample:
    """Make an example of a question as SQuAD writes it.

    Args:
        asked: "question", and as far as known "id", "answers" (a list of
            "text" and "answer_start") and "is_impossible".
        context: the text that it is about.

    Raises:
        KeyError: a part is missing.
        TypeError, ValueError: as `QuestionExample`; or a question that is
            called impossible has answers.
    """
    found, impossible = asked.get("answers"), asked.get("is_impossible")
    if found and impossible:
        raise ValueError("is_impossible is true, but there are answers")
    answers = [Answer(a["text"], a["answer_start"]) for a in found or ()]
    known = None if found is None and not impossible else tuple(answers)
    name = str(asked.get("id", ""))
    return QuestionExample(asked["question"], context, known, name)


def read_questions(path: str | Path) -> list[QuestionExample]:
    """Read a file of SQuAD, version 1.1 or 2.0.

    Args:
        path: JSON, {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]};
            UTF-8, also with .gz. A question without "answers" has unknown
            ones; with an empty list, or "is_impossible", it has none.

    Raises:
        BertnbError: the file is not such JSON, or an answer is not in the
            context at its start; the message names the place.
        FileNotFoundError: there is no such file.
    """
    path, examples = Path(path), []
    text = "".join(line for _, line in _lines(path))
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise BertnbError(
            f"{path}:{error.lineno}: not JSON: {error.msg}"
        ) from error
    with _at(path, '; expected {"data": [{"paragraphs": [...]}]}'):
        for i, article in enumerate(whole["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                for k, asked in enumerate(paragraph["qas"]):
                    place = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    with _at(f"{path}: {place}"):
                        example = squad_question(asked, paragraph["context"])
                    examples.append(example)
    return _some(examples, path)
