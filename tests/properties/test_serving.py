"""What holds of the int8 copy and of the exported file, whatever the weights."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL, config_for, tokenizer_of
from torch import nn

from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertnbError,
    Int8Linear,
    embed,
    export_onnx,
    fill_mask,
    quantize,
)

few = settings(max_examples=20, deadline=None)
WORDS = "the a cat dog sat ran on mat and sun moon over under up down".split()
PIECES = [*SPECIAL, *WORDS, "##s"]
TOKENIZER = tokenizer_of(" ".join([*WORDS, "##s"]))
TINY = config_for(
    TOKENIZER,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    hidden_dropout_prob=0.5,
    attention_probs_dropout_prob=0.5,
)
TEXTS = ["the cat sat on the mat", "dogs", "", "the sun and the moon"]
HEADS = [
    (BertModel, {}),
    (BertForPreTraining, {}),
    (BertForMaskedLM, {}),
    (BertForNextSentencePrediction, {}),
    (BertForSequenceClassification, {"labels": ["bad", "good", "so so"]}),
    (BertForTokenClassification, {"labels": ["O", "B-x", "I-x"]}),
    (BertForQuestionAnswering, {}),
]


def seeded(kind, config=TINY, **head):
    torch.manual_seed(0)
    return kind(config, **head).eval()


def int8(size_in, size_out, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(size_in, size_out)
    return linear, Int8Linear(linear).eval()


@few
@given(
    st.integers(2, 40),
    st.integers(1, 9),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    st.floats(-50, 50),
)
def test_a_layer_is_within_the_bound_of_its_steps(size, rows, scale, shift):
    linear, small = int8(size, 7, seed=size)
    x = (torch.randn(rows, size) + shift) * scale
    step = (x.amax(1) - x.amin(1)) / 254
    weight_step = linear.weight.abs().amax(1) / 127
    by_x = step[:, None] / 2 * linear.weight.abs().sum(1)
    by_w = weight_step / 2 * (x.abs() + step[:, None] / 2).sum(1)[:, None]
    expected = x.double() @ linear.weight.double().T + linear.bias.double()
    slack = 1e-5 * expected.abs() + 1e-6
    assert ((small(x) - expected).abs() <= by_x + by_w + slack).all()


def test_many_tokens_are_as_few():
    _, small = int8(6, 3)
    x = torch.randn(3, 100, 6)
    alone = torch.stack([small(row) for row in x])
    torch.testing.assert_close(small(x), alone, atol=1e-6, rtol=0)


def test_leading_dimensions_and_dtype_are_kept():
    _, small = int8(6, 3)
    x = torch.randn(2, 5, 6)
    assert small(x).shape == (2, 5, 3)
    assert torch.equal(small(x)[1, 4], small(x[1, 4:])[0])
    assert small(x.bfloat16()).dtype == torch.bfloat16
    assert small(x[:, :0]).shape == (2, 0, 3)
    assert (small.in_features, small.out_features) == (6, 3)


def test_equal_numbers_and_zeros_are_exact():
    linear, small = int8(8, 3)
    for value in (0.0, 4.0, 1e6):
        x = torch.full((1, 8), value)
        whole = small.weight.float() * small.scale[:, None]
        torch.testing.assert_close(
            small(x), x @ whole.T + linear.bias, atol=1e-5, rtol=1e-5
        )
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(Int8Linear(linear).eval()(x)[0], linear.bias)
    without = nn.Linear(8, 3, bias=False)
    assert (Int8Linear(without).eval()(torch.zeros(1, 8)) == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(bad):
    _, small = int8(8, 3)
    x = torch.randn(3, 8)
    x[1, 2] = bad
    found = small(x)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


def test_weights_that_are_not_finite_are_refused():
    model = seeded(BertModel)
    with torch.no_grad():
        model.encoder.layer[1].attention.key.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantize(model)


def test_the_model_is_left_alone_and_only_layers_change():
    model = seeded(BertForPreTraining).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = quantize(model)
    assert type(small) is BertForPreTraining
    assert model.training
    assert not any(m.training for m in small.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    kinds = {n: type(m) for n, m in small.named_modules() if "drop" not in n}
    layers = [n for n, kind in kinds.items() if kind is Int8Linear]
    assert len(layers) == 2 * 6
    assert all(n.startswith("bert.encoder.layer.") for n in layers)
    left = [n for n, kind in kinds.items() if kind is nn.Linear]
    assert left == ["bert.pooler.dense", "masked_lm.dense", "next_sentence"]
    assert not any(p.requires_grad for p in small.parameters())
    shared = {p.data_ptr() for p in model.parameters()}
    assert not shared & {p.data_ptr() for p in small.parameters()}


def test_the_result_is_near_but_not_the_same():
    model = seeded(BertModel)
    exact, near = (embed(m, TOKENIZER, TEXTS) for m in (model, quantize(model)))
    off = (near - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.03


def test_neighbours_and_padding_change_nothing():
    small = quantize(seeded(BertModel))
    alone = torch.cat([embed(small, TOKENIZER, [text]) for text in TEXTS])
    together = embed(small, TOKENIZER, TEXTS, batch_size=4)
    # a step a token; the attention's last bits may move a number over a half
    torch.testing.assert_close(together, alone, atol=5e-3, rtol=0)


def test_blanks_are_filled_and_a_second_copy_is_the_same():
    model = seeded(BertForMaskedLM)
    small = quantize(model)
    text = "the [MASK] sat"
    ours, theirs = (fill_mask(m, TOKENIZER, text, 3) for m in (small, model))
    assert {f["token"] for f in ours} & {f["token"] for f in theirs}
    assert fill_mask(quantize(small), TOKENIZER, text, 3) == ours


def test_sixteen_bits_become_float32_outside_the_layers():
    small = quantize(seeded(BertModel).bfloat16())
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert embed(small, TOKENIZER, TEXTS).isfinite().all()


def test_it_can_be_neither_trained_nor_saved(tmp_path):
    small = quantize(seeded(BertForMaskedLM))
    with pytest.raises(BertnbError, match=r"cannot be saved: save the model"):
        small.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    small.train()
    with pytest.raises(BertnbError, match=r"cannot be trained: train the"):
        small(torch.tensor([[2, 5, 3]]))


@pytest.mark.parametrize("function", [quantize, export_onnx])
def test_what_is_no_bert_is_named(function, tmp_path):
    rest = () if function is quantize else (tmp_path / "x.onnx",)
    with pytest.raises(TypeError, match=r"model.*Linear.*BertModel"):
        function(nn.Linear(2, 2), *rest)
    assert not list(tmp_path.iterdir())


# ONNX


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("onnx")
    return pytest.importorskip("onnxruntime")


def run(runtime, file, ids, mask, segments):
    session = runtime.InferenceSession(
        str(file), providers=["CPUExecutionProvider"]
    )
    named = zip(
        ("input_ids", "attention_mask", "token_type_ids"),
        (ids, mask, segments),
        strict=True,
    )
    values = session.run(None, {k: v.numpy() for k, v in named})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


@pytest.mark.parametrize(("kind", "head"), HEADS)
def test_every_head_is_the_same_outside(runtime, tmp_path, kind, head):
    model = seeded(kind, **head)
    file = tmp_path / "new" / "model.onnx"
    assert export_onnx(model, file) < 1e-5
    assert [f.name for f in file.parent.iterdir()] == ["model.onnx"]
    for rows, length in ((1, 1), (2, 16), (4, 5)):
        ids = torch.randint(len(PIECES), (rows, length))
        mask = (torch.arange(length) < torch.randint(0, 17, (rows, 1))).long()
        segments = torch.randint(2, (rows, length))
        found = run(runtime, file, ids, mask, segments)
        with torch.no_grad():
            expected = vars(model(ids, mask, segments))
        wanted = {k for k, v in expected.items() if isinstance(v, torch.Tensor)}
        assert set(found) == wanted
        for name, value in found.items():
            torch.testing.assert_close(
                value, expected[name], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu", "tanh"])
def test_every_activation_is_written(runtime, tmp_path, act):
    config = BertConfig(**{**TINY.to_dict(), "hidden_act": act})
    assert export_onnx(seeded(BertForMaskedLM, config), tmp_path / "x") < 1e-5


def test_the_configuration_and_its_labels_are_in_the_file(runtime, tmp_path):
    head = {"labels": ["bad", "good"]}
    model = seeded(BertForSequenceClassification, **head)
    export_onnx(model, tmp_path / "x.onnx")
    session = runtime.InferenceSession(str(tmp_path / "x.onnx"))
    kept = json.loads(session.get_modelmeta().custom_metadata_map["config"])
    assert kept["hidden_size"] == 24
    assert kept["id2label"] == {"0": "bad", "1": "good"}


def test_a_row_that_is_too_long_is_an_error_there_too(runtime, tmp_path):
    file = tmp_path / "x.onnx"
    export_onnx(seeded(BertModel), file)
    ids = torch.ones(1, 17, dtype=torch.long)
    with pytest.raises(Exception, match=r"17|16"):
        run(runtime, file, ids, ids, 0 * ids)


def test_a_file_that_differs_is_not_written(runtime, tmp_path, monkeypatch):
    from bertnb import onnx_export

    file = tmp_path / "x.onnx"
    file.write_text("the one before")
    monkeypatch.setattr(onnx_export, "ONNX_BOUND", -1.0)
    with pytest.raises(BertnbError, match=r"last_hidden_state.*differs"):
        export_onnx(seeded(BertModel), file)
    assert file.read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_exported_is_named(tmp_path):
    model = seeded(BertModel)
    file = tmp_path / "x.onnx"
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_onnx(model, tmp_path)
    with pytest.raises(TypeError, match=r"int8 model: export the model"):
        export_onnx(quantize(model), file)
    with pytest.raises(TypeError, match=r"bfloat16.*float32"):
        export_onnx(seeded(BertModel).bfloat16(), file)
    strange = nn.Module()
    strange.bert = model
    with pytest.raises(TypeError, match=r"head is unknown.*model\.bert"):
        export_onnx(strange, file)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(BertnbError, match=rf"{name} is not.*pip inst"):
                export_onnx(seeded(BertModel), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
