"""Embeddings.

Written by tools/extract.py from notebooks/05_embeddings.md: edit that notebook, not this file.
"""

import torch
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.layers import LayerNorm
from bertnb.positions import LearnedPositions, check_ids

__all__ = ["BertEmbeddings"]


# %% The embeddings in PyTorch
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
        self.LayerNorm = LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return (B, L, H) for int64 ids (B, L).

        Args:
            token_type_ids: (B, L) or (L,), the segments; None: all 0.
            position_ids: (B, L) or (L,), the places; None: 0..L-1.

        Raises:
            TypeError: ids are not int32 or int64.
            ValueError: an id lies outside its table, or a shape does not fit.
        """
        length = input_ids.shape[-1]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)
        others = {
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        for name, ids in others.items():
            if ids.shape not in (input_ids.shape, (1, length), (length,)):
                raise ValueError(
                    f"{name} has shape {tuple(ids.shape)}; expected "
                    f"{tuple(input_ids.shape)} like input_ids, or ({length},)"
                )
        words, segments = self.word_embeddings, self.token_type_embeddings
        limits = words.num_embeddings, segments.num_embeddings
        check_ids(input_ids, "input_ids", limits[0], "vocab_size")
        check_ids(
            token_type_ids, "token_type_ids", limits[1], "type_vocab_size"
        )
        total = (
            words(input_ids)
            + segments(token_type_ids)
            + self.position_embeddings(position_ids)
        )  # (B, L, H), (5.1)
        return self.dropout(self.LayerNorm(total))
