"""Attention against NumPy, torch.nn and Hugging Face with copied weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bertnb.attention import fast_attention, scaled_dot_product_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 and bfloat16: about 30 and 4 units in the last place of numbers near 1
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3e-2}
MASKS = ["none", "padding", "rows", "full", "heads", "one row", "queries"]


def inputs(
    dtype=torch.float64, batch=(2, 3), length=5, width=7, d=8, d_v=6, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*batch, length, d), (*batch, width, d), (*batch, width, d_v))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .requires_grad_()
        for shape in shapes
    ]


def make_mask(kind, length=5, width=7, seed=1):
    """Return a mask in which some queries of some kinds have no key."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "padding": (2, 1, 1, width),
        "rows": (length, width),
        "full": (2, 3, length, width),
        "heads": (3, 1, width),
        "one row": (width,),
        "queries": (length, 1),
    }[kind]
    mask = torch.rand(shape, generator=generator) < 0.6
    if kind in ("rows", "full"):
        mask[..., 2, :] = False  # a query without keys
    if kind == "padding":
        mask[1] = False  # a row of padding
    return mask.to(DEVICE)


def numpy_attention(query, key, value, mask):
    """Transcribe (1.3), (1.7) and (1.1), one number at a time."""
    q, k, v = (t.detach().double().cpu().numpy() for t in (query, key, value))
    batch, (length, d), width = q.shape[:-2], q.shape[-2:], k.shape[-2]
    allowed = np.ones((*batch, length, width), dtype=bool)
    if mask is not None:
        allowed = np.broadcast_to(mask.cpu().numpy(), allowed.shape)
    weights = np.zeros(allowed.shape)
    context = np.zeros((*batch, length, v.shape[-1]))
    for place in np.ndindex(*batch, length):
        keys = [j for j in range(width) if allowed[(*place, j)]]
        vectors, values = k[place[:-1]], v[place[:-1]]
        exps = {j: np.exp(q[place] @ vectors[j] / np.sqrt(d)) for j in keys}
        for j in keys:
            weights[(*place, j)] = exps[j] / sum(exps.values())
            context[place] += weights[(*place, j)] * values[j]
    return context, weights


def largest(one, other):
    one, other = (
        torch.as_tensor(t).detach().double().cpu() for t in (one, other)
    )
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.mark.equation("1.1", "1.3", "1.5", "1.7")
@pytest.mark.parametrize("kind", MASKS)
def test_context_and_weights_equal_a_numpy_transcription(kind, measured):
    query, key, value = inputs()
    mask = make_mask(kind)
    context, weights = scaled_dot_product_attention(query, key, value, mask)
    expected_context, expected_weights = numpy_attention(
        query, key, value, mask
    )
    measured(largest(context, expected_context), 1e-12)
    measured(largest(weights, expected_weights), 1e-12)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fast_attention_equals_the_visible_path(dtype, kind):
    query, key, value = inputs(dtype)
    mask = make_mask(kind)
    visible, _ = scaled_dot_product_attention(query, key, value, mask)
    fast = fast_attention(query, key, value, mask)
    assert fast.dtype == visible.dtype == dtype
    assert largest(fast, visible) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_both_paths_have_the_gradients_of_float64(dtype, kind):
    mask = make_mask(kind)
    upstream = torch.randn(
        2, 3, 5, 6, generator=torch.Generator().manual_seed(2)
    )

    def gradients(attend, kind):
        leaves = inputs(kind)
        context = attend(*leaves, mask)
        return torch.autograd.grad(context, leaves, upstream.to(context))

    def visible(*given):
        return scaled_dot_product_attention(*given)[0]

    exact = gradients(visible, torch.float64)
    for attend in (visible, fast_attention):
        for gradient, expected in zip(
            gradients(attend, dtype), exact, strict=True
        ):
            assert gradient.isfinite().all()
            scale = 1 + expected.abs().max().item()
            assert largest(gradient, expected) < 2 * TOLERANCE[dtype] * scale


@pytest.mark.parametrize("kind", ["none", "heads"])
def test_context_equals_torch_where_every_query_has_a_key(kind):
    query, key, value = inputs()
    mask = make_mask(kind)
    context, _ = scaled_dot_product_attention(query, key, value, mask)
    theirs = F.scaled_dot_product_attention(query, key, value, mask)
    assert largest(context, theirs) < 1e-12


@pytest.mark.equation("1.2", "1.4")
def test_equals_torch_multihead_attention_with_copied_weights(measured):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    w_q, w_k, w_v = torch.randn(3, 8, 8, dtype=torch.float64)
    padding = torch.arange(6) < torch.tensor([[6], [4]])
    layer = torch.nn.MultiheadAttention(
        8, num_heads=1, bias=False, batch_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat([w_q.T, w_k.T, w_v.T]))
        layer.out_proj.weight.copy_(torch.eye(8))
    theirs, their_weights = layer(x, x, x, key_padding_mask=~padding)
    context, weights = scaled_dot_product_attention(
        x @ w_q, x @ w_k, x @ w_v, padding[:, None, :]
    )
    measured(largest(context, theirs), 1e-12)
    measured(largest(weights, their_weights), 1e-12)


@pytest.mark.equation("1.5", "1.7")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_hugging_face_bert_with_copied_weights(implementation, measured):
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8,
        num_attention_heads=1,
        attn_implementation=implementation,
    )
    bert = BertSelfAttention(config).double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    padding = torch.arange(6) < torch.tensor([[6], [4]])
    mask = padding[:, None, None, :]
    if implementation == "eager":
        added = torch.zeros(mask.shape, dtype=x.dtype)
        mask = added.masked_fill(~mask, torch.finfo(x.dtype).min)
    theirs, their_weights = bert(x, attention_mask=mask)
    context, weights = scaled_dot_product_attention(
        bert.query(x), bert.key(x), bert.value(x), padding[:, None, :]
    )
    measured(largest(context, theirs), 1e-12)
    if implementation == "eager":
        measured(largest(weights, their_weights[:, 0]), 1e-12)


def test_the_worked_sentence_gives_the_numbers_done_by_hand():
    query = torch.tensor([[2.0, 1.0]])
    key = torch.tensor([[1.0, 0], [0, -1], [0, 1], [1, 1], [0, 0]])
    value = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [1, 2]])
    context, weights = scaled_dot_product_attention(query, key, value)
    assert [f"{w:.3f}" for w in weights[0].tolist()] == [
        "0.257",
        "0.031",
        "0.127",
        "0.522",
        "0.063",
    ]
    assert [f"{c:.3f}" for c in context[0].tolist()] == ["1.491", "0.805"]
