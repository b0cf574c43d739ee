"""What attention cannot see, and what positions must give it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bertnb import (
    BertConfig,
    LearnedPositions,
    MultiHeadAttention,
    sinusoidal_positions,
)
from bertnb.positions import check_ids


def attention(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=8, num_attention_heads=2)
    return MultiHeadAttention(config).double().eval().requires_grad_(False)


def states(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def table(length=64, dim=16):
    """The sinusoids in float64, from the definition."""
    p = torch.arange(length, dtype=torch.float64)[:, None]
    angle = p * frequencies(dim)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def frequencies(dim):
    return torch.tensor(
        [10000.0 ** (-2 * i / dim) for i in range(dim // 2)],
        dtype=torch.float64,
    )


def rotation(k, dim):
    c, s = (k * frequencies(dim)).cos(), (k * frequencies(dim)).sin()
    blocks = torch.stack((c, s, -s, c), dim=-1).unflatten(-1, (2, 2))
    return torch.block_diag(*blocks)


# attention without positions


@pytest.mark.equation("3.1", "3.2")
@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)))
def test_attention_commutes_with_every_reordering_of_the_tokens(
    measured, order
):
    attend, x = attention(), states(6, 8)
    moved = attend(x[order])[0]
    measured(moved - attend(x)[0][order], 1e-12)
    measured(moved.mean(0) - attend(x)[0].mean(0), 1e-12)


def test_a_mask_must_be_reordered_along():
    attend, x = attention(), states(6, 8)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    causal = torch.ones(6, 6).tril().bool()
    right = attend(x, causal)[0][order]
    along = attend(x[order], causal[order][:, order])[0]
    assert (along - right).abs().max() < 1e-12
    assert (attend(x[order], causal)[0] - right).abs().max() > 0.01


def test_positions_make_the_order_of_words_visible():
    attend, x = attention(), states(3, 8)
    places = sinusoidal_positions(3, 8).double()
    forward = attend(x + places)[0].mean(0)
    backward = attend(x.flip(0) + places)[0].mean(0)
    assert (forward - backward).abs().max() > 0.01
    late = attend(x)[0] + places  # added to the output they come too late
    late_backward = attend(x.flip(0))[0] + places
    assert (late.mean(0) - late_backward.mean(0)).abs().max() < 1e-12


# sinusoids


def test_the_first_pair_turns_by_one_radian_a_step():
    rows = sinusoidal_positions(3, 4)
    for p in range(3):
        assert math.isclose(rows[p, 0], math.sin(p), abs_tol=1e-7)
        assert math.isclose(rows[p, 1], math.cos(p), abs_tol=1e-7)
        assert math.isclose(rows[p, 2], math.sin(p / 100), abs_tol=1e-7)
        assert math.isclose(rows[p, 3], math.cos(p / 100), abs_tol=1e-7)


@pytest.mark.equation("3.4", "3.5")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12).map(lambda n: 2 * n), st.integers(-20, 20))
def test_a_step_of_k_is_one_rotation_for_all_places(measured, dim, k):
    rows = sinusoidal_positions(64, dim).double()
    first, last = max(0, -k), 64 - max(0, k)
    turned = rows[first:last] @ rotation(k, dim).T
    measured(turned - rows[first + k : last + k], 1e-6)


@pytest.mark.equation("3.8")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12).map(lambda n: 2 * n), st.integers(0, 30))
def test_the_dot_product_depends_on_the_distance_alone(measured, dim, k):
    rows = sinusoidal_positions(64, dim).double()
    dots = (rows[: 64 - k] * rows[k:]).sum(-1)
    expected = (k * frequencies(dim)).cos().sum()
    measured(dots - expected, 1e-5)


def test_all_rows_have_the_same_length_and_no_two_are_alike():
    rows = sinusoidal_positions(512, 64)
    assert (rows.norm(dim=-1) - 32**0.5).abs().max() < 1e-5
    apart = torch.cdist(rows.double(), rows.double()) + torch.eye(512)
    assert apart.min() > 0.1


def test_a_longer_table_begins_with_the_shorter_one():
    assert torch.equal(
        sinusoidal_positions(9, 6)[:4], sinusoidal_positions(4, 6)
    )
    assert sinusoidal_positions(0, 6).shape == (0, 6)


@pytest.mark.parametrize("dim", [-2, 0, 7])
def test_a_dimension_without_pairs_is_named(dim):
    with pytest.raises(
        ValueError, match=rf"dim={dim}: expected a positive even"
    ):
        sinusoidal_positions(4, dim)


def test_a_negative_length_is_named():
    with pytest.raises(ValueError, match=r"length=-1: expected 0 or more"):
        sinusoidal_positions(-1, 4)


# learned positions


def learned(places=6):
    torch.manual_seed(0)
    return LearnedPositions(
        BertConfig(
            hidden_size=8,
            num_attention_heads=2,
            max_position_embeddings=places,
        )
    )


def test_the_table_has_a_row_for_each_place_and_is_trained():
    place = learned()
    assert list(place.state_dict()) == ["weight"]
    assert place.weight.shape == (6, 8)
    assert place.weight.requires_grad
    assert place(torch.tensor([[5, 0]])).shape == (1, 2, 8)


def test_only_the_places_that_occur_get_a_gradient():
    place = learned()
    place(torch.arange(4).expand(3, 4)).sum().backward()
    assert place.weight.grad[:, 0].tolist() == [3, 3, 3, 3, 0, 0]


def test_the_gradient_equals_finite_differences():
    place = learned().double()
    ids = torch.tensor([[0, 1, 1], [5, 0, 2]])

    def function(weight):
        return torch.func.functional_call(place, {"weight": weight}, (ids,))

    assert torch.autograd.gradcheck(function, place.weight)


@pytest.mark.parametrize("places", [6, 512])
def test_longer_than_the_table_is_an_error_that_names_the_limit(places):
    place = learned(places)
    place(torch.arange(places))
    message = (
        rf"position_ids holds {places}; expected 0 to {places - 1} "
        rf"\(max_position_embeddings={places}\).*larger max_position_embeddings"
    )
    with pytest.raises(ValueError, match=message):
        place(torch.arange(places + 1))


def test_a_negative_place_is_named_and_does_not_count_from_the_end():
    with pytest.raises(ValueError, match=r"position_ids holds -1; expected 0"):
        learned()(torch.tensor([0, -1]))


def test_left_padding_changes_the_answer_and_right_padding_does_not():
    attend, place, word = attention(), learned().double(), nn.Embedding(10, 8)

    def encode(ids, position_ids=None):
        ids = torch.tensor([ids])
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1])
        x = word.double()(ids) + place(torch.as_tensor(position_ids))
        return attend(x, (ids > 0)[:, None, None, :])[0][ids > 0]

    alone = encode([5, 6, 7])
    assert (encode([5, 6, 7, 0, 0]) - alone).abs().max() < 1e-12
    assert (encode([0, 0, 5, 6, 7]) - alone).abs().max() > 0.01
    again = encode([0, 0, 5, 6, 7], [0, 0, 0, 1, 2])
    assert (again - alone).abs().max() < 1e-12


# ids


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_inside_the_table_pass(dtype):
    check_ids(torch.tensor([[0, 3], [4, 0]], dtype=dtype), "ids", 5, "rows")


@pytest.mark.parametrize(
    ("ids", "bad"), [([0, 5], 5), ([9, 2], 9), ([-1, 2], -1), ([-3, 9], -3)]
)
def test_an_id_outside_is_named_with_the_limit_and_what_to_do(ids, bad):
    message = (
        rf"tokens holds {bad}; expected 0 to 4 \(rows=5\): correct the ids, "
        "or use a model with a larger rows"
    )
    with pytest.raises(ValueError, match=message):
        check_ids(torch.tensor(ids), "tokens", 5, "rows")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.int16, torch.uint8]
)
def test_ids_of_another_type_are_refused(dtype):
    message = rf"tokens has dtype {dtype}; expected torch.int64.*\.long\(\)"
    with pytest.raises(TypeError, match=message):
        check_ids(torch.zeros(2, dtype=dtype), "tokens", 5, "rows")


def test_no_ids_at_all_are_fine():
    assert learned()(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 8)


def test_the_lookup_compiles_to_one_graph():
    place, ids = learned(), torch.arange(6)
    compiled = torch.compile(place, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), place(ids))
