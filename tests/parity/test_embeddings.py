"""The embeddings equal NumPy in float64 and Hugging Face's, with its weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig as HFConfig
from transformers.models.bert import modeling_bert

from bertnb import BertConfig, BertEmbeddings

VOCABULARIES = Path(__file__).parents[3] / "shared" / "data" / "vocabs"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
    # unlike the rate of the attention, so that the right one must be used
    "hidden_dropout_prob": 0.4,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 0.3,
}


def both(**changes):
    """Return our module and Hugging Face's with the same random weights."""
    sizes = {**SIZES, **changes}
    ours = BertEmbeddings(BertConfig(**sizes)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    theirs = modeling_bert.BertEmbeddings(HFConfig(**sizes)).double()
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def batch(rows=3, length=7, seed=0):
    """Return random token, segment and place ids, without [PAD]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(low, high, (rows, length), generator=generator)
        for low, high in ((1, 40), (0, 3), (0, 16))
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.equation("3.3", "5.1")
def test_the_formula_in_numpy(measured):
    module, _ = both()
    tokens, segments, places = batch()
    with torch.no_grad():
        ours = module(tokens, segments, places)
    weights = {k: v.numpy() for k, v in module.state_dict().items()}
    z = (
        weights["word_embeddings.weight"][tokens]
        + weights["token_type_embeddings.weight"][segments]
        + weights["position_embeddings.weight"][places]
    )
    z = z - z.mean(-1, keepdims=True)
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 0.3)
    z = z * weights["LayerNorm.weight"] + weights["LayerNorm.bias"]
    assert ours.shape == z.shape
    measured(ours - torch.tensor(z), 1e-12)


@pytest.mark.equation("5.1")
@given(
    heads=st.integers(1, 3),
    head_size=st.integers(1, 5),
    rows=st.integers(1, 3),
    length=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_hugging_face_gives_the_same(
    measured, heads, head_size, rows, length, seed
):
    ours, theirs = both(
        hidden_size=heads * head_size, num_attention_heads=heads
    )
    ids = batch(rows, length, seed)
    for given_ids in (ids[:1], ids[:2], ids):
        measured(ours(*given_ids) - theirs(*given_ids), 1e-12)


def test_hugging_face_drops_the_same_numbers_in_training():
    ours, theirs = both()
    tokens, segments, _ = batch()
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(module.train()(tokens, segments))
    assert 0.2 < (results[0] == 0).double().mean() < 0.6
    close(*results)


def test_gradients_are_hugging_face_s():
    ours, theirs = both()
    arguments = batch()
    arriving = torch.randn(3, 7, 12, dtype=torch.float64)
    for module in (ours, theirs):
        (module(*arguments) * arriving).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name].grad)


@pytest.mark.equation("5.3")
def test_bert_base_has_23_837_184_parameters_here():
    with torch.device("meta"):
        module = BertEmbeddings(BertConfig())
    count = sum(p.numel() for p in module.parameters())
    assert count == 23_837_184 == (30522 + 512 + 2 + 2) * 768


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "bert-base-cased", "bert-base-chinese"]
)
def test_the_special_tokens_have_the_ids_of_the_chapter(name):
    path = VOCABULARIES / f"{name}-vocab.txt"
    if not path.exists():
        pytest.skip(f"no {path}: the published vocabularies are not here")
    tokens = path.read_text(encoding="utf-8").split("\n")
    expected = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]"}
    for number, token in {**expected, 103: "[MASK]"}.items():
        assert tokens[number] == token
    if name == "bert-base-uncased":
        words = {1045: "i", 2293: "love", 3019: "natural", 2653: "language"}
        words |= {6364: "processing", 2652: "playing", 999: "!"}
        for number, token in words.items():
            assert tokens[number] == token
        unused = [*range(1, 100), *range(104, 999)]
        assert len(unused) == 994
        assert [tokens[n] for n in unused] == [
            f"[unused{k}]" for k in range(994)
        ]
