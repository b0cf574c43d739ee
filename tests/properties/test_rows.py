"""What must hold of rows and batches, whatever the corpus."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import chain, combinations_with_replacement
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb.next_sentence import Pair, original_pairs, sample_pairs
from bertnb.rows import (
    PretrainingData,
    collate_pairs,
    collate_rows,
    model_arguments,
    most_predictions,
    pack_pairs,
    token_counts,
)
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.equation("10.8")
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
    "mlm_probability": (0.0, "a share in (0, 1]"),
    "pack": (0, "1 or more"),
    "ranks": (0, "1 or more"),
    "rank": (1, "0 to 0"),
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
    with pytest.raises(ValueError, match=r"batch_size=999: .* only \d+ rows"):
        make(batch_size=999)
    pairs = len(make()._pairs(0))
    assert make(batch_size=pairs).batches_per_epoch == 1


def test_a_block_without_a_pair_is_an_error():
    lines = [[[7], [8], [9]]] * 2 + [[[5]]] * 2  # single sentences: no pair
    data = PretrainingData(lines, TOKENIZER, 8, 1, block_tokens=6)
    assert data._blocks == 2
    data._kept = (1, [])
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


@pytest.mark.equation("10.7")
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


@pytest.mark.equation("10.7")
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


@pytest.mark.equation("10.8")
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
    assert max(data._kept[0], 0) == 0  # the pairs of one block are kept


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


# several pairs in a row


def some_pairs(seed, length, number=60):
    """Pairs of every length that fits, told apart by their first two ids."""
    dice = random.Random(seed)
    pairs = []
    for i in range(number):
        n = dice.randint(2, length - 3)
        cut = dice.randint(1, n - 1)
        ids = [
            5 + i % 290,
            5 + i // 290,
            *(dice.randint(5, 299) for _ in range(n)),
        ]
        pairs.append(Pair(ids[:cut], ids[cut:n], dice.randint(0, 1)))
    return pairs


def tokens(pair):
    return 3 + len(pair.first) + len(pair.second)


sizes = st.tuples(st.integers(0, 99), st.integers(8, 60), st.integers(1, 9))


@pytest.mark.equation("10.2")
@settings(max_examples=30, deadline=None)
@given(sizes)
def test_packing_loses_no_pair_and_every_row_fits(size):
    seed, length, most = size
    pairs = some_pairs(seed, length)
    rows = pack_pairs(pairs, length, most)
    assert Counter(map(id, chain(*rows))) == Counter(map(id, pairs))
    for row in rows:
        assert 1 <= len(row) <= most
        assert sum(map(tokens, row)) <= length
    first = [pairs.index(row[0]) for row in rows]
    assert first == sorted(first)


def test_one_pair_a_row_is_the_list_of_the_pairs():
    pairs = some_pairs(3, 40)
    assert pack_pairs(pairs, 40, 1) == [[pair] for pair in pairs]
    assert pack_pairs([], 40, 3) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(8, 60))
def test_each_pair_goes_where_it_leaves_the_least_room(seed, length):
    pairs = some_pairs(seed, length)
    rooms = []  # the plain search through all rows
    for size in map(tokens, pairs):
        fitting = [room for room in rooms if room >= size]
        best = min(fitting, default=length)
        if fitting:
            rooms.remove(best)
        rooms.append(best - size)
    rows = pack_pairs(pairs, length, 99)
    ours = [length - sum(map(tokens, row)) for row in rows]
    assert sorted(ours) == sorted(rooms)


def test_packing_is_near_the_bound():
    dice = random.Random(0)
    pairs = [
        Pair([7] * (n // 2), [8] * (n - n // 2), 0)
        for n in (dice.randint(2, 125) for _ in range(4000))
    ]
    rows = pack_pairs(pairs, 128, 8)
    bound = sum(map(tokens, pairs)) / 128
    assert bound <= len(rows) < 1.05 * bound


def test_rows_are_as_full_at_the_end_of_a_visit_as_at_its_beginning():
    """Pairs of few lengths, so that there are many ties."""
    quarters = [0] * 4
    for seed in range(8):
        dice = random.Random(seed)
        lengths = dice.choices(
            [5, 11, 28, 61, 80, 125], [6, 4, 4, 1, 1, 1], k=3000
        )
        pairs = [Pair([7] * (n // 2), [8] * (n - n // 2), 0) for n in lengths]
        rows = pack_pairs(pairs, 128, 8)
        size = len(rows) // 4
        for q in range(4):
            quarters[q] += sum(map(len, rows[q * size : (q + 1) * size])) / size
    assert max(quarters) < 1.1 * min(quarters)


@pytest.mark.equation("10.3")
@settings(max_examples=30, deadline=None)
@given(sizes)
def test_a_row_holds_its_pairs_one_after_the_other(size):
    seed, length, most = size
    rows = pack_pairs(some_pairs(seed, length), length, most)
    batch = collate_rows(rows, TOKENIZER, length, most)
    assert {t.dtype for t in batch.values()} == {torch.int64}
    for b, row in enumerate(rows):
        ids, segments, places, numbers = [], [], [], []
        for number, pair in enumerate(row, 1):
            assert batch["cls_positions"][b, number - 1] == len(ids)
            assert batch["next_sentence_label"][b, number - 1] == pair.label
            head = [2, *pair.first, 3]
            tail = [*pair.second, 3]
            ids += head + tail
            segments += [0] * len(head) + [1] * len(tail)
            places += range(len(head + tail))
            numbers += [number] * len(head + tail)
        padding = [0] * (length - len(ids))
        for name, value in (
            ("input_ids", ids),
            ("token_type_ids", segments),
            ("position_ids", places),
            ("document_ids", numbers),
        ):
            assert batch[name][b].tolist() == value + padding, name
        assert not batch["cls_positions"][b, len(row) :].any()
        assert (batch["next_sentence_label"][b, len(row) :] == -100).all()


@pytest.mark.equation("10.4")
def test_a_token_attends_to_its_own_pair_and_padding_to_padding():
    rows = [[Pair([7], [8], 0), Pair([9], [6], 1)], [Pair([7] * 4, [8], 0)]]
    batch = model_arguments(collate_rows(rows, TOKENIZER, 12, 2))
    mask = batch["attention_mask"]
    assert mask.dtype == torch.bool
    homes = [[1] * 5 + [2] * 5 + [0] * 2, [1] * 8 + [0] * 4]
    for b, home in enumerate(homes):
        for i in range(12):
            for j in range(12):
                assert mask[b, i, j] == (home[i] == home[j])
    assert mask.any(-1).all()
    assert set(batch) == set(make(pack=2).batch(0)) - {
        "masked_positions",
        "labels",
    }


def test_a_row_with_too_many_pairs_or_tokens_is_an_error():
    pair = Pair([7, 8], [9], 0)
    with pytest.raises(ValueError, match="pack=1: expected 2 or more"):
        collate_rows([[pair], [pair, pair]], TOKENIZER, 20, 1)
    with pytest.raises(ValueError, match=r"12 tokens with its frames, .*=11"):
        collate_rows([[pair, pair]], TOKENIZER, 11, 2)


@pytest.mark.equation("10.6")
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3, 1.0])
@pytest.mark.parametrize("pack", [1, 2, 3])
def test_p_is_what_the_worst_row_needs(pack, share):
    length = 23
    lengths = [0, *range(5, length + 1)]
    worst = max(
        sum(max(1, round(share * n)) for n in row if n)
        for row in combinations_with_replacement(lengths, pack)
        if sum(row) <= length
    )
    assert most_predictions(length, pack, share) == worst


def test_p_of_one_pair_is_that_of_mask_tokens():
    for length in (5, 10, 64, 128, 512):
        for share in (0.05, 0.15, 0.25, 0.45):
            right = max(1, round(share * length))
            assert most_predictions(length, 1, share) == right


def short(**changes):
    """Data with many pairs to a row."""
    settings = {"length": 40, "batch_size": 4, "short_seq_prob": 1.0, "pack": 3}
    documents = corpus(8, 120)
    return PretrainingData(documents, TOKENIZER, **settings | changes)


def restored(batch):
    """Put the hidden words back."""
    ids = batch["input_ids"].clone()
    for row, (places, labels) in enumerate(
        zip(batch["masked_positions"], batch["labels"], strict=True)
    ):
        ids[row, places[labels != -100]] = labels[labels != -100]
    return ids


@pytest.mark.equation("10.8")
def test_packed_batches_hold_the_pairs_of_the_visit_with_their_own_counts():
    data, rate = short(), 0.3
    rows = data._rows(0)
    assert rows == pack_pairs(data._pairs(0), 40, 3)
    assert data.batches_per_epoch == len(rows) // 4
    several = 0
    for step in range(data.batches_per_epoch):
        batch = data.batch(step, mlm_probability=rate)
        mine = rows[4 * step : 4 * step + 4]
        expected = model_arguments(collate_rows(mine, TOKENIZER, 40, 3))
        assert torch.equal(restored(batch), expected["input_ids"])
        for name in expected.keys() - {"input_ids"}:
            assert torch.equal(batch[name], expected[name]), name
        numbers = collate_rows(mine, TOKENIZER, 40, 3)["document_ids"]
        hidden = batch["labels"] != -100
        homes = numbers.gather(1, batch["masked_positions"])
        for b, row in enumerate(mine):
            several += len(row) > 1
            for number, pair in enumerate(row, 1):
                found = ((homes[b] == number) & hidden[b]).sum()
                n = tokens(pair)
                assert found == min(max(1, round(rate * n)), n - 3)
    assert several > 20


def test_packing_makes_fewer_rows_of_the_same_pairs():
    packed, padded = short(), short(pack=1)
    assert packed._pairs(0) == padded._pairs(0)
    assert packed.batches_per_epoch < 0.7 * padded.batches_per_epoch


def test_shapes_do_not_change_while_the_share_does():
    data = short(mlm_probability=0.4)
    shapes = [
        {
            name: tuple(t.shape)
            for name, t in data.batch(s, "cpu", share).items()
        }
        for s, share in ((0, None), (1, 0.15), (2, 0.05), (9, 0.4))
    ]
    assert shapes[0]["labels"] == (4, data.max_predictions)
    assert all(shape == shapes[0] for shape in shapes)
    assert data.max_predictions == most_predictions(40, 3, 0.4)
    larger = data.batch(0, mlm_probability=0.8)["labels"]
    assert larger.shape == (4, most_predictions(40, 3, 0.8))


@pytest.mark.parametrize("pack", [1, 3])
def test_the_share_of_a_batch_may_be_another_one(pack):
    few, many = short(pack=pack), short(pack=pack, mlm_probability=0.5)
    a, b = few.batch(3), many.batch(3, mlm_probability=0.15)
    k = few.max_predictions
    assert k < many.max_predictions
    for name in ("masked_positions", "labels"):
        assert torch.equal(a[name], b[name][:, :k])
    assert torch.equal(a["labels"] != -100, b["labels"][:, :k] != -100)
    assert (b["labels"][:, k:] == -100).all()
    with pytest.raises(ValueError, match="mlm_probability=0"):
        few.batch(0, mlm_probability=0.0)


# ranks


@pytest.mark.equation("10.7")
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(10, 60),
    st.integers(1, 4000),
    st.integers(0, 9),
)
def test_ranks_read_all_documents_of_an_epoch_once(ranks, n, size, seed):
    documents = uneven(n, seed)
    each = [
        PretrainingData(
            documents, TOKENIZER, 16, 1, block_tokens=size, rank=r, ranks=ranks
        )
        for r in range(ranks)
    ]
    assert len({data.batches_per_epoch for data in each}) == 1
    blocks = each[0]._blocks
    assert blocks % ranks == 0
    steps = each[0].batches_per_epoch
    for epoch in range(2):
        read = []
        for data in each:
            visits = []
            for step in range(epoch * steps, (epoch + 1) * steps):
                data.batch(step)
                visits.append(data._kept[0])
            assert len(set(visits)) == blocks // ranks
            for visit in set(visits):
                read += [i for run in data._block(visit) for i in run]
        assert sorted(read) == list(range(n))


def test_one_rank_of_one_is_the_default():
    assert equal(make().batch(5), make(rank=0, ranks=1).batch(5))


def test_ranks_draw_other_places():
    """The same corpus of one text: only the drawn places can differ."""
    documents = [[[7] * 30] * 20 for _ in range(8)]
    one, other = (
        PretrainingData(documents, TOKENIZER, 24, 4, rank=r, ranks=2)
        for r in range(2)
    )
    places = [d.batch(0)["masked_positions"] for d in (one, other)]
    assert not torch.equal(*places)


def test_blocks_of_the_ranks_have_nearly_one_size():
    documents = uneven(400)
    data = PretrainingData(documents, TOKENIZER, 16, 1, ranks=4)
    assert data._blocks == 4
    counts = list(token_counts(documents))
    loads = [
        sum(counts[i] for run in data._block(v) for i in run) for v in range(4)
    ]
    assert max(loads) < 1.05 * min(loads)


def test_more_ranks_than_pairs_of_documents_are_an_error():
    with pytest.raises(ValueError, match="ranks=4: expected at most 3, "):
        make(ranks=4)
    assert make(ranks=3, rank=2).batch(0)


def test_the_chapter_shows_the_record_of_the_pairs_lengths():
    lines = (ROOT / "book/runs/pair-lengths.jsonl").read_text().splitlines()
    expected = [
        [line["text"], line["sampler"], f"{line['mean_tokens']:.0f}"]
        + [f"{100 * line['filled'][most]:.1f} %" for most in "148"]
        + [f"{line['gain'][most]:.2f}" for most in "48"]
        for line in map(json.loads, lines[1:])
        if line["length"] == 512
    ]
    chapter = (ROOT / "notebooks/10_rows.md").read_text()
    shown = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in chapter.splitlines()
        if re.search(r"\| (exact|original) \|", row)
    ]
    assert shown == expected
    assert len(shown) == 9
