"""BertConfig against transformers' BertConfig."""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig as HFConfig

from bertnb import BertConfig
from bertnb.configuration import FIXED, HIDDEN_ACTS, IGNORED

sizes = st.integers(1, 100_000)
rates = st.floats(0, 0.99)
small = st.floats(1e-15, 10)


@st.composite
def configs(draw):
    heads, head_size, vocabulary = (draw(st.integers(1, 64)) for _ in range(3))
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=heads * head_size,
        num_hidden_layers=draw(sizes),
        num_attention_heads=heads,
        intermediate_size=draw(sizes),
        hidden_act=draw(st.sampled_from(HIDDEN_ACTS)),
        hidden_dropout_prob=draw(rates),
        attention_probs_dropout_prob=draw(rates),
        max_position_embeddings=draw(sizes),
        type_vocab_size=draw(sizes),
        initializer_range=draw(small),
        layer_norm_eps=draw(small),
        pad_token_id=draw(st.integers(0, vocabulary - 1)),
    )


@settings(max_examples=25, deadline=None)
@given(configs())
def test_every_value_survives_both_ways(ours):
    with tempfile.TemporaryDirectory() as folder:
        HFConfig(**ours.to_dict()).save_pretrained(folder)
        assert BertConfig.from_pretrained(folder) == ours
        (Path(folder) / "config.json").write_text(json.dumps(ours.to_dict()))
        theirs = HFConfig.from_pretrained(folder)
    for key, value in ours.to_dict().items():
        assert getattr(theirs, key) == value


def test_the_defaults_are_theirs():
    theirs = HFConfig()
    for key, value in BertConfig().to_dict().items():
        assert getattr(theirs, key) == value, key


def test_every_key_that_they_write_is_known():
    """Their full dictionary, defaults included, is read without an error."""
    everything = HFConfig(architectures=["BertModel"]).to_dict()
    assert BertConfig.from_dict(everything) == BertConfig()
    keys = everything.keys() - BertConfig().to_dict().keys()
    assert keys <= IGNORED | FIXED.keys()


def test_they_know_every_activation():
    from transformers.activations import ACT2FN

    assert set(HIDDEN_ACTS) <= set(ACT2FN)
