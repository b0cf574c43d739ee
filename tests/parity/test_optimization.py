"""The step, the schedule and the clipping against other implementations."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from bertnb.configuration import BertConfig
from bertnb.next_sentence import BertForNextSentencePrediction
from bertnb.optimization import (
    SCHEDULES,
    adamw,
    linear_warmup_decay,
    parameter_groups,
    train,
)


class Loss:
    def __init__(self, loss):
        self.loss = loss


class Quadratic(nn.Module):
    """A loss with a known gradient: weight - target, and bias - target."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, target):
        both = (self.weight - target).square().sum()
        return Loss((both + (self.bias - target[0]).square().sum()) / 2)


@pytest.mark.equation("11.1", "11.3", "11.4", "11.6")
def test_adamw_equals_the_formula_in_numpy_over_100_steps(measured):
    """Rates, decays and eps that would each show."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 3).double()
    optimizer = adamw(layer, weight_decay=0.1, betas=(0.8, 0.95), eps=0.01)
    theta = [p.detach().numpy().copy() for p in layer.parameters()]
    m = [np.zeros_like(p) for p in theta]
    v = [np.zeros_like(p) for p in theta]
    for t in range(1, 101):
        rate = 0.01 * math.sin(t)
        for group in optimizer.param_groups:
            group["lr"] = abs(rate)
        for i, p in enumerate(layer.parameters()):
            p.grad = torch.randn_like(p) * 10.0 ** torch.randint(-3, 2, p.shape)
            g = p.grad.numpy()
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.95 * v[i] + 0.05 * g**2
            m_hat, v_hat = m[i] / (1 - 0.8**t), v[i] / (1 - 0.95**t)
            decay = 0.1 if p.dim() == 2 else 0.0
            step = m_hat / (np.sqrt(v_hat) + 0.01) + decay * theta[i]
            theta[i] = theta[i] - abs(rate) * step
        optimizer.step()
    for p, expected in zip(layer.parameters(), theta, strict=True):
        measured(p.detach().numpy() - expected, 1e-13)


@pytest.mark.equation("11.9")
@pytest.mark.parametrize(
    ("betas", "eps"), [((0.9, 0.999), 1e-6), ((0.8, 0.95), 0.01)]
)
def test_without_correction_it_is_the_originals_adam(betas, eps, measured):
    """optimization.py:131-149, transcribed: no number of the step in it."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 3).double()
    optimizer = adamw(layer, 0.1, betas, eps, bias_correction=False)
    theta = [p.detach().numpy().copy() for p in layer.parameters()]
    m = [np.zeros_like(p) for p in theta]
    v = [np.zeros_like(p) for p in theta]
    for t in range(1, 101):
        rate = 0.01 * abs(math.sin(t))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for i, p in enumerate(layer.parameters()):
            p.grad = torch.randn_like(p) * 10.0 ** torch.randint(-3, 2, p.shape)
            g = p.grad.numpy()
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * np.square(g)
            update = m[i] / (np.sqrt(v[i]) + eps)
            if p.dim() == 2:  # not LayerNorm, not a bias
                update += 0.1 * theta[i]
            theta[i] = theta[i] - rate * update
        optimizer.step()
    for p, expected in zip(layer.parameters(), theta, strict=True):
        measured(p.detach().numpy() - expected, 1e-13)


def test_the_originals_adam_begins_as_it_says_in_float32():
    layer = nn.Linear(5, 3)
    optimizer = adamw(layer, bias_correction=False)
    for p in layer.parameters():
        state = optimizer.state[p]
        assert state["step"].dtype == torch.float32
        assert state["step"] + 1 > state["step"]
        assert 0.999 ** float(state["step"]) == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_the_constants_are_the_originals():
    (decayed, plain) = adamw(nn.Linear(2, 2)).param_groups
    for group in (decayed, plain):
        assert group["betas"] == (0.9, 0.999)
        assert group["eps"] == 1e-6
        assert group["lr"] == 0.0
        assert group["fused"]
        assert not group["amsgrad"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)


@pytest.mark.equation("11.7")
@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 10), (10, 100), (7, 7), (1, 2), (0, 1)]
)
def test_the_schedule_equals_hugging_faces_at_every_step(
    warmup, total, measured
):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 5):
        expected = theirs.lr_lambdas[0](step)
        measured(linear_warmup_decay(step, warmup, total) - expected, 0)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (10, 100), (7, 7)])
def test_the_constant_schedule_equals_hugging_faces(warmup, total, measured):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_constant_schedule_with_warmup(optimizer, warmup)
    for step in range(total + 5):
        expected = theirs.lr_lambdas[0](step)
        measured(SCHEDULES["constant"](step, warmup, total) - expected, 0)


@pytest.mark.equation("11.10")
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (10, 100), (7, 7)])
def test_the_originals_schedule_equals_its_transcription(
    warmup, total, measured
):
    """optimization.py:32-54: a polynomial decay of power 1, then a switch."""
    for step in range(total + 5):
        decayed = (1.0 - 0.0) * (1 - min(step, total) / total) ** 1.0 + 0.0
        warm = 1.0 if step < warmup else 0.0
        percent = step / warmup if warmup else 0.0
        expected = (1.0 - warm) * decayed + warm * percent
        measured(SCHEDULES["original"](step, warmup, total) - expected, 1e-15)


def numpy_train(targets, rates, decay, bound):
    """Equations (11.1) to (11.8) for `Quadratic`, step by step."""
    model = Quadratic()
    theta = [p.detach().numpy().copy() for p in model.parameters()]
    m, v = [0.0, 0.0], [0.0, 0.0]
    norms = []
    for t, (target, rate) in enumerate(zip(targets, rates, strict=True), 1):
        g = [theta[0] - target, theta[1] - target[0]]
        norms.append(math.sqrt(sum((x**2).sum() for x in g)))
        g = [x * min(1.0, bound / (norms[-1] + 1e-6)) for x in g]
        for i in (0, 1):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            m_hat, v_hat = m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)
            step = m_hat / (np.sqrt(v_hat) + 1e-6) + (decay, 0.0)[i] * theta[i]
            theta[i] = theta[i] - rate * step
    return theta, norms


@pytest.mark.equation("11.1", "11.3", "11.6", "11.7", "11.8")
def test_the_whole_loop_equals_numpy_with_clipping_and_schedule(measured):
    torch.manual_seed(2)
    scales = [0.1, 5.0, 0.5, 20.0, 1.0, 0.2] * 3
    targets = [s * torch.randn(4, 3, dtype=torch.float64) for s in scales]
    rates = [0.05 * linear_warmup_decay(s, 4, 18) for s in range(18)]
    model = Quadratic()
    batches = [{"target": target} for target in targets]
    reports = list(
        train(model, adamw(model), batches, rates.__getitem__, 0, 3.0)
    )
    theta, norms = numpy_train([t.numpy() for t in targets], rates, 0.01, 3.0)
    for p, expected in zip(model.parameters(), theta, strict=True):
        measured(p.detach().numpy() - expected, 1e-12)
    measured(np.subtract([r.grad_norm for r in reports], norms), 1e-12)
    assert [r.learning_rate for r in reports] == rates
    assert [r.step for r in reports] == list(range(18))


def test_the_default_bound_on_the_norm_is_one():
    ends = []
    for bound in ((), (0, 1.0)):
        model = Quadratic()
        batches = [
            {"target": s * torch.ones(4, 3).double()} for s in (3.0, 0.1, -9.0)
        ]
        list(train(model, adamw(model), batches, lambda s: 0.1, *bound))
        ends.append(model.weight.detach())
    assert torch.equal(*ends)
    theta, _ = numpy_train(
        [s * np.ones((4, 3)) for s in (3.0, 0.1, -9.0)], [0.1] * 3, 0.01, 1.0
    )
    assert np.abs(ends[0].numpy() - theta[0]).max() < 1e-12


def test_groups_equal_those_of_the_originals_name_rule():
    """LayerNorm, layer_norm and bias are excluded, by Hugging Face's names."""
    from bertnb.folders import hf_name

    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = BertForNextSentencePrediction(config)
    decayed = {id(p) for p in parameter_groups(model)[0]["params"]}
    for name, parameter in model.named_parameters():
        theirs = hf_name(name)
        excluded = any(
            word in theirs for word in ("LayerNorm", "layer_norm", "bias")
        )
        assert (id(parameter) in decayed) != excluded, name
