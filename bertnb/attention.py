"""Attention.

Written by tools/extract.py from notebooks/01_attention.md: edit that notebook, not this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "scaled_dot_product_attention",
    "check_attention_inputs",
    "fast_attention",
    "AttentionTable",
    "attention_table",
]


# %% The code
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return context and weights by (1.5) and (1.7), every step visible.

    Args:
        query: (..., L, d) floats.
        key: (..., S, d).
        value: (..., S, d_v).
        mask: bool, broadcasts to (..., L, S); True = this query may attend
            to this key.
        dropout_p: the share of the weights that is set to zero; the others
            grow by 1 / (1 - dropout_p). Give 0 outside training.

    Returns:
        context (..., L, d_v) and weights (..., L, S). A query that may
        attend to no key has weights and context 0, and finite gradients.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: the shapes do not fit, or `dropout_p` is no share.
    """
    check_attention_inputs(query, key, value, mask, dropout_p)
    d = query.shape[-1]
    scores = query @ key.transpose(-2, -1) / d**0.5  # (..., L, S), (1.3)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)  # rows without keys, (1.7)
    weights = F.dropout(weights, dropout_p)
    return weights @ value, weights  # (..., L, d_v), (..., L, S)


def check_attention_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float = 0.0,
) -> None:
    """Raise the errors that `scaled_dot_product_attention` documents."""
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected "
                "(..., length, size): one vector is tensor[None, :]"
            )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query has size {query.shape[-1]} and key {key.shape[-1]}: "
            "the last dimensions must be equal"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key has length {key.shape[-2]} and value {value.shape[-2]}: "
            "each key needs one value"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 to 1")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype {mask.dtype}; expected torch.bool, "
            "True = may attend (use mask.bool())"
        )
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    scores = (*batch, query.shape[-2], key.shape[-2])
    pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.dim() > len(scores) or any(m not in (1, s) for m, s in pairs):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast "
            f"to the scores' {scores}; a padding mask (B, S) over heads is "
            "mask[:, None, None, :]"
        )


# %% The fast path
def fast_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the context of `scaled_dot_product_attention`, without weights.

    It runs PyTorch's fused kernels. Arguments, errors and the result for a
    query without keys are the same.
    """
    check_attention_inputs(query, key, value, mask, dropout_p)
    if mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout_p
        )
    mask = torch.atleast_2d(mask)
    empty = ~mask.any(dim=-1, keepdim=True)  # queries without any key
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | empty, dropout_p=dropout_p
    )
    return context.masked_fill(empty, 0.0)  # (1.7), on every backend


# %% What attention looks like
@dataclass(frozen=True, repr=False)
class AttentionTable:
    """One row a query, one column a key: shaded in a notebook, plain in print.

    `attention_table` makes it, and checks what goes in.
    """

    weights: list[list[float]]  # L rows of S
    queries: list[str]
    keys: list[str]
    caption: str

    def __repr__(self) -> str:
        """Return the weights to three decimals, in aligned columns."""
        left = max(map(len, self.queries), default=0)
        widths = [max(5, len(key)) for key in self.keys]
        head = [f"{key:>{w}}" for key, w in zip(self.keys, widths, strict=True)]
        lines = ["  ".join([" " * left, *head])]
        for query, row in zip(self.queries, self.weights, strict=True):
            cells = [f"{x:>{w}.3f}" for x, w in zip(row, widths, strict=True)]
            lines.append("  ".join([f"{query:>{left}}", *cells]))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return a table without scripts, legible on light and dark ground."""
        plain = "font-weight:400;padding:.3em"
        upright = "writing-mode:vertical-rl;transform:rotate(180deg)"
        head = "".join(
            f'<th scope="col" style="{plain};vertical-align:bottom;'
            'text-align:center">'
            f'<span style="{upright}">{escape(key)}</span></th>'
            for key in self.keys
        )
        rows = []
        for query, row in zip(self.queries, self.weights, strict=True):
            pairs = zip(self.keys, row, strict=True)
            cells = "".join(_cell(query, key, x) for key, x in pairs)
            rows.append(
                f'<tr><th scope="row" style="{plain};text-align:right">'
                f"{escape(query)}</th>{cells}</tr>"
            )
        return (
            '<div style="overflow-x:auto"><table class="attention" '
            'style="border-collapse:collapse;color:inherit;font-size:.85em">'
            '<caption style="caption-side:bottom;text-align:left">'
            f"{escape(self.caption)}</caption>"
            f"<thead><tr><td></td>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )


def _cell(query: str, key: str, weight: float) -> str:
    """Return one cell: two decimals, shaded by the weight, named in full."""
    title = escape(f"{query} → {key}: {weight:.3f}")
    shade = 0.7 * min(weight, 1)  # text stays legible on the darkest
    text = f"{weight:.2f}".removeprefix("0") if weight else "0"
    return (
        f'<td title="{title}" style="min-width:2.4em;padding:.4em 0;'
        f'text-align:center;background:rgba(31,119,180,{shade:.3f})">'
        f"{text}</td>"
    )


def attention_table(
    weights: Any,
    queries: Sequence[str],
    keys: Sequence[str],
    caption: str = "Attention weights: one row a query, one column a key.",
) -> AttentionTable:
    """Return `weights` as a table that a notebook shows with shaded cells.

    Args:
        weights: (L, S) tensor, array or nested list of numbers >= 0.
        queries: the L words at the left.
        keys: the S words at the top.
        caption: the line below the table, which screen readers read first.

    Raises:
        ValueError: `weights` has another shape, or a number below 0 or not
            finite.
    """
    values = torch.as_tensor(weights).double()
    if values.shape != (len(queries), len(keys)):
        raise ValueError(
            f"weights has shape {tuple(values.shape)}; expected "
            f"{(len(queries), len(keys))} for {len(queries)} queries and "
            f"{len(keys)} keys (of a batch, pick one map: weights[0, 0])"
        )
    wrong = ~((values >= 0) & values.isfinite())
    if wrong.any():
        raise ValueError(
            f"weights holds {values[wrong][0].item():.3g}; expected finite "
            "numbers >= 0: give the weights, not the scores"
        )
    return AttentionTable(values.tolist(), list(queries), list(keys), caption)
