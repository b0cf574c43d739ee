"""What is read is what was written, whatever the scheme, and sets by name."""

import csv
import gzip
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from bertnb import (
    Answer,
    QuestionExample,
    TextExample,
    TokenExample,
    guess_kind,
    load_examples,
    read_examples,
    read_questions,
    read_texts,
    read_tokens,
    span_tags,
    to_iob2,
)
from bertnb.named_sets import _SETS, NAMED_SETS

DATA = Path(
    os.environ.get("BERTNB_DATA", Path(__file__).parents[3] / "shared/data")
)
TAGS = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
# no lone surrogates: no file holds them; no NUL: csv of Python 3.10 refuses it
CHARACTER = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXT = st.text(CHARACTER, max_size=30).filter(str.strip)


@given(st.lists(TAGS, max_size=8))
@settings(max_examples=100)
def test_to_iob2_keeps_the_entities_that_seqeval_finds(tags):
    found = list(to_iob2(tags))
    assert get_entities(found) == get_entities(tags)
    assert to_iob2(found) == tuple(found)  # IOB2 stays as it is
    for before, tag in zip(["O", *found], found, strict=False):
        assert tag[0] != "I" or before[1:] == tag[1:]


@st.composite
def entities(draw):
    """Entities side by side: (type, number of words), or None for a word."""
    kinds = st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3))
    return draw(st.lists(st.none() | kinds, max_size=6))


@given(entities())
@settings(max_examples=60)
def test_three_schemes_of_the_same_entities(found):
    iob2, iob1, io, last = [], [], [], None
    for entity in found:
        kind, length = entity or (None, 1)
        if kind is None:
            tags = first = ["O"]
        else:
            tags = [f"I-{kind}"] * length
            first = [f"B-{kind}", *tags[1:]]
        iob2 += first
        iob1 += first if kind and kind == last else tags
        io += tags
        last = kind
    assert to_iob2(iob2) == to_iob2(iob1) == tuple(iob2)
    if all(a is None or a[0] != (b or "O")[0] for a, b in pairwise(found)):
        assert to_iob2(io) == tuple(iob2)  # nothing side by side is merged


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
@settings(max_examples=25)
def test_what_a_csv_writer_wrote_is_read(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("csv") / "a.csv.gz"
    with gzip.open(file, "wt", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["second", "text", "label"])
        writer.writerows(rows)
    assert read_texts(file, text_pair="second") == [
        TextExample(text, label.strip(), pair) for pair, text, label in rows
    ]


@given(st.lists(st.tuples(TEXT, st.floats(-9, 9)), min_size=1, max_size=4))
@settings(max_examples=25)
def test_json_lines_are_read(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps({"t": text, "n": n}) + "\n" for text, n in rows]
    file.write_text("\n".join(lines), "utf-8")
    found = read_texts(file, "t", "n", numbers=True)
    assert found == [TextExample(text, n) for text, n in rows]
    unlabelled = read_texts(file, "t", label=None)
    assert [e.label for e in unlabelled] == [None] * len(rows)


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_bytes(b'\xef\xbb\xbftext\tlabel\r\n"a\tx\r\nb"\x0bc,\t 1 \r\n')
    found = read_texts(file)
    assert found == [TextExample('"a', "x"), TextExample('b"\x0bc,', "1")]


def test_a_line_break_in_quotes_is_part_of_the_text(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'text,label\n"a\nb ""c""",x\n,\nd,1\n')
    found = read_texts(file)
    assert found == [TextExample('a\nb "c"', "x"), TextExample("d", "1")]


def test_columns_and_articles(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text(
        "-DOCSTART- -X- O\n\nEU NNP I-ORG\nrejects VBZ O\n \t\n\n"
        "\u3000 NN O\nBerlin NNP I-LOC"
    )
    assert read_tokens(file) == [
        TokenExample(("EU", "rejects"), ("B-ORG", "O")),
        TokenExample(("\u3000", "Berlin"), ("O", "B-LOC")),
    ]
    file.write_text("EU\nrejects\n\nBerlin\n")
    assert read_tokens(file) == [
        TokenExample(("EU", "rejects")),
        TokenExample(("Berlin",)),
    ]
    file.write_text("New York|B-LOC\n")
    assert read_tokens(file, "|")[0].words == ("New York",)


def test_characters_are_the_words_of_spans(tmp_path):
    file = tmp_path / "a.json"
    one = {"text": "张三在北京", "label": {"name": {"张三": [[0, 1]]}}}
    one["label"]["address"] = {"北京": [[3, 4]]}
    two = {"text": "没有", "label": {}}
    lines = [json.dumps(row) for row in (one, two, {"text": "谁"})]
    file.write_text("\n".join(lines), "utf-8")
    first = ("B-name", "I-name", "O", "B-address", "I-address")
    assert read_tokens(file) == [
        TokenExample(tuple("张三在北京"), first),
        TokenExample(("没", "有"), ("O", "O")),
        TokenExample(("谁",)),
    ]


def test_known_none_and_unknown_answers(tmp_path):
    file = tmp_path / "a.json.gz"
    answer = {"text": "Bert", "answer_start": 4}
    asked = [
        {"question": "Who?", "id": 7, "answers": [answer, answer]},
        {"question": "Why?", "id": "b", "answers": [], "is_impossible": True},
        {"question": "When?", "answers": []},
        {"question": "How?", "is_impossible": True},
        {"question": "What?"},
    ]
    paragraphs = [{"context": "But Bert", "qas": asked}]
    whole = json.dumps({"data": [{"paragraphs": paragraphs}]})
    file.write_bytes(gzip.compress(whole.encode()))
    both = (Answer("Bert", 4), Answer("Bert", 4))
    assert read_questions(file) == [
        QuestionExample("Who?", "But Bert", both, "7"),
        QuestionExample("Why?", "But Bert", (), "b"),
        QuestionExample("When?", "But Bert", ()),
        QuestionExample("How?", "But Bert", ()),
        QuestionExample("What?", "But Bert", None),
    ]


# name, split, the dataset's name and what else is asked, rows, examples
TWO = {"text": ["a", "b"], "answer_start": [0, 2]}
HUB = [
    (
        ("sst2", "train"),
        ("stanfordnlp/sst2", None, None),
        [{"sentence": "a", "label": 1, "idx": 0}],
        [TextExample("a", "positive")],
    ),
    (
        ("stsb", "test"),
        ("sentence-transformers/stsb", None, None),
        [{"sentence1": "a", "sentence2": "b", "score": 0.5}],
        [TextExample("a", 2.5, "b")],
    ),
    (
        ("snli", "validation"),
        ("stanfordnlp/snli", None, None),
        [
            {"premise": "a", "hypothesis": "b", "label": -1},
            {"premise": "a", "hypothesis": "b", "label": 2},
        ],
        [TextExample("a", "contradiction", "b")],
    ),
    (
        ("mnli", "validation"),
        ("nyu-mll/glue", "mnli", None),
        [{"premise": "a", "hypothesis": "b", "label": 0, "idx": 9}],
        [TextExample("a", "entailment", "b")],
    ),
    (
        ("wnut17", "test"),
        ("leondz/wnut_17", None, "refs/convert/parquet"),
        [{"id": "0", "tokens": ["a", "b", "c"], "ner_tags": [0, 7, 8]}],
        [TokenExample(("a", "b", "c"), ("O", "B-location", "I-location"))],
    ),
    (
        ("cluener", "train"),
        ("xusenlin/clue-ner", None, None),
        [
            {
                "text": "在北京",
                "entities": [
                    {
                        "start_offset": 1,
                        "end_offset": 3,
                        "entity": "北京",
                        "label": "address",
                    }
                ],
            }
        ],
        [TokenExample(("在", "北", "京"), ("O", "B-address", "I-address"))],
    ),
    (
        ("squad_v2", "train"),
        ("rajpurkar/squad_v2", None, None),
        [
            {"id": "1", "question": "q", "context": "a b", "answers": TWO},
            {
                "id": "2",
                "question": "q",
                "context": "a b",
                "answers": {"text": [], "answer_start": []},
            },
        ],
        [
            QuestionExample("q", "a b", (Answer("a", 0), Answer("b", 2)), "1"),
            QuestionExample("q", "a b", (), "2"),
        ],
    ),
    (
        ("xquad.zh", "validation"),
        ("google/xquad", "xquad.zh", None),
        [{"id": "1", "question": "q", "context": "a b", "answers": TWO}],
        [QuestionExample("q", "a b", (Answer("a", 0), Answer("b", 2)), "1")],
    ),
]


@pytest.mark.parametrize(("asked", "where", "rows", "examples"), HUB)
def test_a_set_from_the_hub(monkeypatch, asked, where, rows, examples):
    calls = []

    def load_dataset(name, config=None, *, split, revision=None):
        calls.append((name, config, revision, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.delenv("BERTNB_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples(*asked) == examples
    split = "validation_matched" if asked[0] == "mnli" else asked[1]
    assert calls == [(*where, split)]


def test_the_folder_comes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("BERTNB_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/dev.tsv").write_text("sentence\tlabel\nfine\t1\n")
    assert load_examples("sst2", "validation") == [
        TextExample("fine", "positive")
    ]


def test_every_set_names_its_splits():
    for name, found in _SETS.items():
        assert set(NAMED_SETS[name][1]) == {*found.files, *found.splits}
        assert (found.hub is None) == (not found.splits), name
    assert sum(found.hub is None for found in _SETS.values()) == 1


COUNTS = {
    ("sst2", "validation"): 872,
    ("chnsenticorp", "test"): 1200,
    ("stsb", "validation"): 1500,
    ("stsb", "test"): 1379,
    ("wnut17", "test"): 1287,
    ("cluener", "validation"): 1343,
    ("xquad.en", "validation"): 1190,
    ("xquad.zh", "validation"): 1190,
    ("drcd", "validation"): 3524,
}


@pytest.mark.parametrize("asked", COUNTS, ids=".".join)
def test_the_real_files(monkeypatch, asked):
    path = DATA / _SETS[asked[0]].files[asked[1]]
    if not path.is_file():
        pytest.skip(f"no {path}: set BERTNB_DATA to the folder of real data")
    monkeypatch.setenv("BERTNB_DATA", str(DATA))
    found = load_examples(*asked)
    assert len(found) == COUNTS[asked]


def test_wikigold_splits_as_the_benchmark_does(monkeypatch):
    """The peer of benchmarks/fine_tuning.py must see the same sentences."""
    path = DATA / "wikigold/wikigold.conll.txt"
    if not path.is_file():
        pytest.skip(f"no {path}: set BERTNB_DATA to the folder of real data")
    monkeypatch.setenv("BERTNB_DATA", str(DATA))
    articles = path.read_text("utf-8").split("-DOCSTART- O")
    parts = (("train", articles[:116], 1315), ("test", articles[116:], 381))
    for split, some, count in parts:
        words = [
            line.split(" ")[0]
            for article in some
            for line in article.split("\n")
            if line.strip()
        ]
        found = load_examples("wikigold", split)
        assert [word for example in found for word in example.words] == words
        assert len(found) == count


@given(st.text("ab", min_size=1, max_size=8), st.data())
@settings(max_examples=50)
def test_tags_of_spans_are_the_spans(text, data):
    places = st.lists(st.integers(0, len(text)), max_size=6, unique=True)
    cuts = sorted(data.draw(places))
    spans = [(a, b - 1) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    label = {"T": {}}
    for first, last in spans:
        words = text[first : last + 1]
        label["T"].setdefault(words, []).append([first, last])
    tags = span_tags(text, label, "here")
    assert [(a, b) for _, a, b in get_entities(list(tags))] == spans


def test_a_set_or_a_file(monkeypatch, tmp_path):
    """What a program is given is read as what it is for."""
    monkeypatch.setenv("BERTNB_DATA", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    table = tmp_path / "sst2" / "dev.tsv"
    table.write_text("sentence\tlabel\na\t1\n")
    assert guess_kind("sst2") == "classification"
    assert read_examples("sst2", "classification", "validation") == [
        TextExample("a", "positive")
    ]
    with pytest.raises(ValueError, match="sst2 is for classification, not for"):
        read_examples("sst2", "tokens", "validation")
    with pytest.raises(
        ValueError,
        match="kind='text': expected one of classification, questions, regres",
    ):
        read_examples(str(table), "text")
    for read in (guess_kind, lambda source: read_examples(source, "tokens")):
        with pytest.raises(FileNotFoundError, match=r"sst: .* sets are sst2, "):
            read("sst")
    columns = "sentence", "label", None
    assert guess_kind(str(table), *columns) == "classification"
    (found,) = read_examples(str(table), "regression", "", *columns)
    assert found == TextExample("a", 1.0)
    words = tmp_path / "words"
    words.write_text("a O\n")
    assert guess_kind(str(words)) == "tokens"
    assert read_examples(str(words), "tokens") == [TokenExample(("a",), ("O",))]
