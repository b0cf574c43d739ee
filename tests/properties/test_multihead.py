"""What must hold of heads, whatever the weights."""

from math import cos, pi, sin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bertnb import BertConfig, MultiHeadAttention
from bertnb.multihead import merge_heads, split_heads


def make(hidden=12, heads=3, seed=0, **dropout):
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=hidden, num_attention_heads=heads, **dropout
    )
    block = MultiHeadAttention(config).double().eval()
    for p in block.parameters():
        nn.init.normal_(p)
    return block


def states(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# splitting and merging


@pytest.mark.equation("2.5")
def test_a_head_gets_neighbouring_features_of_every_token():
    x = 10 * torch.arange(3)[:, None] + torch.arange(4)  # token t, feature f
    first = [[0, 1], [10, 11], [20, 21]]
    second = [[2, 3], [12, 13], [22, 23]]
    assert split_heads(x[None], 2).tolist() == [[first, second]]


def test_merging_concatenates_the_heads_of_each_token():
    heads = torch.arange(2 * 3 * 2).reshape(1, 2, 3, 2)
    rows = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert merge_heads(heads).tolist() == [rows]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_merge_undoes_split_for_any_shape(batch, length, heads, size):
    x = states(*batch, length, heads * size)
    split = split_heads(x, heads)
    assert split.shape == (*batch, heads, length, size)
    assert torch.equal(merge_heads(split), x)


@pytest.mark.parametrize("heads", [5, 0, -2])
def test_heads_that_do_not_divide_the_features_are_named(heads):
    message = rf"num_heads={heads} does not divide the 12 features of x"
    with pytest.raises(ValueError, match=message):
        split_heads(states(2, 3, 12), heads)


# the formula


@pytest.mark.equation("2.3", "2.4")
def test_concat_and_project_is_a_sum_over_heads(measured):
    block, x = make(), states(2, 5, 12)
    with torch.no_grad():
        out, weights = block(x, output_attentions=True)
        total = block.output.bias.clone()
        for i in range(3):
            own = slice(4 * i, 4 * i + 4)
            value = x @ block.value.weight[own].T + block.value.bias[own]
            head = weights[:, i] @ value
            total = total + head @ block.output.weight[:, own].T
    measured(out - total, 1e-12)


def test_each_head_sees_every_feature_of_the_input():
    block = make()
    with torch.no_grad():
        effect = split_heads(torch.eye(12).double() @ block.query.weight.T, 3)
    assert (effect.abs().amax(dim=-1) > 0).all()


def test_heads_may_be_renumbered():
    block, x = make(), states(2, 5, 12)
    before = block(x)[0]
    order = torch.arange(12).reshape(3, 4)[[2, 0, 1]].flatten()
    with torch.no_grad():
        for p in (block.query, block.key, block.value):
            p.weight.copy_(p.weight[order])
            p.bias.copy_(p.bias[order])
        block.output.weight.copy_(block.output.weight[:, order])
    assert (block(x)[0] - before).abs().max() < 1e-12


@pytest.mark.equation("2.8")
def test_parameters_and_names_do_not_depend_on_the_number_of_heads():
    for heads in (1, 2, 6):
        block = make(12, heads)
        assert sum(p.numel() for p in block.parameters()) == 4 * 144 + 4 * 12
        assert list(block.state_dict()) == [
            f"{name}.{kind}"
            for name in ("query", "key", "value", "output")
            for kind in ("weight", "bias")
        ]


def test_the_bias_of_the_keys_has_no_gradient():
    block, x = make(), states(2, 5, 12)
    block(x)[0].square().sum().backward()
    assert block.key.bias.grad.abs().max() < 1e-9
    assert block.value.bias.grad.abs().max() > 1e-3


@pytest.mark.parametrize("attentions", [False, True])
def test_gradients_of_input_and_weights_equal_finite_differences(attentions):
    block, x = make(4, 2), states(1, 3, 4)
    names = list(dict(block.named_parameters()))
    mask = torch.tensor([True, True, False])[None, None, None]

    def function(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        arguments = (x, mask, attentions)
        return torch.func.functional_call(block, named, arguments)[0]

    inputs = [x, *(p.detach().clone() for p in block.parameters())]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, inputs)


def test_two_heads_copy_two_tokens_exactly():
    turn = 2 * pi / 5
    payload = torch.tensor([1.0, 2.0, -1.0, 3.0, 0.5], dtype=torch.float64)
    place = turn * torch.arange(5, dtype=torch.float64)
    verb = torch.tensor([0.0, 1, 0, 0, 0]).double()
    one = torch.ones(5).double()
    x = torch.stack(
        [payload, verb, one, place.cos(), place.sin(), 0 * one], dim=-1
    )
    block = make(6, 2)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        back = torch.tensor([[cos(turn), sin(turn)], [-sin(turn), cos(turn)]])
        block.query.weight[0:2, 3:5] = 4000 * back
        block.key.weight[0:2, 3:5] = torch.eye(2)
        block.query.weight[3, 2] = 4000
        block.key.weight[3, 1] = 1
        block.value.weight[[0, 3], 0] = 1
        block.output.weight[[0, 1], [0, 3]] = 1
        out, _ = block(x[None])
    assert torch.equal(out[0, :, 0], payload.roll(1))
    assert torch.equal(out[0, :, 1], payload[1].expand(5))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_one_average_misses_by_the_size_of_the_payload(gains, total, p, v):
    p, v = (p, v) if p + v <= 1 else (1 - p, 1 - v)  # weights of two tokens
    same = [abs(g * total - 1) for g in gains]  # wanted (1, 1)
    first, second = (g * (p - v) for g in gains)  # wanted (1, -1)
    assert max(*same, abs(first - 1), abs(second + 1)) >= 1


# masks


def test_the_two_paths_agree_and_weights_come_only_on_request():
    block, x = make(), states(2, 5, 12)
    mask = (states(2, 3, 5, 5) > -0.3) | torch.eye(5).bool()
    for m in (None, mask, mask[:, :1, :1], mask[0, 0]):
        out, weights = block(x, m, output_attentions=True)
        fast, none = block(x, m)
        assert none is None
        assert weights.shape == (2, 3, 5, 5)
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
        assert (out - fast).abs().max() < 1e-12


@pytest.mark.parametrize("attentions", [False, True])
def test_hidden_tokens_change_nothing_in_any_head(attentions):
    block, x = make(), states(2, 5, 12)
    mask = torch.tensor([True, True, True, False, False])[None, None, None]
    other = x.clone()
    other[:, 3:] = 1000.0
    one, weights = block(x, mask, attentions)
    two, _ = block(other, mask, attentions)
    short, _ = block(x[:, :3], None, attentions)
    assert torch.equal(one[:, :3], two[:, :3])
    assert (one[:, :3] - short).abs().max() < 1e-12
    if attentions:
        assert (weights[..., 3:] == 0).all()


@pytest.mark.parametrize("attentions", [False, True])
def test_a_head_that_may_see_nothing_leaves_the_sum(attentions):
    block, x = make(), states(2, 5, 12)
    only_second = torch.tensor([False, True, False])[:, None, None]
    out, _ = block(x, only_second.expand(1, 3, 1, 5), attentions)
    weights = block(x, output_attentions=True)[1]
    value = split_heads(block.value(x), 3)
    head = (weights @ value)[:, 1]
    expected = head @ block.output.weight[:, 4:8].T + block.output.bias
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("attentions", [False, True])
def test_where_nothing_may_be_seen_only_the_output_bias_is_left(attentions):
    block, x = make(), states(2, 5, 12)
    nothing = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    out, _ = block(x, nothing, attentions)
    assert torch.equal(out, block.output.bias.expand(2, 5, 12))


@pytest.mark.parametrize("attentions", [False, True])
def test_some_queries_get_the_answers_that_all_would_give(attentions):
    block, x = make(), states(2, 5, 12)
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask[..., 0] = True
    every, weights = block(x, mask, True)
    some, few = block(x, mask[:, :, [3, 1]], attentions, x[:, [3, 1]])
    assert (some - every[:, [3, 1]]).abs().max() < 1e-12
    assert (few is None) == (not attentions)
    if attentions:
        assert (few - weights[:, :, [3, 1]]).abs().max() < 1e-12


def test_a_single_unbatched_sequence_gives_its_rows_of_the_batch():
    block, x = make(), states(2, 5, 12)
    alone, _ = block(x[1])
    assert (alone - block(x)[0][1]).abs().max() < 1e-12


# dropout


@pytest.mark.parametrize("attentions", [False, True])
def test_dropout_is_silent_in_eval(attentions):
    plain, x = make(attention_probs_dropout_prob=0.0), states(2, 5, 12)
    block = make(attention_probs_dropout_prob=0.5)
    assert torch.equal(
        block(x, None, attentions)[0], plain(x, None, attentions)[0]
    )


@pytest.mark.parametrize("attentions", [False, True])
def test_dropout_acts_in_training(attentions):
    block, x = make(attention_probs_dropout_prob=0.5).train(), states(2, 5, 12)
    first = block(x, None, attentions)[0]
    assert not torch.equal(first, block(x, None, attentions)[0])


def test_dropout_drops_weights_at_its_rate_and_scales_the_others():
    block = make(attention_probs_dropout_prob=0.25)
    x = states(4, 20, 12)
    whole = block(x, output_attentions=True)[1]
    torch.manual_seed(0)
    weights = block.train()(x, output_attentions=True)[1]
    dropped = weights == 0
    assert 0.22 < dropped.double().mean() < 0.28  # 4,800 draws
    kept = (weights * 0.75)[~dropped]
    assert (kept - whole[~dropped]).abs().max() < 1e-12


@pytest.mark.parametrize("attentions", [False, True])
def test_the_rate_is_that_of_the_attention_not_of_the_hidden_states(attentions):
    block = make(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.9)
    x = states(2, 5, 12)
    still = block(x, None, attentions)[0]
    assert torch.equal(block.train()(x, None, attentions)[0], still)


# wrong input


def test_a_wrong_hidden_size_is_named():
    message = r"hidden_states has 8 features; expected hidden_size=12"
    with pytest.raises(ValueError, match=message):
        make()(states(2, 5, 8))


@pytest.mark.parametrize("attentions", [False, True])
def test_a_mask_of_numbers_is_refused(attentions):
    with pytest.raises(TypeError, match=r"mask has dtype torch.float64"):
        make()(states(2, 5, 12), torch.ones(2, 1, 1, 5).double(), attentions)
