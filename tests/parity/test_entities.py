"""The tagger's head and loss against their formulas in float64."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from bertnb import BertConfig, BertForMaskedLM, BertForTokenClassification

TINY = BertConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=20,
    initializer_range=0.3,
)


def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 8))
    labels = torch.randint(4, (3, 8))
    labels[torch.rand(3, 8) < 0.4] = -100
    labels[1] = -100  # a row without a class
    return ids, labels


@pytest.mark.equation("19.2")
def test_every_token_has_the_same_map(measured):
    torch.manual_seed(0)
    model = BertForTokenClassification(TINY, num_labels=4).eval().double()
    ids, _ = batch()
    states = model.bert(ids).last_hidden_state
    weight, bias = model.classifier.weight, model.classifier.bias
    for b, i in ((0, 0), (1, 5), (2, 7)):
        for c in range(4):
            score = sum(
                h * w
                for h, w in zip(
                    states[b, i].tolist(), weight[c].tolist(), strict=True
                )
            )
            found = model(ids).logits[b, i, c]
            measured(found.item() - score - bias[c].item(), 1e-12)


@pytest.mark.equation("19.3")
def test_the_loss_is_the_mean_over_the_tokens_with_a_class(measured):
    torch.manual_seed(0)
    model = BertForTokenClassification(TINY, num_labels=4).eval().double()
    ids, labels = batch()
    out = model(ids, labels=labels)
    terms = []
    for b, i in (labels != -100).nonzero().tolist():
        z = out.logits[b, i].tolist()
        p = math.exp(z[labels[b, i]]) / sum(math.exp(x) for x in z)
        terms.append(-math.log(p))
    measured(out.loss.item() - sum(terms) / len(terms), 1e-12)


def test_without_labels_there_is_no_loss():
    model = BertForTokenClassification(TINY, labels=["O", "B", "I"])
    out = model(batch()[0])
    assert out.loss is None
    assert out.logits.shape == (3, 8, 3)


def test_there_is_no_pooler_and_none_is_missed(tmp_path):
    model = BertForTokenClassification(TINY, labels=["O", "B", "I"])
    assert model.bert.pooler is None
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = BertForTokenClassification.from_pretrained(tmp_path)
    assert back.label_names == ["O", "B", "I"]


def test_a_pretrained_encoder_gets_a_new_head(tmp_path):
    pretrained = BertForMaskedLM(TINY)
    pretrained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier"):
        model = BertForTokenClassification.from_pretrained(
            tmp_path, num_labels=5
        )
    ours, theirs = model.bert.state_dict(), pretrained.bert.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.classifier.weight.shape == (5, 24)


def test_dropout_acts_on_every_token_in_training_only():
    config = replace(
        TINY, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0
    )
    model = BertForTokenClassification(config)
    model.bert.eval()  # only the head's own dropout is left
    ids, _ = batch()
    first, second = model(ids).logits, model(ids).logits
    assert (first != second).any(-1).all()
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
