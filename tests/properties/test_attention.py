"""What must hold for attention whatever the numbers are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb.attention import (
    attention_table,
    fast_attention,
    scaled_dot_product_attention,
)

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 6)


def visible(*given):
    return scaled_dot_product_attention(*given)[0]


BOTH = pytest.mark.parametrize("attend", [visible, fast_attention])


def normal(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    ]


# what equations (1.1) to (1.7) promise


@few
@given(seeds, sizes, sizes, sizes)
def test_weights_are_a_distribution_over_the_keys(seed, queries, keys, d):
    query, key, value = normal(seed, (queries, d), (keys, d), (keys, 2))
    context, weights = scaled_dot_product_attention(query, key, value)
    assert weights.shape == (queries, keys)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(queries).double())
    torch.testing.assert_close(context, weights @ value)


@few
@given(seeds, sizes)
def test_equal_keys_share_the_weight_equally(seed, keys):
    query, key, value = normal(seed, (3, 4), (1, 4), (keys, 2))
    context, _ = scaled_dot_product_attention(query, key.expand(keys, 4), value)
    torch.testing.assert_close(context, value.mean(0).expand(3, 2))


@few
@given(seeds)
def test_ratios_of_weights_are_exponentials_of_scaled_differences(seed):
    query, key, value = normal(seed, (1, 9), (2, 9), (2, 1))
    _, weights = scaled_dot_product_attention(query, key, value)
    difference = (query @ (key[0] - key[1])).item() / 3  # the root of 9
    ratio = (weights[0, 0] / weights[0, 1]).item()
    assert math.isclose(ratio, math.exp(difference), rel_tol=1e-9)


@BOTH
@few
@given(seed=seeds)
def test_keys_and_values_may_be_reordered_together(attend, seed):
    query, key, value = normal(seed, (4, 3), (5, 3), (5, 2))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        attend(query, key[order], value[order]), attend(query, key, value)
    )


@BOTH
def test_one_vector_added_to_all_keys_changes_nothing(attend):
    query, key, value, shift = normal(0, (4, 3), (5, 3), (5, 2), (3,))
    torch.testing.assert_close(
        attend(query, key + shift, value), attend(query, key, value)
    )


@pytest.mark.equation("1.6")
@pytest.mark.parametrize("d", [64, 512])
def test_scaled_scores_have_variance_one_at_every_size(d, measured):
    query, key = normal(0, (300, d), (300, d))
    value = torch.eye(300).double()
    _, weights = scaled_dot_product_attention(query, key, value)
    scores = weights.log()  # the scores, each row shifted by a number
    measured(scores.var(dim=-1).mean() - 1, 0.05)


# masks


@BOTH
@few
@given(seed=seeds, queries=sizes, keys=sizes)
def test_hidden_keys_and_values_have_no_influence(attend, seed, queries, keys):
    query, key, value = normal(seed, (queries, 3), (keys, 3), (keys, 2))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(queries, keys, generator=generator) < 0.5
    mask[:, 0] = False  # hidden from every query
    before = attend(query, key, value, mask)
    key[0], value[0] = 1e6, -1e6
    assert torch.equal(attend(query, key, value, mask), before)


@BOTH
def test_hiding_keys_equals_removing_them(attend):
    query, key, value = normal(0, (4, 3), (6, 3), (6, 2))
    mask = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(
        attend(query, key, value, mask), attend(query, key[mask], value[mask])
    )


@BOTH
def test_padding_width_changes_nothing(attend):
    x, padding = normal(0, (2, 4, 3), (2, 5, 3))
    wide = torch.cat([x, padding], dim=1)
    mask = torch.arange(9) < 4
    context = attend(wide, wide, wide, mask[None, None, :])
    torch.testing.assert_close(context[:, :4], attend(x, x, x))


def test_true_means_may_attend():
    query, key, value = normal(0, (1, 3), (2, 3), (2, 2))
    mask = torch.tensor([[False, True]])
    context, weights = scaled_dot_product_attention(query, key, value, mask)
    assert weights.tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(context[0], value[1])


@BOTH
def test_an_all_true_mask_is_no_mask(attend):
    query, key, value = normal(0, (4, 3), (5, 3), (5, 2))
    mask = torch.ones(4, 5, dtype=torch.bool)
    torch.testing.assert_close(
        attend(query, key, value, mask), attend(query, key, value)
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_a_query_without_keys_gets_zero_and_finite_gradients(dtype):
    mask = torch.tensor([[True, False, True], [False, False, False]])
    for attend in (visible, fast_attention):
        leaves = [
            t.to(dtype).requires_grad_()
            for t in normal(0, (2, 4), (3, 4), (3, 4))
        ]
        context = attend(*leaves, mask)
        assert (context[1] == 0).all()
        assert (context[0] != 0).any()
        gradients = torch.autograd.grad(context.sum(), leaves)
        assert all(g.isfinite().all() for g in gradients)
        query_gradient, key_gradient, _ = gradients
        assert (query_gradient[1] == 0).all()
        assert (key_gradient[1] == 0).all()  # hidden from both
        assert (query_gradient[0] != 0).any()
    _, weights = scaled_dot_product_attention(*leaves, mask)
    assert (weights[1] == 0).all()


@BOTH
def test_a_batch_without_any_visible_key_is_zero(attend):
    query, key, value = normal(0, (2, 3, 4), (2, 5, 4), (2, 5, 4))
    context = attend(query, key, value, torch.zeros(2, 1, 5).bool())
    assert (context == 0).all()


@BOTH
@pytest.mark.parametrize(
    "shape", [(5,), (1, 5), (4, 5), (4, 1), (1, 1), (3, 1, 5), (2, 3, 4, 5)]
)
def test_masks_broadcast_as_if_they_were_written_out(attend, shape):
    query, key, value = normal(0, (2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6))
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=generator) < 0.5
    full = mask.expand(2, 3, 4, 5)
    torch.testing.assert_close(
        attend(query, key, value, mask), attend(query, key, value, full)
    )


@BOTH
def test_a_batch_of_queries_may_share_its_keys(attend):
    query, key, value = normal(0, (2, 3, 4, 8), (5, 8), (5, 6))
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    mask = mask[:, None, None, :]
    torch.testing.assert_close(
        attend(query, key, value, mask),
        attend(query, key.expand(2, 3, 5, 8), value.expand(2, 3, 5, 6), mask),
    )


def test_the_contract_does_not_rest_on_the_kernel(monkeypatch):
    def careless(query, key, value, attn_mask, dropout_p):
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        added = torch.zeros_like(scores).masked_fill(~attn_mask, -torch.inf)
        return (scores + added).softmax(-1) @ value

    mask = torch.tensor([[True, False, True], [False, False, False]])
    leaves = normal(0, (2, 4), (3, 4), (3, 4))
    for t in leaves:
        t.requires_grad_()
    expected = visible(*leaves, mask)
    name = "torch.nn.functional.scaled_dot_product_attention"
    monkeypatch.setattr(name, careless)
    context = fast_attention(*leaves, mask)
    torch.testing.assert_close(context, expected)
    for gradient in torch.autograd.grad(context.sum(), leaves):
        assert gradient.isfinite().all()


@BOTH
def test_very_large_scores_stay_finite(attend):
    query, key, value = normal(0, (2, 4), (3, 4), (3, 2))
    context = attend(query * 1e4, key * 1e4, value)
    assert context.isfinite().all()


@BOTH
def test_a_hidden_key_stays_hidden_beside_very_low_scores(attend):
    query, key = torch.tensor([[1.0]]), torch.tensor([[-1e6], [-1e6], [0.0]])
    value = torch.tensor([[1.0], [3.0], [100.0]])
    mask = torch.tensor([True, True, False])
    assert attend(query, key, value, mask).item() == 2.0


# gradients


def test_no_nan_appears_on_the_way_back_from_a_query_without_keys():
    leaves = normal(0, (2, 4), (3, 4), (3, 4))
    for t in leaves:
        t.requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    for attend in (visible, fast_attention):
        with torch.autograd.set_detect_anomaly(True):  # raises at the first NaN
            attend(*leaves, mask).sum().backward()


def test_gradients_equal_finite_differences():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    leaves = normal(0, (3, 2), (4, 2), (4, 3))
    for t in leaves:
        t.requires_grad_()
    for chosen in (None, mask):
        assert torch.autograd.gradcheck(
            lambda q, k, v, m=chosen: scaled_dot_product_attention(q, k, v, m),
            leaves,
        )


@pytest.mark.equation("1.9")
def test_the_softmax_has_the_jacobian_of_the_chapter(measured):
    (scores,) = normal(0, (1, 5))
    key = 5**0.5 * torch.eye(5).double()  # so that the scores are the query

    def row(query):
        return scaled_dot_product_attention(query, key, key)[1][0]

    jacobian = torch.autograd.functional.jacobian(row, scores)[:, 0]
    p = row(scores)
    measured(jacobian - (p.diag() - torch.outer(p, p)), 1e-12)


@pytest.mark.equation("1.8", "1.10", "1.11")
def test_gradients_equal_the_equations_of_the_chapter(measured):
    leaves = normal(0, (3, 4), (5, 4), (5, 2))
    for t in leaves:
        t.requires_grad_()
    (upstream,) = normal(1, (3, 2))
    context, weights = scaled_dot_product_attention(*leaves)
    automatic = torch.autograd.grad(context, leaves, upstream)
    query, key, value = leaves
    d_value = weights.T @ upstream  # (1.8)
    d_weights = upstream @ value.T
    mean = (weights * d_weights).sum(-1, keepdim=True)
    d_scores = weights * (d_weights - mean)  # (1.10)
    d_query, d_key = d_scores @ key / 2, d_scores.T @ query / 2  # (1.11)
    for ours, theirs in zip((d_query, d_key, d_value), automatic, strict=True):
        measured(ours - theirs, 1e-12)


# dropout


@BOTH
def test_no_dropout_is_exact_and_repeatable(attend):
    query, key, value = normal(0, (4, 3), (5, 3), (5, 2))
    first = attend(query, key, value, None, 0.0)
    assert torch.equal(first, attend(query, key, value))
    assert torch.equal(first, attend(query, key, value, None, 0.0))


def test_dropout_zeroes_its_share_of_the_weights_and_scales_the_rest():
    query, key, value = normal(0, (3, 4), (5, 4), (5, 2))
    _, plain = scaled_dot_product_attention(query, key, value)
    many = [t.expand(4000, -1, -1) for t in (query, key, value)]
    torch.manual_seed(0)
    context, dropped = scaled_dot_product_attention(*many, None, 0.25)
    zero = dropped == 0
    assert abs(zero.double().mean().item() - 0.25) < 0.01
    expected = (plain / 0.75).expand_as(dropped)
    torch.testing.assert_close(dropped[~zero], expected[~zero])
    torch.testing.assert_close(context, dropped @ many[2])


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_preserves_the_expected_context(attend, masked):
    query, key, value = normal(0, (3, 4), (5, 4), (5, 2))
    mask = torch.tensor([1, 1, 0, 1, 0]).bool() if masked else None
    many = [t.expand(4000, -1, -1) for t in (query, key, value)]
    torch.manual_seed(0)
    dropped = attend(*many, mask, 0.5)
    assert dropped.std(0).min() > 0.05  # it does something
    plain = attend(query, key, value, mask)
    torch.testing.assert_close(dropped.mean(0), plain, atol=0.1, rtol=0)


# errors


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_that_is_not_bool_is_refused(attend, dtype):
    query, key, value = normal(0, (4, 3), (5, 3), (5, 2))
    with pytest.raises(TypeError, match=r"mask has dtype .*True = may attend"):
        attend(query, key, value, torch.ones(4, 5, dtype=dtype))


@BOTH
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (5, 2), (5, 2)), "query has size 3 and key 2"),
        (((4, 3), (5, 3), (6, 2)), "key has length 5 and value 6"),
        (((3,), (5, 3), (5, 2)), r"query has shape \(3,\)"),
        (((4, 3), (3,), (5, 2)), r"key has shape \(3,\)"),
        (((4, 3), (5, 3), (2,)), r"value has shape \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(attend, shapes, message):
    with pytest.raises(ValueError, match=message):
        attend(*normal(0, *shapes))


@BOTH
@pytest.mark.parametrize(
    "shape", [(5, 4), (4, 4), (3, 5), (2,), (3, 4, 5), (1, 2, 4, 5)]
)
def test_a_mask_that_does_not_broadcast_is_refused(attend, shape):
    query, key, value = normal(0, (2, 4, 3), (2, 5, 3), (2, 5, 2))
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask has shape .*\(2, 4, 5\)"):
        attend(query, key, value, mask)


@BOTH
@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_dropout_that_is_no_share_is_refused(attend, share):
    query, key, value = normal(0, (4, 3), (5, 3), (5, 2))
    with pytest.raises(ValueError, match="dropout_p is"):
        attend(query, key, value, None, share)


def test_both_paths_compile_without_a_graph_break():
    query, key, value = normal(0, (2, 4, 3), (2, 5, 3), (2, 5, 2))
    mask = torch.tensor([1, 1, 0, 1, 0]).bool()[None, None]
    for attend in (visible, fast_attention):
        compiled = torch.compile(attend, backend="eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(query, key, value, mask), attend(query, key, value, mask)
        )


# the table of weights


def test_the_table_prints_its_numbers_in_columns():
    table = attention_table(
        [[0.25, 0.75], [1, 0]], ["I", "am"], ["a", "longer"]
    )
    assert repr(table).split("\n") == [
        "        a  longer",
        " I  0.250   0.750",
        "am  1.000   0.000",
    ]


def test_the_table_shades_and_names_each_cell():
    html = attention_table([[0.25, 0.75]], ["I"], ["a", "b"])._repr_html_()
    assert html.count("<td title=") == 2
    assert 'title="I → a: 0.250"' in html
    assert 'title="I → b: 0.750"' in html
    assert ">.25</td>" in html
    assert "rgba(31,119,180,0.525)" in html  # 0.7 of 0.75
    assert '<th scope="row"' in html
    assert html.count('<th scope="col"') == 2
    assert "one row a query, one column a key.</caption>" in html
    assert "<script" not in html


def test_the_table_takes_a_caption_and_escapes_what_it_is_given():
    html = attention_table(
        [[1.0]], ["<b>"], ['"&'], caption="head <1>"
    )._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt; → &quot;&amp;: 1.000" in html
    assert ">&lt;b&gt;</th>" in html
    assert ">&quot;&amp;</span>" in html
    assert "head &lt;1&gt;</caption>" in html


def test_the_table_writes_zero_one_and_dropped_out_weights():
    html = attention_table([[0.0, 1.0, 1.25]], "q", "abc")._repr_html_()
    assert ">0</td>" in html
    assert ">1.00</td>" in html
    assert ">1.25</td>" in html
    assert html.count("rgba(31,119,180,0.700)") == 2  # no darker than this


def test_the_table_takes_arrays_and_tensors_that_require_gradients():
    weights = torch.full((1, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    array = weights.detach().float().numpy()
    words = (["q"], ["a", "b"])
    assert attention_table(weights, *words) == attention_table(array, *words)
    assert attention_table(weights, *words).weights == [[0.5, 0.5]]


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (1, 2, 3), (6,)])
def test_a_table_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"weights has shape .*\(2, 3\)"):
        attention_table(torch.ones(shape), ["a", "b"], ["c", "d", "e"])


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_a_table_of_scores_is_refused(wrong):
    with pytest.raises(ValueError, match=f"weights holds {wrong:.3g}"):
        attention_table([[0.5, wrong]], ["a"], ["b", "c"])
