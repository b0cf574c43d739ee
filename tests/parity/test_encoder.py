"""BertModel against NumPy, torch.nn and transformers."""

import tempfile
from math import erf

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bertnb import BertConfig, BertLayer, BertModel, hf_name, parameter_count
from bertnb.configuration import HIDDEN_ACTS

transformers.utils.logging.disable_progress_bar()
WANTED = {"output_hidden_states": True, "output_attentions": True}


def randomize(model):
    """Give every parameter its own numbers: no two of them can be swapped."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "orm.weight" in name:
            parameter.data += 1
    return model.eval()


def batch_of(config, rows, length, generator):
    """Random ids and segments; each row is padded after a random length."""
    g = generator
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    shape = (rows, length)
    return {
        "input_ids": torch.randint(config.vocab_size, shape, generator=g),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "token_type_ids": torch.randint(
            config.type_vocab_size, shape, generator=g
        ),
    }


def close(ours, theirs, bound=1e-5):
    return (ours - theirs).abs().max() <= bound


@st.composite
def cases(draw):
    heads = draw(st.integers(1, 4))
    config = BertConfig(
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=heads * draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 40)),
        hidden_act=draw(st.sampled_from(HIDDEN_ACTS)),
        max_position_embeddings=draw(st.integers(14, 20)),
        type_vocab_size=draw(st.integers(1, 3)),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 0.1])),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch = batch_of(
        config, draw(st.integers(1, 3)), draw(st.integers(1, 14)), g
    )
    for name in ("attention_mask", "token_type_ids"):
        if draw(st.booleans()) and draw(st.booleans()):
            del batch[name]
    return config, batch, g.initial_seed()


@pytest.mark.equation("6.2", "6.3", "6.4")
@settings(max_examples=25, deadline=None)
@given(cases())
def test_states_weights_and_pooled_vector_equal_transformers(measured, case):
    config, batch, seed = case
    torch.manual_seed(seed)
    ours = randomize(BertModel(config))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.BertModel.from_pretrained(
            folder, attn_implementation="eager"
        )
        theirs.save_pretrained(folder)
        back = BertModel.from_pretrained(folder)
    # a vector of one or two numbers is normalised to a sign: no bound holds
    bound = 1e-5 if config.hidden_size > 4 else 1e-3
    with torch.no_grad():
        a, b, c = (m(**batch, **WANTED) for m in (ours, theirs, back))
        fast = ours(**batch)
    assert torch.equal(a.last_hidden_state, c.last_hidden_state)
    assert torch.equal(a.pooler_output, c.pooler_output)
    measured(fast.last_hidden_state - b.last_hidden_state, bound)
    measured(a.pooler_output - b.pooler_output, bound)
    for field in ("hidden_states", "attentions"):
        assert len(getattr(a, field)) == len(getattr(b, field))
        for one, two in zip(getattr(a, field), getattr(b, field), strict=True):
            assert one.shape == two.shape
            measured(one - two, bound)


@settings(max_examples=15, deadline=None)
@given(cases())
def test_every_gradient_equals_transformers(case):
    config, batch, seed = case
    batch["input_ids"].clamp_(min=1)  # their [PAD] row gets no gradient
    torch.manual_seed(seed)
    theirs = randomize(
        transformers.BertModel(transformers.BertConfig(**config.to_dict()))
    ).double()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = BertModel.from_pretrained(folder).double()
    ours.load_hf_weights(theirs.state_dict(), "theirs")
    a, b = ours(**batch), theirs(**batch)
    g = torch.Generator().manual_seed(seed)
    towards = torch.randn(a.last_hidden_state.shape, generator=g).double()
    for out in (a, b):
        loss = (out.last_hidden_state * towards).mean()
        (loss + (out.pooler_output * towards[:, 0]).mean()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients[hf_name(name)]
        assert close(parameter.grad, expected, 1e-5), name


def test_gradients_in_single_precision_equal_transformers():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    theirs = randomize(
        transformers.BertModel(transformers.BertConfig(**config.to_dict()))
    )
    ours = BertModel(config).eval()
    ours.load_hf_weights(theirs.state_dict(), "theirs")
    batch = batch_of(config, 3, 12, torch.Generator().manual_seed(0))
    batch["input_ids"].clamp_(min=1)
    towards = torch.randn(3, 12, 32)
    for model in (ours, theirs):
        out = model(**batch)
        loss = (out.last_hidden_state * towards).mean()
        (loss + (out.pooler_output * towards[:, 0]).mean()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert close(parameter.grad, gradients[hf_name(name)]), name


def numpy_bert(p, config, ids, mask, segments):
    """Equations (5.1), (2.1), (6.1), (6.2), (6.3), row by row, in float64."""

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def table(name, index):
        return p[f"embeddings.{name}_embeddings.weight"][index]

    gelu = np.vectorize(lambda h: h * (1 + erf(h / 2**0.5)) / 2)
    states, pooled = [], []
    for row, keep, kind in zip(ids, mask, segments, strict=True):
        x = table("word", row) + table("token_type", kind)
        x = norm("embeddings.LayerNorm", x + table("position", range(len(row))))
        for n in range(config.num_hidden_layers):
            at = f"encoder.layer.{n}"
            q, k, v = (
                linear(f"{at}.attention.{name}", x)
                for name in ("query", "key", "value")
            )
            context = []
            for h in range(config.num_attention_heads):
                own = slice(h * config.head_size, (h + 1) * config.head_size)
                scores = q[:, own] @ k[:, own].T / config.head_size**0.5
                scores = np.where(keep, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                context.append(e / e.sum(-1, keepdims=True) @ v[:, own])
            attended = linear(
                f"{at}.attention.output", np.concatenate(context, axis=-1)
            )
            y = norm(f"{at}.attention_norm", x + attended)
            inner = gelu(linear(f"{at}.feed_forward.intermediate", y))
            out = linear(f"{at}.feed_forward.output", inner)
            x = norm(f"{at}.output_norm", y + out)
        states.append(x)
        pooled.append(np.tanh(linear("pooler.dense", x[0])))
    return np.stack(states), np.stack(pooled)


@pytest.mark.equation("6.1", "6.2", "6.3", "6.4")
@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_the_model_equals_a_numpy_transcription(eps, measured):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=10,
        max_position_embeddings=9,
        layer_norm_eps=eps,
    )
    model = randomize(BertModel(config)).double()
    batch = batch_of(config, 4, 9, torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(**batch)
    numbers = {name: p.numpy() for name, p in model.state_dict().items()}
    mask = batch["attention_mask"].bool().numpy()
    ids, segments = (
        batch[name].numpy() for name in ("input_ids", "token_type_ids")
    )
    states, pooled = numpy_bert(numbers, config, ids, mask, segments)
    measured(out.last_hidden_state - torch.from_numpy(states), 1e-11)
    measured(out.pooler_output - torch.from_numpy(pooled), 1e-11)


@pytest.mark.equation("6.1")
@pytest.mark.parametrize(("act", "name"), [("gelu", "gelu"), ("relu", "relu")])
def test_a_layer_equals_torch_nn(act, name, measured):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=12,
        num_attention_heads=3,
        intermediate_size=20,
        hidden_act=act,
        layer_norm_eps=1e-3,
    )
    ours = randomize(BertLayer(config)).double()
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, activation=name, layer_norm_eps=1e-3, batch_first=True
    )
    theirs.double().eval()
    qkv = [getattr(ours.attention, n) for n in ("query", "key", "value")]
    modules = {
        "self_attn.out_proj": ours.attention.output,
        "linear1": ours.feed_forward.intermediate,
        "linear2": ours.feed_forward.output,
        "norm1": ours.attention_norm,
        "norm2": ours.output_norm,
    }
    weights = {
        f"{name}.{kind}": getattr(module, kind)
        for name, module in modules.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        weights[f"self_attn.in_proj_{kind}"] = torch.cat(
            [getattr(m, kind) for m in qkv]
        )
    theirs.load_state_dict(weights)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 4:] = False
    with torch.no_grad():
        a = ours(x, keep[:, None, None])[0]
        b = theirs(x, src_key_padding_mask=~keep)
    measured(a[keep] - b[keep], 1e-11)


@pytest.mark.equation("6.5")
@pytest.mark.parametrize(
    ("layers", "size", "total"),
    [
        (2, 128, 4_385_920),
        (4, 256, 11_170_560),
        (4, 512, 28_763_648),
        (8, 512, 41_373_184),
        (12, 768, 109_482_240),
        (24, 1024, 335_141_888),
    ],
)
def test_the_published_sizes(layers, size, total):
    config = BertConfig(
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=size // 64,
        intermediate_size=4 * size,
    )
    with torch.device("meta"):
        ours = BertModel(config)
        theirs = transformers.BertModel(
            transformers.BertConfig(**config.to_dict())
        )
    assert parameter_count(config)["total"] == total
    for model in (ours, theirs):
        assert sum(p.numel() for p in model.parameters()) == total
