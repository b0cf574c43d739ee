"""Numbers for pairs of texts: rows, answers, correlations."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config_for, tokenizer_of

from bertnb import (
    BertForSequenceClassification,
    BertnbError,
    FineTuneConfig,
    SequenceRegression,
    TextExample,
    accumulate_gradients,
    correlations,
    evaluate,
    fine_tune,
    predict,
)

TOKENIZER = tokenizer_of("good bad fine film a b ##c")
TINY = config_for(
    TOKENIZER,
    vocab_size=40,
    hidden_size=12,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def model(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(TINY, num_labels=1)


def ranks(values):
    """Return the ranks from 1, the mean of the places where values tie."""
    values = np.array(values)
    return np.array(
        [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]
    )


def correlation(u, v):
    u, v = np.array(u) - np.mean(u), np.array(v) - np.mean(v)
    return (u * v).sum() / math.sqrt((u * u).sum() * (v * v).sum())


@pytest.mark.equation("18.5")
@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2
    )
)
@settings(max_examples=25, deadline=None)
def test_correlations_are_the_formulas(measured, pairs):
    truth, answers = zip(*pairs, strict=True)
    found = correlations(truth, answers)
    if len(set(truth)) == 1 or len(set(answers)) == 1:
        assert found == {"spearman": 0.0, "pearson": 0.0}
        return
    measured(found["pearson"] - correlation(truth, answers), 1e-9)
    expected = correlation(ranks(truth), ranks(answers))
    measured(found["spearman"] - expected, 1e-9)


@pytest.mark.parametrize(
    ("truth", "answers"), [([], []), ([1.0], [2.0]), ([1.0, 2.0], [1.0])]
)
def test_too_few_numbers_are_no_correlation(truth, answers):
    with pytest.raises(ValueError, match="two or more"):
        correlations(truth, answers)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(BertnbError, match=r"bertnb\[train\]"):
        correlations([1.0, 2.0], [1.0, 2.0])
    some = [TextExample("a", 1.0), TextExample("b", 2.0)]
    SequenceRegression(some)  # to predict with
    with pytest.raises(BertnbError, match=r"bertnb\[train\]"):
        SequenceRegression(some, some)


@pytest.mark.equation("18.2")
def test_the_answer_is_the_score_of_the_pair(measured):
    pairs = [TextExample("good film", 1, "a b"), TextExample("bad", 2, "bad")]
    network = model()
    answers = predict(SequenceRegression(), network, TOKENIZER, pairs, 12)
    weight, bias = (p.detach() for p in network.classifier.parameters())
    for pair, answer in zip(pairs, answers, strict=True):
        batch = TOKENIZER([pair.text], [pair.text_pair])
        with torch.no_grad():
            pooled = network.eval().bert(**batch).pooler_output[0]
        measured(answer - ((pooled * weight[0]).sum() + bias[0]).item(), 1e-6)


@pytest.mark.equation("18.3")
def test_the_loss_is_the_mean_square(measured):
    pairs = [TextExample("good film", 1, "a b"), TextExample("bad", 2.5, "bad")]
    task, network = SequenceRegression(pairs), model()
    answers = predict(task, network, TOKENIZER, pairs, 12)
    rows = task.rows(pairs, TOKENIZER, 12)
    assert [row.targets["labels"] for row in rows] == [1.0, 2.5]
    batch = TOKENIZER(["good film", "bad"], ["a b", "bad"])
    loss = network.eval()(**batch, labels=torch.tensor([1.0, 2.5])).loss
    expected = ((answers[0] - 1) ** 2 + (answers[1] - 2.5) ** 2) / 2
    measured(loss.item() - expected, 1e-5)


def test_bad_examples_are_named():
    task = SequenceRegression()
    some = [TextExample("a", 1.0, "b"), TextExample("a", "2.5", "b")]
    with pytest.raises(ValueError, match=r"example 1 .*'2.5'; expected a num"):
        task.rows(some, TOKENIZER, 12)
    some = [TextExample("a", 1.0, "b"), TextExample("a", 2.0)]
    with pytest.raises(ValueError, match="example 1 has none"):
        task.rows(some, TOKENIZER, 12)
    with pytest.raises(ValueError, match="label=nan"):
        TextExample("a", math.nan, "b")
    some = [TextExample("a", 1.0), TextExample("b")]
    with pytest.raises(ValueError, match="example 1 has no label"):
        evaluate(task, model(), TOKENIZER, some, 12)
    with pytest.raises(ValueError, match="metric='mse'"):
        SequenceRegression(metric="mse")


def test_numbers_that_are_not_finite_are_no_answer():
    network = model()
    torch.nn.init.constant_(network.classifier.bias, math.inf)
    with pytest.raises(ValueError, match="example 0: the model gives"):
        predict(
            SequenceRegression(), network, TOKENIZER, [TextExample("a")], 12
        )


def test_a_model_of_classes_is_refused():
    other = BertForSequenceClassification(TINY, num_labels=2)
    with pytest.raises(ValueError, match="num_labels=2, the task needs 1"):
        predict(SequenceRegression(), other, TOKENIZER, [TextExample("a")], 12)


def test_a_tiny_model_learns_to_count():
    texts = ["a", "a good", "good a good", "good good good", "a good b good"]
    counts = [float(text.split().count("good")) for text in texts]
    training = [TextExample(t, n) for t, n in zip(texts, counts, strict=True)]
    task = SequenceRegression(training, training, metric="pearson")
    config = FineTuneConfig(
        min_steps=80, eval_every=80, batch_size=8, learning_rate=2e-2, max_length=12,
        device="cpu", precision="float32",
    )  # fmt: skip
    result = fine_tune(task, model(), TOKENIZER, config, progress=False)
    assert result.best["pearson"] > 0.9
    assert result.best["spearman"] > 0.8


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_a_number_may_be_minus_100(parts):
    """It is the number of a class that does not count, and here a number."""
    numbers = torch.tensor([-100.0, 1.0, 2.0, 3.0, -100.0, 5.0])
    batch = {"input_ids": torch.tensor([[2, 5, 3]] * 6), "labels": numbers}
    network = model().eval()
    loss = accumulate_gradients(network, batch, parts)
    answers = network(batch["input_ids"]).logits[:, 0].detach()
    assert loss == pytest.approx(float((answers - numbers).square().mean()))
    slope = 2 * (answers - numbers).mean()
    assert network.classifier.bias.grad == pytest.approx(float(slope), rel=1e-5)


def test_numbers_that_are_not_finite_correlate_with_nothing():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="is not finite"):
            correlations([1.0, bad, 2.0], [1.0, 2.0, 3.0])
        with pytest.raises(ValueError, match="is not finite"):
            correlations([1.0, 2.0, 3.0], [1.0, bad, 3.0])
    with pytest.raises(ValueError, match="label=nan"):
        TextExample("a", np.float32("nan"))


def test_one_example_is_too_few_to_be_scored_on():
    with pytest.raises(ValueError, match="validation has one example"):
        SequenceRegression(validation=[TextExample("a", 1.0)])
