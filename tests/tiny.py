"""A tokenizer of a few words and a configuration as small, for many tests."""

from __future__ import annotations

from typing import Any

from bertnb import BertConfig, WordPieceTokenizer

SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()


def tokenizer_of(words: str) -> WordPieceTokenizer:
    """Return one with the special tokens (0 to 4) and these pieces (from 5)."""
    pieces = [*SPECIAL, *words.split()]
    return WordPieceTokenizer({piece: i for i, piece in enumerate(pieces)})


def config_for(tokenizer: WordPieceTokenizer, **changes: Any) -> BertConfig:
    """Return one with large weights, so that small faults show."""
    values = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
    }
    return BertConfig(**(values | changes))
