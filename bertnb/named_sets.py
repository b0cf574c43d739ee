"""Standard sets by name.

Written by tools/extract.py from notebooks/16_named_sets.md: edit that notebook, not this file.
"""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bertnb.configuration import BertnbError
from bertnb.examples import (
    QuestionExample,
    TextExample,
    TokenExample,
    read_articles,
    read_questions,
    read_texts,
    read_tokens,
    span_tags,
    squad_question,
    to_iob2,
)

__all__ = ["NAMED_SETS", "load_examples", "guess_kind", "read_examples"]


# %% The code
_SENTIMENT = ("negative", "positive")
_INFERENCE = ("entailment", "neutral", "contradiction")
_WNUT = (
    "corporation",
    "creative-work",
    "group",
    "location",
    "person",
    "product",
)
_WNUT_TAGS = ("O", *(f"{b}-{kind}" for kind in _WNUT for b in "BI"))


class _Set(NamedTuple):
    """Where a set is, and how it becomes examples."""

    kind: str  # what it is for
    files: dict[str, str]  # split -> its file in the folder BERTNB_DATA
    read: Callable[[Path, str], list[Any]]  # such a file, and its split
    hub: tuple[str, str | None, str | None] | None  # dataset, config, revision
    splits: dict[str, str]  # split -> what the dataset calls it
    row: Callable[[dict[str, Any]], Any] = dict  # makes an example of its row


def _file_sentiment(column: str, path: Path, split: str) -> list[TextExample]:
    examples = read_texts(path, column)
    names: dict[Any, str] = dict(zip("01", _SENTIMENT, strict=True))
    for number, example in enumerate(examples, 1):
        if example.label not in names:
            raise BertnbError(
                f"{path}, row {number}: label {example.label!r}: expected 0 or 1"
            )
    return [replace(e, label=names[e.label]) for e in examples]


def _file_stsb(path: Path, split: str) -> list[TextExample]:
    if split != "test":
        return read_texts(path, "sentence1", "score", "sentence2", numbers=True)
    lines = path.read_text("utf-8").rstrip("\n").split("\n")  # no header
    examples = []
    for number, line in enumerate(lines, 1):
        row = line.split("\t")
        try:
            examples.append(TextExample(row[5], float(row[4]), row[6]))
        except (IndexError, ValueError) as error:
            raise BertnbError(
                f"{path}:{number}: {line!r:.60}: expected 7 fields between "
                "tabs, a number in the fifth, texts in the last two"
            ) from error
    return examples


def _file_wikigold(path: Path, split: str) -> list[TokenExample]:
    sentences = read_articles(path, None)
    train = split == "train"  # 116 of its 145 articles
    return [s for article, s in sentences if (article < 116) == train]


def _file_tokens(path: Path, split: str) -> list[TokenExample]:
    return read_tokens(path)


def _file_questions(path: Path, split: str) -> list[QuestionExample]:
    return read_questions(path)


def _row_text(
    names: Sequence[str], columns: Sequence[str], row: dict[str, Any]
) -> TextExample | None:
    """Make an example of a row; none of one whose label is not known."""
    text, label, *pair = columns
    if row[label] == -1:
        return None
    known = names[row[label]] if names else 5.0 * row[label]
    return TextExample(row[text], known, row[pair[0]] if pair else None)


def _row_tokens(row: dict[str, Any]) -> TokenExample:
    tags = to_iob2([_WNUT_TAGS[number] for number in row["ner_tags"]])
    return TokenExample(tuple(row["tokens"]), tags)


def _row_spans(row: dict[str, Any]) -> TokenExample:
    label: dict[str, Any] = {}
    for e in row["entities"]:
        place = [e["start_offset"], e["end_offset"] - 1]
        label.setdefault(e["label"], {}).setdefault(e["entity"], []).append(
            place
        )
    tags = span_tags(row["text"], label, row["text"])
    return TokenExample(tuple(row["text"]), tags)


def _row_question(row: dict[str, Any]) -> QuestionExample:
    found = row["answers"]
    pairs = zip(found["text"], found["answer_start"], strict=True)
    answers = [{"text": text, "answer_start": start} for text, start in pairs]
    return squad_question({**row, "answers": answers}, row["context"])


def _questions(
    files: dict[str, str], hub: str, config: str | None, *splits: str
) -> _Set:
    found = (hub, config, None)
    same = dict(zip(splits, splits, strict=True))
    return _Set("questions", files, _file_questions, found, same, _row_question)


_TWO = {"train": "train", "validation": "validation"}
_THREE = {**_TWO, "test": "test"}
_SETS = {
    "sst2": _Set(
        "classification",
        {"train": "sst2/train.tsv", "validation": "sst2/dev.tsv"},
        partial(_file_sentiment, "sentence"),
        ("stanfordnlp/sst2", None, None),
        _TWO,
        partial(_row_text, _SENTIMENT, ("sentence", "label")),
    ),
    "chnsenticorp": _Set(
        "classification",
        {
            "train": "zh/chnsenticorp/train.tsv",
            "validation": "zh/chnsenticorp/dev.tsv",
            "test": "zh/chnsenticorp/test.tsv",
        },
        partial(_file_sentiment, "text_a"),
        ("lansinuote/ChnSentiCorp", None, None),
        _THREE,
        partial(_row_text, _SENTIMENT, ("text", "label")),
    ),
    "stsb": _Set(
        "regression",
        {
            "train": "stsb/train.tsv",
            "validation": "stsb/dev.tsv",
            "test": "stsb/sts-test_gold.tsv",
        },
        _file_stsb,
        ("sentence-transformers/stsb", None, None),  # its scores are 0 to 1
        _THREE,
        partial(_row_text, (), ("sentence1", "score", "sentence2")),
    ),
    "snli": _Set(
        "classification",
        {},
        _file_tokens,
        ("stanfordnlp/snli", None, None),
        _THREE,
        partial(_row_text, _INFERENCE, ("premise", "label", "hypothesis")),
    ),
    "mnli": _Set(
        "classification",
        {},
        _file_tokens,
        ("nyu-mll/glue", "mnli", None),
        {
            "train": "train",
            "validation": "validation_matched",
            "validation_mismatched": "validation_mismatched",
        },
        partial(_row_text, _INFERENCE, ("premise", "label", "hypothesis")),
    ),
    "wnut17": _Set(
        "tokens",
        {
            "train": "wnut17/wnut17train.conll",
            "validation": "wnut17/emerging.dev.conll",
            "test": "wnut17/emerging.test.annotated",
        },
        _file_tokens,
        # the dataset is a program, which is not run; this is its conversion
        ("leondz/wnut_17", None, "refs/convert/parquet"),
        _THREE,
        _row_tokens,
    ),
    "wikigold": _Set(
        "tokens",
        dict.fromkeys(("train", "test"), "wikigold/wikigold.conll.txt"),
        _file_wikigold,
        None,  # the hub's copies have splits of their own
        {},
    ),
    "cluener": _Set(
        "tokens",
        {
            "train": "zh/cluener/train.json",
            "validation": "zh/cluener/dev.json",
        },
        _file_tokens,
        ("xusenlin/clue-ner", None, None),
        _TWO,
        _row_spans,
    ),
    "squad": _questions(
        {"train": "squad/train-40-articles.json.gz"},
        "rajpurkar/squad",
        None,
        *_TWO,
    ),
    "squad_v2": _questions({}, "rajpurkar/squad_v2", None, *_TWO),
    "xquad.en": _questions(
        {"validation": "xquad/xquad.en.json"},
        "google/xquad",
        "xquad.en",
        "validation",
    ),
    "xquad.zh": _questions(
        {"validation": "xquad/xquad.zh.json"},
        "google/xquad",
        "xquad.zh",
        "validation",
    ),
    "drcd": _questions(
        {
            "validation": "zh/drcd/DRCD_dev.json",
            "test": "zh/drcd/DRCD_test.json",
        },
        "clue/clue",
        "drcd",
        *_THREE,
    ),
}


NAMED_SETS = {  # name -> what it is for, and its splits
    name: (found.kind, tuple({**found.files, **found.splits}))
    for name, found in _SETS.items()
}


def load_examples(name: str, split: str) -> list[Any]:
    """Return a standard set, from the folder BERTNB_DATA or from the hub.

    Args:
        name: "sst2", "chnsenticorp" (sentiment: "negative", "positive"),
            "stsb" (similarity, 0 to 5), "snli", "mnli" (inference), "wnut17",
            "wikigold", "cluener" (entities), "squad", "squad_v2", "xquad.en",
            "xquad.zh", "drcd" (questions).
        split: "train", "validation" or "test", as far as the set has them;
            "validation" of "mnli" is of the genres of its training, and
            "validation_mismatched" of others.

    Returns:
        list of TextExample, TokenExample or QuestionExample. In the folder
        "squad" is the first 40 articles, on the hub all of them.

    Raises:
        ValueError: there is no such set, or it has no such split.
        BertnbError: it is not in the folder, and cannot be loaded from the
            hub; or a row is bad.
    """
    if name not in _SETS:
        raise ValueError(f"name={name!r}: expected one of {', '.join(_SETS)}")
    found = _SETS[name]
    if split not in (splits := NAMED_SETS[name][1]):
        known = ", ".join(splits)
        raise ValueError(f"split={split!r}: {name} has {known}")
    folder = os.environ.get("BERTNB_DATA")
    if folder and split in found.files:
        path = Path(folder, found.files[split])
        if path.is_file():
            return found.read(path, split)
    return _from_hub(name, found, split)


def _from_hub(name: str, found: _Set, split: str) -> list[Any]:
    where = f"{name}, split {split}"
    remedy = (
        f"put {found.files[split]} into the folder that the variable BERTNB_DATA names"
        if split in found.files
        else "it needs the network"
    )
    if found.hub is None or split not in found.splits:
        raise BertnbError(f"{where} is not on the hub: {remedy}")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise BertnbError(
            f'{where}: pip install "bertnb[data]", or {remedy}'
        ) from error
    hub, config, revision = found.hub
    try:
        rows = load_dataset(
            hub, config, split=found.splits[split], revision=revision
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise BertnbError(
            f"{where}: {hub} cannot be loaded ({error}): {remedy}"
        ) from error
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(found.row(row))
        except (LookupError, TypeError, ValueError) as error:
            raise BertnbError(
                f"{hub}, {split}, row {number}: {error!r}"
            ) from error
    return [example for example in examples if example is not None]


# %% The code: a set or a file
def guess_kind(
    source: str,
    text: str = "text",
    label: str | None = "label",
    text_pair: str | None = None,
) -> str:
    """Say what a named set or a file is for: "classification", "regression",
    "tokens" or "questions".

    Labels that are numbers, and not all whole, are for regression. Other
    arguments as in `read_texts`.

    Raises:
        FileNotFoundError: there is neither such a set nor such a file.
        ValueError: a .json file is none of these.
    """
    _check_there(source)
    ending = source.lower().removesuffix(".gz").rpartition(".")[2]
    if source in NAMED_SETS:
        return NAMED_SETS[source][0]
    if ending not in ("csv", "tsv", "json", "jsonl"):
        return "tokens"
    first = _first_object(source) if ending in ("json", "jsonl") else {}
    if "data" in first or (ending == "json" and not first):
        return "questions"
    if isinstance(first.get("label"), dict):
        return "tokens"
    try:
        numbers = read_texts(source, text, label, text_pair, numbers=True)
    except BertnbError:  # a label is no number, or who reads it will say
        return "classification"
    whole = all(float(example.label or 0).is_integer() for example in numbers)
    return "classification" if whole else "regression"


def read_examples(
    source: str,
    kind: str,
    split: str = "train",
    text: str = "text",
    label: str | None = "label",
    text_pair: str | None = None,
) -> list[Any]:
    """Return the examples of a named set, or of a file.

    Args:
        kind: what they are for, as `guess_kind` says it.
        split: of a named set. Other arguments as in `read_texts`.

    Raises:
        BertnbError: a row is bad; the message names the place.
        FileNotFoundError: there is neither such a set nor such a file.
        ValueError: there is no such kind, or the set is for another.
    """
    kinds = sorted({known for known, _ in NAMED_SETS.values()})
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(kinds)}")
    _check_there(source)
    if source in NAMED_SETS:
        if (known := NAMED_SETS[source][0]) != kind:
            raise ValueError(f"{source} is for {known}, not for {kind}")
        return load_examples(source, split)
    if kind == "tokens":
        return read_tokens(source)
    if kind == "questions":
        return read_questions(source)
    return read_texts(source, text, label, text_pair, kind == "regression")


def _check_there(source: str) -> None:
    if source not in NAMED_SETS and not Path(source).exists():
        raise FileNotFoundError(
            f"{source}: there is no such file, and no set of that name; sets "
            f"are {', '.join(NAMED_SETS)}"
        )


def _first_object(source: str) -> dict[str, Any]:
    """Return the object on the first line of a file, {} if there is none."""
    packed = source.lower().endswith(".gz")
    with (gzip.open if packed else open)(source, "rb") as file:
        try:
            found = json.loads(file.readline())
        except ValueError:
            found = {}
    return found if isinstance(found, dict) else {}
