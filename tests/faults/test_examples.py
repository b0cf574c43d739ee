"""Bad rows: each is an error that names the place, or a documented result."""

import gzip
import json
import sys
import warnings

import pytest

from bertnb import (
    Answer,
    BertnbError,
    QuestionExample,
    TextExample,
    TokenExample,
    load_examples,
    read_questions,
    read_texts,
    read_tokens,
    to_iob2,
)
from bertnb.named_sets import NAMED_SETS

TABLES = [  # name, bytes, options, line, what the message says
    ("a.csv", b"review,label\nfine,1\n", {}, 2, "no column 'text'; there are"),
    ("a.csv", b"text;label\nfine;1\n", {}, 2, "there are text;label"),
    ("a.csv", b"text,label\nfine,1\nbad\n", {}, 3, "1 fields, but 2 columns"),
    ("a.csv", b"text,label\na, b,1\n", {}, 2, "3 fields, but 2 columns"),
    ("a.csv", b'text,label\n"a,1\nb,1\n', {}, 2, "written twice"),
    ("a.csv", b'text,label\nx,1\n"a" b,1\n', {}, 3, "written twice"),
    ("a.csv", b"text,label,text\na,1,b\n", {}, 1, "a column occurs twice"),
    ("a.csv", b"text,label\ncaf\xe9,1\n", {}, 2, "not UTF-8 text"),
    ("a.csv", b"text,label\na,\n", {}, 2, "label ''"),
    ("a.csv", b"text,label\n ,1\n", {}, 2, "'text' holds no text"),
    ("a.csv", b"text,label\na,x\n", {"numbers": True}, 2, "label 'x'"),
    ("a.csv", b"text,label\na,nan\n", {"numbers": True}, 2, "label=nan"),
    ("a.csv", b"text,label\na,1e999\n", {"numbers": True}, 2, "label=inf"),
    ("a.csv", b"text,label\na,1\n", {"text_pair": "b"}, 2, "no column 'b'"),
    ("a.tsv", b"text\tlabel\na\tb\t1\n", {}, 2, "3 fields, but 2 columns"),
    ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', {}, 2, "not JSON"),
    ("a.jsonl", b'\n["a", 1]\n', {}, 2, "expected an object"),
    ("a.jsonl", b'{"text": "a"}\n', {}, 1, "no column 'label'"),
    ("a.jsonl", b'{"text": 7, "label": "x"}\n', {}, 1, "text is 7"),
    ("a.jsonl", b'{"text": "a", "label": null}\n', {}, 1, "label None"),
    ("a.jsonl", b'{"text": "a", "label": true}\n', {}, 1, "label True"),
    ("a.jsonl", b'{"text": "a", "label": 1.5}\n', {}, 1, "label 1.5"),
    ("a.jsonl", b'{"text": "\\ud83d", "label": 1}\n', {}, 1, "surrogate, at 0"),
]


@pytest.mark.parametrize(("name", "content", "options", "line", "says"), TABLES)
def test_a_bad_row_of_a_table(tmp_path, name, content, options, line, says):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(BertnbError) as caught:
        read_texts(file, **options)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_table(tmp_path, name, content):
    file = tmp_path / name
    packed = gzip.compress(content) if name.endswith("gz") else content
    file.write_bytes(packed)
    with pytest.raises(BertnbError, match="no examples in it"):
        read_texts(file)


def test_a_file_that_is_not_there_or_not_a_table(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a.xlsx': expected .csv, .tsv"):
        read_texts(tmp_path / "a.xlsx")


@pytest.mark.parametrize("cut", [slice(40), slice(3, None)])
def test_a_broken_gzip_file(tmp_path, cut):
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(b"text,label\n" + b"a,1\n" * 400)[cut])
    with pytest.raises(BertnbError, match="not a whole gzip file"):
        read_texts(file)


TOKENS = [
    ("a.conll", b"EU B-ORG\nrejects\n", {}, 2, "expected 2 columns"),
    ("a.conll", b"EU B-ORG\nthe German B-MISC\n", {}, 2, "expected 2 columns"),
    ("a.conll", b"EU\tO\n\tO\n", {}, 2, "the word first"),
    ("a.conll", b"EU O\n", {"separator": "\t"}, 1, "expected 2 columns"),
    ("a.conll", b"a O\n\nEU ORG\n", {}, 3, "tag 'ORG': expected O, B-TYPE"),
    ("a.conll", b"EU B\n", {}, 1, "tag 'B'"),
    ("a.conll", b"EU S-ORG\n", {}, 1, "tag 'S-ORG'"),
    ("a.conll", b"EU B-\n", {}, 1, "tag 'B-'"),
    ("a.conll", b"caf\xe9 O\n", {}, 1, "not UTF-8"),
    ("a.jsonl", b'{"label": {}}\n', {}, 1, "no 'text'"),
    ("a.jsonl", b'{"text": 7}\n', {}, 1, "not iterable"),
    ("a.json", b'{"text": "ab"}\n{"text": "ab\n', {}, 2, "not JSON"),
]


@pytest.mark.parametrize(("name", "content", "options", "line", "says"), TOKENS)
def test_a_bad_line_of_tokens(tmp_path, name, content, options, line, says):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(BertnbError) as caught:
        read_tokens(file, **options)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ({"name": {"李四": [[0, 1]]}}, "'李四' is not at characters 0 to 1"),
        ({"name": {"李四": [[2, 9]]}}, "is not at characters 2 to 9"),
        ({"name": {"三": [[-1, -1]]}}, "is not at characters -1 to -1"),
        ({"name": {"": [[1, 0]]}}, "is not at characters 1 to 0"),
        ({"name": [[0, 1]]}, "label is not"),
        (["name"], "label is not"),
        ({"name": {"张三": [[0]]}}, "label is not"),
        ({"name": {"张三": [["x", 1]]}}, "label is not"),
    ],
)
def test_spans_that_are_not_in_the_text(tmp_path, label, says):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "张三说", "label": label}), "utf-8")
    with pytest.raises(BertnbError, match=says):
        read_tokens(file)


def test_of_overlapping_entities_the_longest_counts(tmp_path):
    file = tmp_path / "a.jsonl"
    label = {"person": {"京大": [[1, 2]]}, "place": {"北京大学": [[0, 3]]}}
    file.write_text(json.dumps({"text": "北京大学", "label": label}), "utf-8")
    with pytest.warns(UserWarning, match=r"a.jsonl:1: '京大' overlaps another"):
        (found,) = read_tokens(file)
    assert found.tags == ("B-place", "I-place", "I-place", "I-place")


def test_an_inside_without_a_beginning_begins_an_entity(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text("EU I-ORG\nand O\nUN I-ORG\nUS I-LOC\n")
    assert read_tokens(file)[0].tags == ("B-ORG", "O", "B-ORG", "B-LOC")
    with pytest.raises(ValueError, match="not IOB2: to_iob2 makes 'B-ORG' of"):
        TokenExample(("EU",), ("I-ORG",))


CONTEXT = "Bert was born."
QUESTIONS = [  # what is changed of a good question, the message
    ({"answers": [{"text": "Ernie", "answer_start": 0}]}, "it is nowhere"),
    ({"answers": [{"text": "born", "answer_start": 8}]}, "it is at 9"),
    ({"answers": [{"text": "n.", "answer_start": -2}]}, "not at character -2"),
    ({"answers": [{"text": "", "answer_start": 0}]}, "answer '' is not at"),
    ({"answers": [{"text": "Bert"}]}, "no 'answer_start'"),
    ({"answers": [{"text": "Bert", "answer_start": "0"}]}, "not supported"),
    ({"is_impossible": True}, "is_impossible is true, but there are answers"),
    ({"question": None}, "question is None"),
]


def squad(**changes):
    asked = {"question": "Who?", "id": "q1"}
    asked["answers"] = [{"text": "Bert", "answer_start": 0}]
    paragraph = {"context": CONTEXT, "qas": [asked, {**asked, **changes}]}
    return {"version": "1.1", "data": [{"paragraphs": [paragraph]}]}


@pytest.mark.parametrize(("changes", "says"), QUESTIONS)
def test_a_bad_question(tmp_path, changes, says):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(squad(**changes)))
    with pytest.raises(BertnbError) as caught:
        read_questions(file)
    place = f"{file}: data[0].paragraphs[0].qas[1]: "
    assert str(caught.value).startswith(place)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"data":\n[}', "a.json:2: not JSON"),
        ("", "a.json:1: not JSON"),
        ("[]", "expected .*paragraphs"),
        ('{"date": []}', "no 'data'"),
        ('{"data": [{"title": "a"}]}', "no 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', "no 'qas'"),
        ('{"data": []}', "no examples in it"),
    ],
)
def test_a_file_that_is_not_squad(tmp_path, content, says):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(BertnbError, match=says):
        read_questions(file)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: TextExample(5), TypeError, "text is 5"),
        (lambda: TextExample("a", "x", b"b"), TypeError, "text_pair is b'b'"),
        (lambda: TextExample("a\ud800"), ValueError, "lone surrogate, at 1"),
        (lambda: TextExample("a", float("nan")), ValueError, "label=nan"),
        (lambda: TokenExample(("a", 3)), TypeError, "word 1 is 3"),
        (lambda: TokenExample(("a",), ()), ValueError, "1 words, but 0 tags"),
        (lambda: TokenExample(("a",), ("X",)), ValueError, "tag 'X'"),
        (lambda: QuestionExample("q", None), TypeError, "context is None"),
        (
            lambda: QuestionExample("q", "abab", (Answer("ab", 1),)),
            ValueError,
            "'ab' is not at character 1 of the context; it is at 0",
        ),
        (lambda: to_iob2(["O", "o"]), ValueError, "tag 'o'"),
        (
            lambda: load_examples("sst", "train"),
            ValueError,
            "name='sst': expected one of sst2",
        ),
        (
            lambda: load_examples("sst2", "dev"),
            ValueError,
            "split='dev': sst2 has train, validation",
        ),
    ],
)
def test_values_that_cannot_be(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_set_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("BERTNB_DATA", str(tmp_path))
    remedy = "put wikigold/wikigold.conll.txt into the folder that"
    with pytest.raises(BertnbError, match=f"not on the hub: {remedy}"):
        load_examples("wikigold", "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BertnbError, match=r'pip install "bertnb\[data\]"'):
        load_examples("sst2", "train")


class Offline:
    @staticmethod
    def load_dataset(name, config=None, *, split, revision=None):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")


def test_a_set_that_is_out_of_reach(monkeypatch):
    monkeypatch.delenv("BERTNB_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(BertnbError, match=r"cannot be loaded \(Couldn't reach"):
        load_examples("snli", "test")


class Changed:
    @staticmethod
    def load_dataset(name, config=None, *, split, revision=None):
        return [{"sentence": "a", "label": 0}, {"text": "a", "label": 1}]


def test_a_hub_whose_rows_have_changed(monkeypatch):
    monkeypatch.delenv("BERTNB_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", Changed)
    with pytest.raises(BertnbError, match="sst2, train, row 1: KeyError"):
        load_examples("sst2", "train")


@pytest.mark.parametrize(
    ("asked", "name", "content", "says"),
    [
        (
            ("sst2", "train"),
            "sst2/train.tsv",
            "sentence\tlabel\na\t1\nb\tpositive\n",
            "train.tsv, row 2: label 'positive': expected 0 or 1",
        ),
        (
            ("sst2", "train"),
            "sst2/train.tsv",
            "sentence\tlabel\na\t2\n",
            "row 1: label '2'",
        ),
        (
            ("stsb", "test"),
            "stsb/sts-test_gold.tsv",
            "a\tb\tc\td\t1.0\tone\ttwo\na\tb\tc\n",
            "gold.tsv:2: .*expected 7 fields",
        ),
        (
            ("stsb", "test"),
            "stsb/sts-test_gold.tsv",
            "a\tb\tc\td\tmuch\tone\ttwo\n",
            "gold.tsv:1: .*a number in the fifth",
        ),
    ],
)
def test_a_bad_row_of_a_named_set(
    tmp_path, monkeypatch, asked, name, content, says
):
    monkeypatch.setenv("BERTNB_DATA", str(tmp_path))
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(BertnbError, match=says):
        load_examples(*asked)


def test_a_question_that_is_no_object(tmp_path):
    paragraph = {"context": "a", "qas": ["q1"]}
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    with pytest.raises(BertnbError, match=r"a\.json"):
        read_questions(file)


def test_a_long_text_in_a_csv(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "a b " * 50_000 + ",x\n")
    (found,) = read_texts(file)
    assert len(found.text) == 200_000


def test_nothing_warns_where_nothing_is_wrong(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbftext,label\r\na,1\r\n\r\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_texts(file) == [TextExample("a", "1")]
    assert set(NAMED_SETS) >= {"sst2", "stsb", "wnut17", "squad", "mnli"}
