import numpy as np
import pytest
import torch
import transformers
from scipy.stats import binomtest
from torch.nn.functional import cross_entropy

from bertnb.configuration import BertConfig
from bertnb.folders import hf_name
from bertnb.next_sentence import (
    BertForNextSentencePrediction,
    accuracy_interval,
    next_sentence_loss,
)

SIZES = [
    {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
    {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3},
]
REST = {"vocab_size": 40, "intermediate_size": 48, "initializer_range": 0.2}


def batch(length=11, vocabulary=40):
    lengths = torch.tensor([[length], [length - 4], [3]])
    places = torch.arange(length)
    return {
        "input_ids": torch.randint(vocabulary, (3, length)),
        "attention_mask": (places < lengths).long(),
        "token_type_ids": (places >= 3).long().expand(3, length),
        "labels": torch.tensor([0, 1, 0]),
    }


@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_gradients_equal_hugging_face(size):
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
    assert torch.allclose(a.logits, b.logits, atol=1e-5, rtol=0)
    assert torch.allclose(a.loss, b.loss, atol=1e-5, rtol=0)
    a.loss.backward()
    b.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, grads.pop(hf_name(name)), atol=1e-5), name
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


def test_logits_and_loss_equal_the_formula_in_float64_numpy():
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
    assert np.abs(found.logits.numpy() - z).max() < 1e-14
    assert abs(found.loss.item() - loss) < 1e-6  # the loss is in float32


def test_the_loss_is_cross_entropy_over_the_labels_that_count():
    torch.manual_seed(3)
    logits = torch.randn(7, 2)
    labels = torch.tensor([0, 1, -100, 1, 0, -100, 0])
    expected = cross_entropy(logits, labels, ignore_index=-100)
    assert torch.allclose(next_sentence_loss(logits, labels), expected)


def test_the_gradient_is_softmax_minus_one_hot_and_a_finite_difference():
    torch.manual_seed(4)
    logits = torch.randn(5, 2, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 1])
    (slope,) = torch.autograd.grad(next_sentence_loss(logits, labels), logits)
    one_hot = torch.eye(2)[labels]
    formula = (logits.softmax(-1) - one_hot) / 5  # (9.4)
    assert torch.allclose(slope, formula, atol=1e-6)
    for i, k in ((0, 0), (1, 0), (4, 1)):
        bump = torch.zeros(5, 2)
        bump[i, k] = 0.01
        up = next_sentence_loss(logits + bump, labels)
        down = next_sentence_loss(logits - bump, labels)
        assert abs((up - down) / 0.02 - slope[i, k]) < 1e-4


@pytest.mark.parametrize(("right", "trials"), [(412, 640), (1, 3), (99, 100)])
def test_the_interval_is_scipys_wilson_interval(right, trials):
    expected = binomtest(right, trials).proportion_ci(0.95, method="wilson")
    found = accuracy_interval(right / trials, trials)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
