"""The layers equal NumPy in float64, PyTorch's own and Hugging Face's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig as HFConfig
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput

from bertnb import BertConfig
from bertnb.layers import (
    ACTIVATIONS,
    FeedForward,
    gelu,
    initialize,
    layer_norm,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def numpy_norm(x, weight, bias, eps):
    mean = x.sum(-1, keepdims=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdims=True) / x.shape[-1]
    return weight * (x - mean) / np.sqrt(variance + eps) + bias


@pytest.mark.equation("4.1", "4.2")
@pytest.mark.parametrize("shape", [(8,), (3, 2), (2, 5, 768), (2, 3, 4, 7)])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_layer_norm_is_the_formula_in_numpy(shape, eps, measured):
    x = 3 * doubles(*shape) + 1
    weight, bias = doubles(shape[-1], seed=1), doubles(shape[-1], seed=2)
    expected = numpy_norm(x.numpy(), weight.numpy(), bias.numpy(), eps)
    ours = layer_norm(x, weight, bias, eps)
    assert ours.shape == expected.shape
    measured(ours - torch.tensor(expected), 1e-12)


@pytest.mark.equation("4.1", "4.2", "4.3", "4.5")
@pytest.mark.parametrize("eps", [1e-12, 0.3])
@pytest.mark.parametrize(
    ("dtype", "atol"), [("float32", 2e-6), ("float64", 1e-12)]
)
def test_layer_norm_and_its_gradients_are_the_fused_kernel_s(
    eps, dtype, atol, measured
):
    dtype = getattr(torch, dtype)
    leaves = [
        tensor.to(dtype).requires_grad_()
        for tensor in (doubles(2, 5, 16), doubles(16), doubles(16, seed=3))
    ]
    arriving = doubles(2, 5, 16, seed=4).to(dtype)
    results = []
    for norm in (
        layer_norm(*leaves, eps),
        F.layer_norm(leaves[0], (16,), *leaves[1:], eps),
    ):
        gradients = torch.autograd.grad((norm * arriving).sum(), leaves)
        results.append((norm, *gradients))
    for ours, fused in zip(*results, strict=True):
        assert ours.dtype == dtype
        measured(ours - fused, 10 * atol)


@pytest.mark.equation("4.3", "4.4", "4.5")
def test_layer_norm_has_the_gradients_of_the_chapter(measured):
    x, weight, arriving = doubles(6, 9), doubles(9, seed=1), doubles(6, 9)
    leaves = [t.requires_grad_() for t in (x, weight, torch.zeros(9).double())]
    out = layer_norm(*leaves, 0.2)
    auto = torch.autograd.grad((out * arriving).sum(), leaves)
    n, wg = x.detach().numpy(), (weight * arriving).detach().numpy()
    sigma = np.sqrt(n.var(-1, keepdims=True) + 0.2)
    xhat = (n - n.mean(-1, keepdims=True)) / sigma
    shift = wg.mean(-1, keepdims=True)
    stretch = xhat * (wg * xhat).mean(-1, keepdims=True)
    g = arriving.numpy()
    by_hand = ((wg - shift - stretch) / sigma, (g * xhat).sum(0), g.sum(0))
    for ours, expected in zip(auto, by_hand, strict=True):
        measured(ours.numpy() - expected, 1e-12)


def test_default_epsilon_is_1e_12_inside_the_root():
    row = F.layer_norm(doubles(1, 768), (768,), eps=0) * 1e-6
    out = layer_norm(row, torch.ones(768), torch.zeros(768))
    deviation = out.std(correction=0).item()
    assert deviation == pytest.approx(1 / math.sqrt(2), rel=1e-9)


SOME = (-6.0, -2.7, -0.5, 0.0, 0.3, 1.0, 5.0)


@pytest.mark.equation("4.6")
def test_gelu_is_x_times_the_normal_distribution_function(measured):
    for x in SOME:
        expected = x * (1 + math.erf(x / math.sqrt(2))) / 2
        got = gelu(torch.tensor(x, dtype=torch.float64)).item()
        measured(got - expected, 1e-12)


@pytest.mark.equation("4.7")
def test_gelu_tanh_is_the_formula_of_the_chapter(measured):
    for x in SOME:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        got = gelu(torch.tensor(x, dtype=torch.float64), "tanh").item()
        measured(got - x / 2 * (1 + math.tanh(inner)), 1e-12)


@pytest.mark.equation("4.6", "4.7")
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_is_the_fused_kernel(form, measured):
    x = torch.linspace(-9, 9, 3601, dtype=torch.float64)
    ours, fused = gelu(x, form), F.gelu(x, approximate=form)
    measured(ours - fused, 1e-12)


def test_gelu_s_two_forms_differ_by_4_7e_4_at_2_70():
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    difference = (gelu(x, "tanh") - gelu(x)).abs()
    assert difference.max().item() == pytest.approx(4.73e-4, rel=2e-3)
    assert abs(x[difference.argmax()]).item() == pytest.approx(2.70, abs=0.005)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_is_hugging_face_s_of_that_name(name):
    x = torch.linspace(-9, 9, 3601, dtype=torch.float64)
    ours, theirs = ACTIVATIONS[name](x), ACT2FN[name](x)
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.equation("4.8")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forward_and_its_gradients_are_hugging_face_s(name, measured):
    sizes = {
        "hidden_size": 6,
        "intermediate_size": 10,
        "num_attention_heads": 2,
        "hidden_act": name,
    }
    ours = FeedForward(BertConfig(**sizes)).double()
    up = BertIntermediate(HFConfig(**sizes)).double()
    down = BertOutput(HFConfig(**sizes)).double().dense
    up.dense.load_state_dict(ours.intermediate.state_dict())
    down.load_state_dict(ours.output.state_dict())
    x, arriving = doubles(2, 5, 6), doubles(2, 5, 6, seed=1)
    mine, theirs = ours(x), down(up(x))
    measured(mine - theirs, 1e-12)
    (mine * arriving).sum().backward()
    (theirs * arriving).sum().backward()
    for a, b in [(ours.intermediate, up.dense), (ours.output, down)]:
        measured(a.weight.grad - b.weight.grad, 1e-12)
        measured(a.bias.grad - b.bias.grad, 1e-12)


@pytest.mark.equation("4.8")
def test_feed_forward_is_the_formula_in_numpy(measured):
    config = BertConfig(
        hidden_size=6,
        intermediate_size=10,
        num_attention_heads=2,
        hidden_act="tanh",
    )
    network, x = FeedForward(config).double(), doubles(3, 6)
    w1, b1, w2, b2 = (p.detach().numpy() for p in network.parameters())
    expected = np.tanh(x.numpy() @ w1.T + b1) @ w2.T + b2
    measured(network(x) - torch.tensor(expected), 1e-12)


def test_feed_forward_of_bert_base_has_4_722_432_parameters():
    with torch.device("meta"):
        network = FeedForward(BertConfig())
    assert sum(p.numel() for p in network.parameters()) == 4_722_432


@pytest.mark.equation("4.11")
def test_initial_weights_follow_the_cut_normal_distribution(measured):
    torch.manual_seed(0)
    layer = nn.Linear(400, 500)
    initialize(layer, 0.02)
    z = layer.weight.detach().double().flatten().sort().values / 0.02
    assert z.abs().max() <= 2 + 1e-6
    inside = math.erf(math.sqrt(2))  # the cut is at a = 2
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    measured(z.var().item() - (1 - 4 * density / inside), 0.008)
    expected = 0.5 + torch.erf(z / math.sqrt(2)) / (2 * inside)
    seen = torch.arange(1, len(z) + 1, dtype=torch.float64) / len(z)
    # Kolmogorov and Smirnov: above 2 / sqrt(n) once in 1,500 draws
    assert (seen - expected).abs().max() < 2 / math.sqrt(len(z))
