"""A batch without its padding is the batch: vectors, loss and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config_for, tokenizer_of

import bertnb.classification
from bertnb import (
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    encode_packed,
    pack_lengths,
    worth_packing,
)

TOKENIZER = tokenizer_of("good bad fine film was the")
STILL = config_for(
    TOKENIZER,
    num_hidden_layers=2,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)
LONG = [30] + [3] * 11  # a batch worth packing


def batch_of(lengths, seed=0):
    torch.manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(5, STILL.vocab_size, shape)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.where(mask, 0),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(2, shape),
    }


def bert(pooler):
    torch.manual_seed(1)
    return BertModel(STILL, add_pooling_layer=pooler)


@pytest.mark.equation("16.18")
@given(lengths=LENGTHS, length=st.integers(30, 70))
@settings(max_examples=50, deadline=None)
def test_no_two_tokens_share_a_place_and_no_row_is_too_long(
    measured, lengths, length
):
    found = pack_lengths(lengths, length).tolist()
    places = [
        (row, start + i)
        for (row, start, _), n in zip(found, lengths, strict=True)
        for i in range(n)
    ]
    measured(sum(lengths) - len(set(places)), 0)
    assert all(0 <= place < length for _, place in places)
    rows = {row for row, _, _ in found}
    assert rows == set(range(len(rows)))  # none is left empty
    assert len(rows) < 2 * sum(lengths) / length + 1  # exercise 16.27
    slots = {(row, slot) for row, _, slot in found}
    assert len(slots) == len(lengths)
    for row in rows:  # a text's slot is its rank in the row
        begins = sorted((s, d) for r, s, d in found if r == row)
        assert [d for _, d in begins] == list(range(len(begins)))


@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("pooler", [True, False])
def test_vectors_are_those_of_the_padded_batch(pooler, lengths, seed):
    batch, model = batch_of(lengths, seed), bert(pooler)
    padded, packed = model(**batch), encode_packed(model, **batch)
    if pooler:
        one, other = padded.pooler_output, packed.pooler_output
        assert packed.last_hidden_state.shape == (len(lengths), 0, 8)
    else:
        mask = batch["attention_mask"].bool()
        one = padded.last_hidden_state.masked_fill(~mask[..., None], 0)
        other = packed.last_hidden_state
        assert packed.pooler_output is None
    torch.testing.assert_close(other, one, atol=2e-6, rtol=1e-5)


def test_segments_and_positions_are_a_tokens_own():
    batch, model = batch_of(LONG), bert(True)
    right = model(**batch).pooler_output
    for name in ("token_type_ids", "position_ids"):
        values = torch.randint(2, batch["input_ids"].shape)
        changed = batch | {name: values}
        found = encode_packed(model, **changed).pooler_output
        torch.testing.assert_close(
            found, model(**changed).pooler_output, atol=2e-6, rtol=1e-5
        )
        assert (found - right).abs().max() > 1e-3
    flat = batch | {"position_ids": torch.arange(30)}  # (L)
    found = encode_packed(model, **flat).pooler_output
    torch.testing.assert_close(found, right, atol=2e-6, rtol=1e-5)
    del batch["token_type_ids"]
    found = encode_packed(model, **batch).pooler_output
    expected = model(**batch).pooler_output
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_a_mask_with_holes_keeps_its_tokens():
    batch, model = batch_of(LONG), bert(False)
    mask = batch["attention_mask"]
    mask[0, 3:9] = 0
    expected = model(**batch).last_hidden_state[mask.bool()]
    found = encode_packed(model, **batch).last_hidden_state[mask.bool()]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.equation("16.19")
@given(texts=st.integers(1, 200), length=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_rows_that_are_filled_to_the_last(measured, texts, length):
    rows = int(pack_lengths([1] * texts, length)[:, 0].max()) + 1
    assert rows * length < texts + length
    measured(rows - math.ceil(texts / length), 0)


@pytest.mark.parametrize(
    ("lengths", "worth"),
    [
        (LONG, True),  # 63 tokens and 64 places of 360
        ([30] * 12, False),  # full
        ([5, 2], False),  # one row of 64 is more than 2 of 5
        ([90] + [2] * 9, True),  # a row of 90
        ([33] * 31 + [60], False),  # no two fit into a row
    ],
)
def test_packing_is_worth_it_where_places_are_saved(lengths, worth):
    assert worth_packing(batch_of(lengths)["attention_mask"]) is worth


def test_what_cannot_be_packed_is_left_as_it_is():
    mask = batch_of(LONG)["attention_mask"]
    assert not worth_packing(mask[:, None] * mask[:, :, None])  # (B, L, L)
    mask[1, 0] = 0  # no [CLS]
    assert not worth_packing(mask)
    with pytest.raises(ValueError, match="does not begin with a token"):
        encode_packed(bert(True), batch_of(LONG)["input_ids"], mask)
    with pytest.raises(ValueError, match="length=64: expected 70"):
        pack_lengths([70, 3], 64)


@pytest.mark.parametrize(
    "kind", [BertForSequenceClassification, BertForTokenClassification]
)
def test_a_classifier_learns_without_padding_and_answers_with_it(
    monkeypatch, kind
):
    calls = []

    def watched(*arguments):
        calls.append(len(arguments))
        return encode_packed(*arguments)

    monkeypatch.setattr(bertnb.classification, "encode_packed", watched)
    torch.manual_seed(2)
    model, batch = kind(STILL, num_labels=3), batch_of(LONG)
    mask = batch["attention_mask"].bool()
    labels = torch.randint(3, mask.shape if not kind.pooled else mask.shape[:1])
    if not kind.pooled:
        labels = labels.where(mask, -100)
    slopes = []
    for training in (False, True):
        model.train(training).zero_grad()
        output = model(**batch, labels=labels)
        output.loss.backward()
        slopes.append(
            [p.grad.clone() for p in model.parameters() if p.grad is not None]
        )
        assert len(calls) == training
    model(**batch, output_hidden_states=True)
    model(**batch, output_attentions=True)
    assert len(calls) == 1  # the states of all places were asked for
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (12, 29)),
        ("input_ids", (1, 30)),
        ("input_ids", (12, 29)),
        ("token_type_ids", (12, 1)),
        ("position_ids", (12, 1)),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_in_training_too(name, shape):
    model = BertForSequenceClassification(STILL, num_labels=3)
    ones = torch.ones(shape, dtype=torch.int64)
    batch = batch_of(LONG) | {name: ones}
    if name == "attention_mask":
        ones[1:, 3:] = 0  # still worth packing
    for training in (False, True):
        with pytest.raises(ValueError, match=r"has shape \(\d+, \d+\); exp"):
            model.train(training)(**batch)
