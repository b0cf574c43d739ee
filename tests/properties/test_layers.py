"""What must hold of the layers for any numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bertnb import BertConfig, BertForPreTraining
from bertnb.configuration import HIDDEN_ACTS
from bertnb.layers import (
    ACTIVATIONS,
    FeedForward,
    LayerNorm,
    gelu,
    initialize,
    layer_norm,
)

EXACT = {"rtol": 0, "atol": 1e-12}
SMALL = BertConfig(hidden_size=6, intermediate_size=10, num_attention_heads=2)


def plain(x: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    size = x.shape[-1]
    return layer_norm(x, torch.ones(size), torch.zeros(size), eps)


@given(st.integers(2, 40), st.floats(0.1, 50), st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_layer_norm_forgets_scale_and_offset_of_a_row(size, scale, offset):
    torch.manual_seed(size)
    x = torch.randn(3, size, dtype=torch.float64)
    y = plain(x, eps=0)
    torch.testing.assert_close(y.mean(-1), torch.zeros(3).double(), **EXACT)
    torch.testing.assert_close(
        y.var(-1, correction=0), torch.ones(3).double(), **EXACT
    )
    moved = plain(scale * x + offset, eps=0)
    torch.testing.assert_close(moved, y, rtol=0, atol=1e-9)
    assert y.abs().max() <= (size - 1) ** 0.5 + 1e-9


def test_layer_norm_scales_before_it_shifts():
    x = torch.randn(4, 6, dtype=torch.float64)
    weight, bias = torch.full((6,), 3.0), torch.full((6,), 7.0)
    torch.testing.assert_close(
        layer_norm(x, weight, bias), 3 * plain(x) + 7, **EXACT
    )


def test_layer_norm_of_a_token_does_not_see_the_others():
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(plain(x)[1, 3], plain(x[1, 3]))


def norms(size=24):
    """The model's norm and torch's, with the same random scale and shift."""
    torch.manual_seed(0)
    ours = LayerNorm(size, eps=1e-12)
    nn.init.normal_(ours.weight, 1, 0.2)
    nn.init.normal_(ours.bias)
    theirs = nn.LayerNorm(size, eps=1e-12)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_the_model_is_torchs_bit_for_bit(dtype):
    ours, theirs = norms()
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    towards = torch.randn(3, 5, 24, dtype=dtype)
    results = []
    for norm in (ours.to(dtype), theirs.to(dtype)):
        y = norm(x)
        slopes = torch.autograd.grad(
            y, [x, norm.weight, norm.bias], grad_outputs=towards
        )
        results.append([y, *slopes])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_keeps_a_16_bit_stream_and_float32_statistics(dtype):
    ours, theirs = norms()
    x = 40 + torch.randn(6, 24)  # in 16 bits a mean of squares has no digits
    halves = x.to(dtype)
    exact = theirs(halves.float())
    spacing = torch.finfo(dtype).eps * exact.abs().max()
    with torch.autocast("cpu", dtype):
        for given in (halves, halves.float()):
            y = ours(given)
            assert y.dtype == dtype
            assert (y.float() - exact).abs().max() <= 2 * spacing
    assert ours(x).dtype == torch.float32  # outside, as ever


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_constant_row_in_16_bits_is_the_bias_and_not_nan(dtype):
    ours, _ = norms()
    rows = torch.tensor([0.0, 3.0, -7.5])[:, None].expand(3, 24).to(dtype)
    with torch.autocast("cpu", dtype):
        y = ours(rows)
    assert torch.equal(y, ours.bias.to(dtype).expand(3, 24))


def test_layer_norm_of_a_constant_row_is_the_bias():
    bias = torch.randn(6)
    out = layer_norm(torch.full((2, 6), 3.0), torch.ones(6), bias)
    assert torch.equal(out, bias.expand(2, 6))


def test_layer_norm_gradient_neither_shifts_nor_stretches():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    loss = (plain(x, eps=0) * torch.randn(5, 7)).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    zero = torch.zeros(5).double()
    torch.testing.assert_close(gradient.sum(-1), zero, **EXACT)
    torch.testing.assert_close((gradient * x).sum(-1), zero, **EXACT)


def test_gradients_agree_with_finite_differences():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = (
        torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in "wb"
    )
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias, 0.1))
    assert torch.autograd.gradcheck(gelu, (x, "none"))
    assert torch.autograd.gradcheck(gelu, (x, "tanh"))
    assert torch.autograd.gradcheck(FeedForward(SMALL).double(), x)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_of_x_and_of_minus_x_differ_by_x(form):
    x = torch.linspace(0, 9, 901, dtype=torch.float64)
    torch.testing.assert_close(gelu(x, form) - gelu(-x, form), x, **EXACT)


def test_gelu_is_exact_by_default():
    x = torch.tensor(2.70)
    assert torch.equal(gelu(x), gelu(x, "none"))
    assert not torch.equal(gelu(x), gelu(x, "tanh"))


def test_gelu_names_the_forms_it_knows():
    with pytest.raises(ValueError, match=r"approximate='erf'.*none.*tanh"):
        gelu(torch.ones(2), "erf")


def test_every_activation_of_the_configuration_is_there_and_no_other():
    assert set(ACTIVATIONS) == set(HIDDEN_ACTS)


def test_feed_forward_uses_the_activation_of_the_configuration():
    for name in HIDDEN_ACTS:
        config = BertConfig(
            hidden_size=6,
            intermediate_size=10,
            num_attention_heads=2,
            hidden_act=name,
        )
        assert FeedForward(config).act is ACTIVATIONS[name]


@given(st.permutations(range(5)))
@settings(max_examples=15, deadline=None)
def test_feed_forward_is_the_same_map_at_each_position(order):
    torch.manual_seed(0)
    network = FeedForward(SMALL).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    y = network(x)
    assert y.shape == x.shape
    torch.testing.assert_close(network(x[:, order]), y[:, order], **EXACT)
    torch.testing.assert_close(network(x[1, 2]), y[1, 2], **EXACT)


def test_feed_forward_is_not_linear():
    network = FeedForward(SMALL).double()
    a, b = torch.randn(2, 4, 6, dtype=torch.float64)
    middle = (network(a) + network(b)) / 2
    assert (network((a + b) / 2) - middle).abs().max() > 1e-3


def test_feed_forward_has_no_chance_in_it():
    network, x = FeedForward(SMALL).train(), torch.randn(2, 5, 6)
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_initialize_cuts_kernels_and_embeddings_at_two_deviations(std):
    torch.manual_seed(0)
    for module in (nn.Linear(200, 200), nn.Embedding(200, 200)):
        nn.init.constant_(module.weight, torch.nan)
        initialize(module, std)
        largest = module.weight.detach().abs().max().item() / std
        assert 1.99 < largest <= 2 + 1e-6
        deviation = module.weight.detach().std().item() / std
        assert deviation == pytest.approx(0.8796, abs=0.01)
        assert abs(module.weight.detach().mean().item()) / std < 0.02


def test_initialize_sets_biases_to_0_and_norm_weights_to_1():
    linear, norm = nn.Linear(3, 4), nn.LayerNorm(5)
    for parameter in (*linear.parameters(), *norm.parameters()):
        nn.init.constant_(parameter, torch.nan)
    initialize(linear, 0.02)
    initialize(norm, 0.02)
    assert torch.equal(linear.bias, torch.zeros(4))
    assert torch.equal(norm.weight, torch.ones(5))
    assert torch.equal(norm.bias, torch.zeros(5))


def test_initialize_accepts_modules_without_bias():
    for module in (nn.Linear(3, 4, bias=False), nn.Dropout(0.1), nn.Identity()):
        initialize(module, 0.02)


def test_initialize_reaches_every_parameter_of_a_model():
    model = BertForPreTraining(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=12,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.apply(lambda module: initialize(module, 0.02))
    assert all(p.isfinite().all() for p in model.parameters())
