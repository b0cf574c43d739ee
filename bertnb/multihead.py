"""Multi-head attention.

Written by tools/extract.py from notebooks/02_multi_head.md: edit that notebook, not this file.
"""

from torch import Tensor, nn

from bertnb.attention import fast_attention, scaled_dot_product_attention
from bertnb.configuration import BertConfig

__all__ = ["split_heads", "merge_heads", "MultiHeadAttention"]


# %% The code
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the last dimension into heads: (B, L, H) -> (B, A, L, d), with d = H / A."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Concatenate the heads again: (B, A, L, d) -> (B, L, H)."""
    return x.transpose(1, 2).flatten(-2)


class MultiHeadAttention(nn.Module):
    """Self-attention in A heads, (2.1): project, split, attend, concatenate, project."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)  # W^O

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed states (B, L, H) and, on request, the weights (B, A, L, L).

        `mask` is bool and broadcastable to (B, A, L, L); True = may attend.
        """
        q, k, v = (
            split_heads(f(hidden_states), self.num_heads)
            for f in (self.query, self.key, self.value)
        )
        dropout_p = self.dropout_p if self.training else 0.0
        weights = None
        if output_attentions:
            context, weights = scaled_dot_product_attention(
                q, k, v, mask, dropout_p
            )
        else:
            context = fast_attention(q, k, v, mask, dropout_p)  # (B, A, L, d)
        return self.output(merge_heads(context)), weights
