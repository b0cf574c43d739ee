"""Differences between implementations that no chapter's own test measures.

Each name says a rule of ../shared/pitfalls.md; book/errata.md names the tests.
"""

import math
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import layer_norm as fused_layer_norm
from torch.nn.functional import scaled_dot_product_attention as fused_attention

from bertnb.attention import scaled_dot_product_attention
from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.layers import initialize, layer_norm
from bertnb.masked_lm import mask_tokens, masked_lm_loss
from bertnb.optimization import linear_warmup_decay

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
}


def home_made_layer_norm(x):
    """As in The Annotated Transformer: unbiased, eps outside the root."""
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (deviation + 1e-6)


@pytest.mark.parametrize(("size", "off"), [(768, 0.0025), (8, 0.1)])
def test_a_home_made_layer_norm_is_off(size, off):
    torch.manual_seed(0)
    x = torch.randn(4000, size, dtype=torch.float64)
    one, zero = torch.ones(size).double(), torch.zeros(size).double()
    ours = layer_norm(x, one, zero, 1e-12)
    exact = fused_layer_norm(x, (size,), eps=1e-12)
    assert (ours - exact).abs().max() < 1e-12
    assert off < (home_made_layer_norm(x) - exact).abs().max() < 3 * off


def test_the_epsilon_of_the_norm_is_zero_in_half_precision():
    assert torch.tensor(1e-12).half() == 0
    row = torch.full((1, 8), 3.0, dtype=torch.float16)
    one, zero = torch.ones(8).half(), torch.zeros(8).half()
    norm = nn.LayerNorm(8, eps=1e-12).half()
    assert torch.equal(norm(row), zero[None])  # computed in float32
    deviation = (row.var(-1, unbiased=False) + 1e-12).half().sqrt()
    assert ((row - row.mean()) / deviation * one).isnan().all()


def test_a_normal_draw_is_not_cut_unless_the_bounds_are_given():
    torch.manual_seed(0)
    loose = nn.init.trunc_normal_(torch.empty(500_000), std=0.02)
    assert loose.abs().max() > 4 * 0.02  # the bounds are -2 and 2, not 2 sigma
    ours = nn.Linear(1000, 500)
    initialize(ours, 0.02)
    assert ours.weight.abs().max() <= 0.04
    assert ours.weight.std().item() == pytest.approx(0.0176, abs=0.0001)


def test_transformers_does_not_cut_and_zeroes_the_padding_row():
    torch.manual_seed(0)
    config = {**SIZES, "vocab_size": 5_000, "initializer_range": 0.02}
    theirs = transformers.BertModel(transformers.BertConfig(**config))
    table = theirs.embeddings.word_embeddings.weight
    assert table.abs().max() > 4 * 0.02
    assert not table[0].any()
    ours = BertModel(BertConfig(**config)).embeddings
    (weight,) = (p for p in ours.parameters() if len(p) == 5_000)
    assert weight.abs().max() <= 0.04
    assert weight[0].any()


def test_four_ways_to_hide_every_key_have_four_results():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 8)
    scores = q @ k.mT / 8**0.5
    plain = scores.softmax(-1)
    nothing = torch.zeros(1, 5, 5, dtype=torch.bool)
    original = (scores - 10_000.0).softmax(-1)
    assert torch.allclose(original, plain, atol=1e-2)  # as without a mask
    lowest = (scores + torch.finfo(torch.float32).min).softmax(-1)
    assert torch.allclose(lowest, torch.full_like(lowest, 0.2))
    assert (scores - math.inf).softmax(-1).isnan().all()
    assert not fused_attention(q, k, v, attn_mask=nothing).any()
    context, weights = scaled_dot_product_attention(q, k, v, nothing)
    assert not context.any()  # our contract: 0
    assert not weights.any()


def test_minus_10000_leaves_a_hidden_key_without_weight_in_float32():
    scores = torch.tensor([3.0, -2.0, 9.0 - 10_000.0]).softmax(-1)
    assert scores[2] == 0  # so it does hide, as long as one key is left


def test_a_large_negative_number_overflows_in_half_precision():
    assert torch.tensor(-1e9).half().isinf()
    assert torch.tensor(-1e4).half().isfinite()


def test_rows_of_padding_differ_between_the_kernels_of_transformers():
    torch.manual_seed(0)
    eager, fused = (
        transformers.BertModel._from_config(
            transformers.BertConfig(**SIZES), attn_implementation=kernel
        ).eval()
        for kernel in ("eager", "sdpa")
    )
    fused.load_state_dict(eager.state_dict())
    ids = torch.randint(1, 40, (2, 6))
    mask = torch.tensor([[1] * 6, [0] * 6])
    with torch.no_grad():
        a, b = (
            m(ids, attention_mask=mask).last_hidden_state
            for m in (eager, fused)
        )
    assert (a[0] - b[0]).abs().max() < 1e-5
    assert (a[1] - b[1]).abs().max() > 1e-3


@pytest.mark.parametrize("left_out", ["attention_mask", "token_type_ids"])
def test_what_is_left_out_of_a_call_changes_the_answer_silently(left_out):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    inputs = {
        "input_ids": torch.randint(1, 40, (1, 8)),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 3]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]]),
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model(**inputs).last_hidden_state[:, :5]
        del inputs[left_out]
        less = model(**inputs).last_hidden_state[:, :5]
    assert (whole - less).abs().max() > 1e-2


def test_the_originals_small_number_in_the_loss_shrinks_it_a_little():
    torch.manual_seed(0)
    logits, targets = torch.randn(20, 50), torch.randint(50, (20,))
    ours = masked_lm_loss(logits, targets)
    original = ours * 20 / (20 + 1e-5)
    assert 0 < (ours - original) / ours < 1e-6


@pytest.mark.parametrize(("length", "most"), [(128, 20), (512, 77)])
def test_the_originals_places_are_as_many_as_a_full_row_needs(length, most):
    torch.manual_seed(0)
    ids = torch.randint(5, 40, (2, length))
    ids[:, 0], ids[:, -1] = 2, 3
    _, positions, labels = mask_tokens(
        ids, ids < 5, vocab_size=40, mask_token_id=4
    )
    assert positions.shape == labels.shape
    assert most - 1 <= (labels != -100).sum(1).max() <= most


def ratio(t):
    """The original's step by that of corrected Adam, for a steady gradient."""
    return (1 - 0.9**t) / math.sqrt(1 - 0.999**t)


def test_without_bias_correction_the_first_steps_are_three_to_six_times_long():
    assert ratio(1) == pytest.approx(3.16, abs=0.005)
    assert ratio(12) == pytest.approx(6.57, abs=0.005)
    assert max(range(1, 5000), key=ratio) == 12
    assert ratio(100) == pytest.approx(3.24, abs=0.005)
    within = next(t for t in range(13, 9999) if abs(ratio(t) - 1) < 0.01)
    assert within == pytest.approx(3925, abs=5)


def original_rate(step, warmup, total):
    """optimization.py:32-54, as a share of the peak."""
    return step / warmup if step < warmup else 1 - step / total


@pytest.mark.parametrize(("warmup", "fall"), [(10, 0.01), (100, 0.1)])
def test_the_originals_rate_falls_where_the_warm_up_ends(warmup, fall):
    total = 1000
    assert original_rate(0, warmup, total) == 0
    before = original_rate(warmup - 1, warmup, total)
    after = original_rate(warmup, warmup, total)
    assert after == pytest.approx(1 - fall)
    assert linear_warmup_decay(warmup, warmup, total) == 1  # ours: the peak
    assert linear_warmup_decay(0, warmup, total) == 0
    if warmup == 100:
        assert 5e-5 * before == pytest.approx(4.95e-5)
        assert 5e-5 * after == pytest.approx(4.5e-5)


def test_transformers_5_has_no_adamw_and_writes_no_pickle(tmp_path):
    assert not hasattr(transformers, "AdamW")
    config = transformers.BertConfig(**SIZES)
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert not hasattr(transformers, "TFBertModel")
    assert not hasattr(transformers, "SquadV1Processor")
    with pytest.raises(KeyError, match="question-answering"):
        transformers.pipeline("question-answering", model=str(tmp_path))


def test_transformers_gives_weights_with_the_eager_kernel_only():
    config = transformers.BertConfig(**SIZES)
    ids = torch.ones(1, 4, dtype=torch.long)
    eager = transformers.BertModel._from_config(
        config, attn_implementation="eager"
    )
    found = eager(ids, output_attentions=True).attentions
    assert len(found) == 2
    assert found[0].shape == (1, 2, 4, 4)
