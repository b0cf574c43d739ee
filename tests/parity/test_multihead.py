"""MultiHeadAttention against NumPy, torch.nn and transformers."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig as HFConfig
from transformers.models.bert.modeling_bert import BertAttention

from bertnb import BertConfig, MultiHeadAttention

SHAPES = [(8, 1, 3), (8, 2, 5), (12, 3, 4), (16, 4, 7), (6, 6, 2)]  # H, A, L


def make(hidden, heads, length, batch=2):
    torch.manual_seed(hidden * heads + length)
    config = BertConfig(hidden_size=hidden, num_attention_heads=heads)
    ours = MultiHeadAttention(config).double().eval()
    for p in ours.parameters():
        nn.init.normal_(p)
    x = torch.randn(batch, length, hidden, dtype=torch.float64)
    keep = torch.ones(batch, length, dtype=torch.bool)
    keep[-1, length // 2 + 1 :] = False  # the last sequence is padded
    return ours, x, keep


def numpy_reference(x, m, heads, mask=None):
    """Loops over heads and queries; mask (B, A, L, L) or None."""
    linear = {
        name: (p.weight.detach().numpy().T, p.bias.detach().numpy())
        for name, p in m.named_children()
    }
    q, k, v = (
        x @ linear[n][0] + linear[n][1] for n in ("query", "key", "value")
    )
    batch, length, hidden = x.shape
    d = hidden // heads
    concat = np.zeros_like(x)
    weights = np.zeros((batch, heads, length, length))
    for b in range(batch):
        for i in range(heads):
            own = slice(i * d, (i + 1) * d)
            for t in range(length):
                scores = k[b, :, own] @ q[b, t, own] / np.sqrt(d)
                if mask is not None:
                    scores = np.where(mask[b, i, t], scores, -np.inf)
                e = np.exp(scores - scores.max())
                weights[b, i, t] = e / e.sum()
                concat[b, t, own] = weights[b, i, t] @ v[b, :, own]
    return concat @ linear["output"][0] + linear["output"][1], weights


def apart(a, b):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape
    return a - b


@pytest.mark.equation("2.1", "2.2")
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_equal_the_numpy_loop_without_a_mask(shape, measured):
    ours, x, _ = make(*shape)
    out, weights = numpy_reference(x.numpy(), ours, shape[1])
    with torch.no_grad():
        got, got_weights = ours(x, output_attentions=True)
        measured(apart(got, out), 1e-11)
        measured(apart(got_weights, weights), 1e-11)
        measured(apart(ours(x)[0], out), 1e-11)


@pytest.mark.equation("2.1", "2.2")
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_equal_the_numpy_loop_with_a_mask_of_each_kind(
    shape, measured
):
    _, heads, length = shape
    ours, x, keep = make(*shape)
    generator = torch.Generator().manual_seed(1)
    any_pair = torch.rand(2, heads, length, length, generator=generator) < 0.5
    any_pair |= torch.eye(length, dtype=torch.bool)  # no empty row
    causal = torch.ones(length, length).tril().bool()[None, None]
    full = (2, heads, length, length)
    for mask in (keep[:, None, None, :], causal, any_pair):
        out, weights = numpy_reference(
            x.numpy(), ours, heads, mask.expand(full).numpy()
        )
        with torch.no_grad():
            got, got_weights = ours(x, mask, output_attentions=True)
            measured(apart(got, out), 1e-11)
            measured(apart(got_weights, weights), 1e-11)
            measured(apart(ours(x, mask)[0], out), 1e-11)


@pytest.mark.equation("2.1")
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_nn_with_copied_weights_and_so_do_the_gradients(
    shape, measured
):
    ours, x, keep = make(*shape)
    theirs = nn.MultiheadAttention(
        shape[0], shape[1], batch_first=True
    ).double()
    inner = (ours.query, ours.key, ours.value)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([p.weight for p in inner]),
            "in_proj_bias": torch.cat([p.bias for p in inner]),
            "out_proj.weight": ours.output.weight,
            "out_proj.bias": ours.output.bias,
        }
    )
    out, weights = theirs(
        x, x, x, key_padding_mask=~keep, average_attn_weights=False
    )
    got, got_weights = ours(x, keep[:, None, None, :], output_attentions=True)
    measured(apart(got, out), 1e-11)
    measured(apart(got_weights, weights), 1e-11)
    out.square().sum().backward()
    ours.zero_grad()
    ours(x, keep[:, None, None, :])[0].square().sum().backward()
    grads = torch.cat([p.weight.grad for p in inner])
    measured(apart(grads, theirs.in_proj_weight.grad), 1e-9)
    measured(apart(ours.output.weight.grad, theirs.out_proj.weight.grad), 1e-9)


@pytest.mark.equation("2.1", "2.2")
@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers_in_float32(
    shape, implementation, direction, measured
):
    ours, x, keep = make(*shape)
    ours, x = ours.float(), x.float()
    hf_config = HFConfig(
        hidden_size=shape[0],
        num_attention_heads=shape[1],
        attn_implementation=implementation,
    )
    theirs = BertAttention(hf_config).eval()
    pairs = [
        (ours.query, theirs.self.query),
        (ours.key, theirs.self.key),
        (ours.value, theirs.self.value),
        (ours.output, theirs.output.dense),
    ]
    for mine, other in pairs:
        if direction == "ours to theirs":
            other.load_state_dict(mine.state_dict())
        else:
            mine.load_state_dict(other.state_dict())
    mask = keep[:, None, None, :]
    added = torch.zeros(mask.shape).masked_fill(
        ~mask, torch.finfo(torch.float32).min
    )
    with torch.no_grad():
        context, weights = theirs.self(x, added)
        out = theirs.output.dense(context)
        got, got_weights = ours(x, mask, output_attentions=True)
        scale = max(1.0, float(out.abs().max()))
        measured(apart(got, out) / scale, 1e-5)
        measured(apart(ours(x, mask)[0], out) / scale, 1e-5)
        if implementation == "eager":
            measured(apart(got_weights, weights), 1e-5)


@pytest.mark.equation("2.5")
def test_one_fused_projection_gives_the_same_queries_keys_and_values(measured):
    ours, x, _ = make(12, 3, 4)
    inner = (ours.query, ours.key, ours.value)
    fused = nn.Linear(12, 36).double()
    with torch.no_grad():
        fused.weight.copy_(torch.cat([p.weight for p in inner]))
        fused.bias.copy_(torch.cat([p.bias for p in inner]))
        for part, p in zip(fused(x).chunk(3, dim=-1), inner, strict=True):
            measured(apart(part, p(x)), 1e-11)
