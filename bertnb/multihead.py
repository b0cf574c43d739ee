"""Multi-head attention.

Written by tools/extract.py from notebooks/02_multi_head.md: edit that notebook, not this file.
"""

from torch import Tensor, nn

from bertnb.attention import fast_attention, scaled_dot_product_attention
from bertnb.configuration import BertConfig

__all__ = ["split_heads", "merge_heads", "MultiHeadAttention"]


# %% The code
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the last dimension into heads: (..., L, H) -> (..., A, L, d).

    Raises:
        ValueError: `num_heads` does not divide H.
    """
    if num_heads < 1 or x.shape[-1] % num_heads:
        raise ValueError(
            f"num_heads={num_heads} does not divide the {x.shape[-1]} features "
            "of x: each head gets an equal share"
        )
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)  # (2.5)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads side by side again: (..., A, L, d) -> (..., L, H)."""
    return x.transpose(-3, -2).flatten(-2)


class MultiHeadAttention(nn.Module):
    """Self-attention in A heads, (2.1): project, split, attend, merge, project."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size)  # W_1^Q ... W_A^Q in one, (2.5)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)  # W^O

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed states (B, L, H) and, on request, the weights.

        Args:
            hidden_states: (B, L, H).
            mask: bool, broadcastable to (B, A, L, L); True = may attend.
            output_attentions: also return the weights (B, A, L, L).
            queries: (B, K, H), the states that ask; None: all of them. With K
                queries, K stands for the first L in the other shapes.

        Raises:
            ValueError: the last size of `hidden_states` is not H.
            TypeError: `mask` is not bool.
        """
        size = self.query.in_features
        if hidden_states.shape[-1] != size:
            raise ValueError(
                f"hidden_states has {hidden_states.shape[-1]} features; "
                f"expected hidden_size={size} in the last dimension"
            )
        asking = hidden_states if queries is None else queries
        projections = (
            self.query(asking),
            self.key(hidden_states),
            self.value(hidden_states),
        )
        q, k, v = (
            split_heads(projection, self.num_heads)
            for projection in projections
        )  # (B, A, L, d) each, (2.2)
        dropout_p = self.dropout_p if self.training else 0.0
        weights = None
        if output_attentions:
            context, weights = scaled_dot_product_attention(
                q, k, v, mask, dropout_p
            )
        else:
            context = fast_attention(q, k, v, mask, dropout_p)
        return self.output(merge_heads(context)), weights  # (2.1)
