"""Attention.

Written by tools/extract.py from notebooks/01_attention.md: edit that notebook, not this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "scaled_dot_product_attention",
    "check_attention_inputs",
    "fast_attention",
]


# %% The code
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the context vectors and the attention weights of (1.5), every step visible.

    Args:
        query: (..., L, d) floats.
        key: (..., S, d).
        value: (..., S, d_v).
        mask: bool, broadcastable to (..., L, S); True = this query may attend to this key.
        dropout_p: the share of weights set to zero, the rest scaled up.

    Returns:
        context (..., L, d_v) and weights (..., L, S). A query that may attend to no key gets weights and context 0.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: the sizes of `query` and `key`, or of `key` and `value`, do not fit.
    """
    check_attention_inputs(query, key, value, mask)
    scores = (
        query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    )  # (..., L, S), (1.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(
            ~mask, 0.0
        )  # only rows without any key change
    weights = F.dropout(weights, dropout_p)
    return weights @ value, weights  # (..., L, d_v), (..., L, S)


def check_attention_inputs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> None:
    """Raise the errors that `scaled_dot_product_attention` documents."""
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype {mask.dtype}; expected torch.bool, True = may attend (use mask.bool())"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query has size {query.shape[-1]} and key {key.shape[-1]}: the last dimensions must be equal"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key has length {key.shape[-2]} and value {value.shape[-2]}: each key needs one value"
        )


# %% The fast path
def fast_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the context of `scaled_dot_product_attention` from PyTorch's fused kernels, without the weights.

    Arguments, errors and the result for a query without keys are the same.
    """
    check_attention_inputs(query, key, value, mask)
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p
    )
    if mask is None:
        return context
    return context.masked_fill(
        ~mask.any(dim=-1, keepdim=True), 0.0
    )  # the same on every backend
