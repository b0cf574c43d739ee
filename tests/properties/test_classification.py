"""Class weights: what each row counts, in one batch and in several."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    accumulate_gradients,
    class_weights,
    classification_loss,
)

TINY = BertConfig(
    vocab_size=40,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=12,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
NAMES = ["a", "b", "c"]


@pytest.mark.equation("17.3")
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_weighted_loss_is_the_formula(measured, seed):
    rng = np.random.default_rng(seed)
    scores, y = rng.normal(size=(7, 3)), rng.integers(3, size=7)
    weights = rng.uniform(0, 4, size=3)
    counts = rng.random(7) < 0.7
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    terms = [weights[y[b]] * -log_p[b, y[b]] for b in range(7) if counts[b]]
    expected = sum(terms) / max(1, len(terms))
    labels = torch.tensor(np.where(counts, y, -100))
    loss = classification_loss(
        torch.tensor(scores), labels, torch.tensor(weights)
    )
    measured(loss.item() - expected, 1e-12)


@pytest.mark.equation("17.4", "17.5")
@given(
    labels=st.lists(st.integers(0, 2), max_size=40),
    wanted=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_weights_have_mean_one_over_the_examples(measured, labels, wanted):
    labels = [*labels, 0, 1, 2]
    counts = np.bincount(labels)
    given_ = class_weights(labels, NAMES, dict(zip(NAMES, wanted, strict=True)))
    balanced = class_weights(labels, NAMES)
    for weights in (given_, balanced):
        measured(weights[labels].double().mean() - 1, 1e-5)
    ratio = given_ / given_[0] - torch.tensor(wanted) / wanted[0]
    measured(ratio / (1 + torch.tensor(wanted) / wanted[0]), 1e-5)
    measured(balanced - len(labels) / (3 * counts), 1e-5)


def test_balanced_is_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0, 0, 0, 1, 2, 2]
    theirs = compute_class_weight(
        "balanced", classes=np.arange(3), y=np.array(labels)
    )
    assert np.allclose(class_weights(labels, NAMES), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0, 0, 1], "balanced", "'c' has no training example"),
        ([], "balanced", "no training example"),
        ([0, 1, 2], "equal", "class_weights='equal'"),
        ([0, 1, 2], {"a": 1.0, "b": 1.0}, "one weight for each of a, b, c"),
        ([0, 1, 2], {"a": 1.0, "b": 1.0, "d": 1.0}, "one weight for each"),
        ([0, 1, 2], {"a": 1.0, "b": -1.0, "c": 1.0}, ">= 0"),
        ([0, 1, 2], {"a": 1.0, "b": math.nan, "c": 1.0}, "finite"),
        ([0, 1, 2], {"a": 1.0, "b": math.inf, "c": 1.0}, "finite"),
        ([0, 0, 1], {"a": 0.0, "b": 0.0, "c": 1.0}, "one above 0"),
    ],
)
def test_bad_weights_are_named(labels, weights, message):
    with pytest.raises(ValueError, match=message):
        class_weights(labels, NAMES, weights)


def problem(cls):
    """Six rows: of one row the class is rare, two rows do not count."""
    torch.manual_seed(0)
    model = cls(TINY, labels=NAMES)
    ids = torch.randint(5, 40, (6, 8))
    y = torch.randint(3, (6, 8) if cls is BertForTokenClassification else (6,))
    y[[1, 5]] = -100
    model.class_weights = torch.tensor([0.3, 1.0, 5.0])
    return model, {"input_ids": ids, "labels": y}


@pytest.mark.equation("17.3")
@pytest.mark.parametrize(
    "cls", [BertForSequenceClassification, BertForTokenClassification]
)
def test_in_parts_the_weighted_gradient_is_that_of_the_batch(cls, measured):
    model, batch = problem(cls)
    whole = accumulate_gradients(model, batch)
    gradients = [p.grad.clone() for p in model.parameters()]
    log_p = model(batch["input_ids"]).logits.log_softmax(-1)
    y = batch["labels"]
    row = -log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    terms = (row * model.class_weights[y.clamp(min=0)])[y >= 0]
    measured(whole - terms.mean(), 1e-6)
    model.zero_grad()
    measured(accumulate_gradients(model, batch, parts=3) - whole, 1e-6)
    for p, expected in zip(model.parameters(), gradients, strict=True):
        measured(p.grad - expected, 1e-6)


def test_weights_of_torch_depend_on_the_neighbours():
    """Why (17.3) divides by the rows: the difference is real."""
    scores, weights = torch.randn(4, 3), torch.tensor([0.3, 1.0, 5.0])
    y = torch.tensor([2, 2, 2, 2])
    theirs = torch.nn.functional.cross_entropy(scores, y, weights)
    plain = classification_loss(scores, y)
    assert torch.isclose(theirs, plain)
    assert torch.isclose(classification_loss(scores, y, weights), 5 * plain)


def test_weights_are_not_saved_and_follow_the_model(tmp_path):
    model, batch = problem(BertForSequenceClassification)
    plain = BertForSequenceClassification(TINY, labels=NAMES)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.class_weights is None
    assert model.double().class_weights.dtype == torch.float64
    assert model(**batch).loss.isfinite()
