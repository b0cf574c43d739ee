"""The plateau.

Written by tools/extract.py from notebooks/12_sweeps.md: edit that notebook, not this file.
"""

import torch
from torch import Tensor

__all__ = ["attention_shares"]


# %% What the heads do
def attention_shares(
    attention: Tensor,
    queries: Tensor,
    token_type_ids: Tensor,
    cls: Tensor,
    sep: Tensor,
) -> dict[str, Tensor]:
    """Return which share of the attention of each head falls where, (12.15).

    Args:
        attention: the weights of one layer, (B, A, L, L).
        queries: bool (B, L), the places that look.
        token_type_ids: (B, L), 0 and 1 as the model got them.
        cls, sep: bool (B, L), where [CLS] and [SEP] stand.

    Returns:
        float (A,) for "previous", "next" and "same" place, "cls", "sep", and
        "other", the other segment's tokens without its [SEP] and [CLS].

    Raises:
        ValueError: there is no query.
    """
    if not queries.any():
        raise ValueError("queries has no True: nobody looks")
    place = torch.arange(queries.shape[1], device=queries.device)
    gap = place - place[:, None]  # (L, L), key minus query
    segment = token_type_ids
    other = segment[:, :, None] != segment[:, None, :]
    targets = {
        "previous": gap == -1,
        "next": gap == 1,
        "same": gap == 0,
        "cls": cls[:, None, :],
        "sep": sep[:, None, :],
        "other": other & ~(cls | sep)[:, None, :],
    }
    shares = {}
    for name, keys in targets.items():
        counted = attention * (keys & queries[:, :, None])[:, None]
        shares[name] = counted.sum((0, 2, 3)) / queries.sum()  # (A,), (12.15)
    return shares
