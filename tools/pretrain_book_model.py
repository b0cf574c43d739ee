"""Pretrain the model that the book and the package carry, bertnb/sotu (about 40 minutes on one core; resumable).

python tools/pretrain_book_model.py FOLDER     # run it again to go on; copy the result when it is done
"""

from __future__ import annotations

import sys

import torch

import bertnb

MODEL = bertnb.BertConfig(
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=512,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.05,  # 0.02 is for H = 768; the width of the start scales with 1 / sqrt(H)
)


def main(folder: str) -> None:
    """Train, and print the last record."""
    torch.set_num_threads(1)
    config = bertnb.PretrainConfig(
        folder, MODEL, mlm_probability=0.3, total_steps=24_000, eval_every=500
    )
    print(bertnb.pretrain(config).records[-1])


if __name__ == "__main__":
    main(sys.argv[1])
