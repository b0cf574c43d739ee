import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import binomtest, ks_2samp
from torch.nn.functional import cross_entropy

from bertnb.configuration import BertConfig
from bertnb.folders import hf_name
from bertnb.next_sentence import (
    BertForNextSentencePrediction,
    Pair,
    accuracy_interval,
    lint_pairs,
    next_sentence_loss,
    original_pairs,
)

SIZES = [
    {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
    {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3},
]
REST = {"vocab_size": 40, "intermediate_size": 48, "initializer_range": 0.2}


CASES = json.loads(
    Path(__file__).with_name("original_pairs.json").read_text("utf-8")
)["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["seed"]))
def test_the_original_sampler_makes_the_pairs_of_googles_own(case):
    tokens = iter(range(10**6))
    documents = [
        [[next(tokens) for _ in range(n)] for n in d] for d in case["sizes"]
    ]
    rng = random.Random(case["seed"])
    found = original_pairs(
        documents, case["max_tokens"], rng, case["short_seq_prob"]
    )
    assert [
        [p.first[0], len(p.first), p.second[0], len(p.second), p.label]
        for p in found
    ] == case["pairs"]


@pytest.mark.equation("9.8", "9.9")
def test_the_length_accuracy_is_the_kolmogorov_smirnov_distance(measured):
    for seed in range(5):
        dice = random.Random(seed)
        pairs = [
            Pair([0] * dice.randint(1, 9), [0] * dice.randint(1, 9 + y), y)
            for y in dice.choices([0, 1], [2, 3], k=200)
        ]
        kinds = [
            [
                [
                    a * len(p.first) + b * len(p.second)
                    for p in pairs
                    if p.label == y
                ]
                for y in (0, 1)
            ]
            for a, b in ((1, 0), (0, 1), (1, 1))
        ]
        d = max(ks_2samp(*lengths).statistic for lengths in kinds)
        measured(lint_pairs(pairs).length_accuracy - (1 + d) / 2, 1e-12)
    # chance exceeds (9.9) once in a thousand
    rng = np.random.default_rng(0)
    n, m = 300, 500
    bound = 1.95 * ((n + m) / (n * m)) ** 0.5
    beyond = [
        ks_2samp(rng.random(n), rng.random(m)).statistic > bound
        for _ in range(1500)
    ]
    assert sum(beyond) <= 6


def batch(length=11, vocabulary=40):
    lengths = torch.tensor([[length], [length - 4], [3]])
    places = torch.arange(length)
    return {
        "input_ids": torch.randint(vocabulary, (3, length)),
        "attention_mask": (places < lengths).long(),
        "token_type_ids": (places >= 3).long().expand(3, length),
        "labels": torch.tensor([0, 1, 0]),
    }


@pytest.mark.equation("9.2", "9.3", "9.4")
@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_gradients_equal_hugging_face(size, measured):
    torch.manual_seed(0)
    ours = BertForNextSentencePrediction(BertConfig(**size, **REST)).eval()
    theirs = transformers.BertForNextSentencePrediction(
        transformers.BertConfig(**size, **REST)
    ).eval()
    theirs.load_state_dict(
        {hf_name(n): p for n, p in ours.state_dict().items()}
    )
    inputs = batch()
    a, b = ours(**inputs), theirs(**inputs)
    measured(a.logits - b.logits, 1e-5)
    measured(a.loss - b.loss, 1e-5)
    a.loss.backward()
    b.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        measured(p.grad - grads.pop(hf_name(name)), 1e-5)
    assert not grads


def test_a_folder_goes_to_hugging_face_and_back(tmp_path):
    torch.manual_seed(1)
    ours = BertForNextSentencePrediction(BertConfig(**SIZES[0], **REST)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.BertForNextSentencePrediction.from_pretrained(
        tmp_path / "ours"
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = BertForNextSentencePrediction.from_pretrained(tmp_path / "theirs")
    inputs = batch()
    expected = ours(**inputs).logits
    assert torch.allclose(theirs(**inputs).logits, expected, atol=1e-5)
    assert torch.equal(again(**inputs).logits, expected)


@pytest.mark.equation("9.2", "9.3")
def test_logits_and_loss_equal_the_formula_in_float64_numpy(measured):
    torch.manual_seed(2)
    model = BertForNextSentencePrediction(BertConfig(**SIZES[0], **REST))
    model = model.double().eval()
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        x = model.bert(**inputs).last_hidden_state[:, 0].numpy()
        found = model(**inputs, labels=labels)
    pooler, head = model.bert.pooler.dense, model.next_sentence
    w_x, b_x, w_y, b_y = (
        p.detach().numpy()
        for p in (pooler.weight, pooler.bias, head.weight, head.bias)
    )
    z = np.array([w_y @ np.tanh(w_x @ row + b_x) + b_y for row in x])  # (9.2)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    loss = -np.mean([np.log(p[i, y]) for i, y in enumerate(labels)])  # (9.3)
    measured(found.logits.numpy() - z, 1e-14)
    measured(found.loss.item() - loss, 1e-6)  # the loss is in float32
    without = np.array([w_y @ np.tanh(w_x @ row + b_x) for row in x])
    assert (
        np.abs(without + b_y - z).max() < 1e-14
    )  # what article 000 leaves out


def test_the_loss_is_cross_entropy_over_the_labels_that_count():
    torch.manual_seed(3)
    logits = torch.randn(7, 2)
    labels = torch.tensor([0, 1, -100, 1, 0, -100, 0])
    expected = cross_entropy(logits, labels, ignore_index=-100)
    assert torch.allclose(next_sentence_loss(logits, labels), expected)


@pytest.mark.equation("9.4")
def test_the_gradient_is_softmax_minus_one_hot_and_a_finite_difference(
    measured,
):
    torch.manual_seed(4)
    logits = torch.randn(5, 2, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 1])
    (slope,) = torch.autograd.grad(next_sentence_loss(logits, labels), logits)
    one_hot = torch.eye(2)[labels]
    formula = (logits.softmax(-1) - one_hot) / 5  # (9.4)
    measured(slope - formula, 1e-6)
    for i, k in ((0, 0), (1, 0), (4, 1)):
        bump = torch.zeros(5, 2)
        bump[i, k] = 0.01
        up = next_sentence_loss(logits + bump, labels)
        down = next_sentence_loss(logits - bump, labels)
        assert abs((up - down) / 0.02 - slope[i, k]) < 1e-4


@pytest.mark.equation("9.6", "9.7")
@pytest.mark.parametrize(("right", "trials"), [(412, 640), (1, 3), (99, 100)])
def test_the_interval_is_scipys_wilson_interval(right, trials, measured):
    expected = binomtest(right, trials).proportion_ci(0.95, method="wilson")
    found = accuracy_interval(right / trials, trials)
    measured(np.subtract(found, (expected.low, expected.high)), 1e-12)
