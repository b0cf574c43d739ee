"""Embeddings.

Written by tools/extract.py from notebooks/05_embeddings.md: edit that notebook, not this file.
"""

import torch
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.positions import LearnedPositions, check_ids

__all__ = ["BertEmbeddings"]


# %% The code
class BertEmbeddings(nn.Module):
    """Token + segment + position, then LayerNorm, then dropout, (5.1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size
        )
        self.position_embeddings = LearnedPositions(config)
        self.token_type_embeddings = nn.Embedding(
            config.type_vocab_size, config.hidden_size
        )
        self.LayerNorm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return (B, L, H) for int64 ids (B, L); segments default to 0, positions to 0..L-1.

        Raises:
            ValueError: an id lies outside its table (the message names which and the limit).
        """
        if position_ids is None:
            position_ids = torch.arange(
                input_ids.shape[-1], device=input_ids.device
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        check_ids(
            input_ids,
            "input_ids",
            self.word_embeddings.num_embeddings,
            "vocab_size",
        )
        check_ids(
            token_type_ids,
            "token_type_ids",
            self.token_type_embeddings.num_embeddings,
            "type_vocab_size",
        )
        total = (
            self.word_embeddings(input_ids)
            + self.token_type_embeddings(token_type_ids)
            + self.position_embeddings(position_ids)
        )  # (B, L, H)
        return self.dropout(self.LayerNorm(total))
