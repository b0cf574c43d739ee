"""The two scores of a token and the loss of an answer, in float64."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    span_losses,
)

TINY = BertConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=20,
    initializer_range=0.3,
)


@pytest.mark.equation("20.1")
def test_every_token_has_two_scores(measured):
    torch.manual_seed(0)
    model = BertForQuestionAnswering(TINY).eval().double()
    ids = torch.randint(5, 50, (2, 8))
    out = model(ids)
    assert out.loss is None
    assert out.start_logits.shape == out.end_logits.shape == (2, 8)
    states = model.bert(ids).last_hidden_state
    weight, bias = model.qa_outputs.weight, model.qa_outputs.bias
    for column, found in enumerate((out.start_logits, out.end_logits)):
        scores = (states * weight[column]).sum(-1) + bias[column]
        measured(found - scores, 1e-12)


@pytest.mark.equation("20.2", "20.3")
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 999))
def test_the_loss_is_its_formula(measured, rows, length, seed):
    torch.manual_seed(seed)
    scores = torch.randn(2, rows, length, dtype=torch.float64)
    places = torch.randint(2 * length, (2, rows))  # some behind the end
    places[torch.rand(2, rows) < 0.2] = -100
    total = 0.0
    for kind in range(2):
        terms = []
        for b in range(rows):
            right = int(places[kind, b])
            if 0 <= right < length:
                s = scores[kind, b].tolist()
                p = math.exp(s[right]) / sum(math.exp(x) for x in s)
                terms.append(-math.log(p))
        total += sum(terms) / max(1, len(terms)) / 2
    losses = span_losses(*scores, *places)
    measured(sum(losses.values()).item() - total, 1e-12)


def test_padding_takes_part_as_in_the_original():
    torch.manual_seed(0)
    model = BertForQuestionAnswering(TINY).eval()
    ids = torch.randint(5, 50, (1, 8))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    place = {"start_positions": torch.tensor([2])}
    place["end_positions"] = torch.tensor([3])
    long = model(ids, mask, **place).loss
    short = model(ids[:, :5], mask[:, :5], **place).loss
    assert (long - short).abs() > 1e-3


def test_a_new_head_is_small_and_has_no_bias():
    torch.manual_seed(0)
    head = BertForQuestionAnswering(TINY).qa_outputs
    assert head.weight.shape == (2, 24)
    assert 0 < head.weight.abs().max() <= 2 * TINY.initializer_range
    assert not head.bias.any()


def test_a_pretrained_encoder_gets_a_new_head(tmp_path):
    pretrained = BertForMaskedLM(TINY)
    pretrained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="qa_outputs"):
        model = BertForQuestionAnswering.from_pretrained(tmp_path)
    ours, theirs = model.bert.state_dict(), pretrained.bert.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = BertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(back.qa_outputs.weight, model.qa_outputs.weight)
