"""Batches without padding.

Written by tools/extract.py from notebooks/16_unpadded.md: edit that notebook, not this file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bertnb.encoder import BertModel, BertOutput
from bertnb.positions import may_look
from bertnb.rows import best_fit

__all__ = [
    "PACKED_LENGTH",
    "pack_lengths",
    "packed_length",
    "worth_packing",
    "encode_packed",
]


# %% The code
PACKED_LENGTH = 64  # places in a packed row, where no text is longer


def pack_lengths(lengths: Sequence[int], length: int) -> Tensor:
    """Find places for texts in rows of `length`, the longest text first.

    Returns:
        int64 (B, 3), for each text: its row r, the place s where it begins
        there, (16.18), and how many texts stand before it.

    Raises:
        ValueError: a text is longer than a row.
    """
    if max(lengths, default=0) > length:
        raise ValueError(
            f"length={length}: expected {max(lengths)}, the longest text, or "
            "more"
        )
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    sizes = [lengths[text] for text in order]
    found = [(0, 0, 0)] * len(lengths)
    for row, members in enumerate(best_fit(sizes, length, len(sizes))):
        start = 0
        for slot, member in enumerate(members):
            found[order[member]] = row, start, slot
            start += sizes[member]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 3)


def packed_length(lengths: Sequence[int]) -> int:
    """Return L', the places of a packed row for these texts."""
    return max(PACKED_LENGTH, *lengths)


def worth_packing(attention_mask: Tensor) -> bool:
    """Return whether a batch (B, L) has less than nine tenths of its places
    if it is packed.

    Where `may_look` says no, because a look would have to wait for a GPU,
    nobody can know, and the answer is no; so it is for a mask of queries by
    keys, and where a row does not begin with a token.
    """
    mask = attention_mask
    if mask.dim() != 2 or not may_look(mask) or not mask[:, 0].all():
        return False
    lengths = mask.bool().sum(1).tolist()
    length = packed_length(lengths)
    rows = int(pack_lengths(lengths, length)[:, 0].max()) + 1
    return rows * length < 0.9 * mask.numel()


def _check_shapes(mask: Tensor, **given: Tensor | None) -> None:
    """Refuse what `spread` would stretch: a row too few, another length."""
    whole = mask.shape
    for name, values in given.items():
        fitting = [whole, whole[1:], (1, whole[1])]
        if name == "input_ids":
            fitting = [whole]
        if values is not None and values.shape not in fitting:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; expected "
                f"{tuple(whole)} like attention_mask"
            )


def encode_packed(
    bert: BertModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> BertOutput:
    """Compute what a head reads of padded rows (B, L), without the padding.

    Args:
        attention_mask: (B, L), with a token first in each row.
        token_type_ids, position_ids: as in `BertModel`.

    Returns:
        With a pooler, `pooler_output` (B, H), and no other state; without,
        `last_hidden_state` (B, L, H), 0 where there is padding.

    Raises:
        ValueError: a row does not begin with a token, or a shape does not
            fit.
    """
    mask = attention_mask.bool()
    others = {"token_type_ids": token_type_ids, "position_ids": position_ids}
    _check_shapes(mask, input_ids=input_ids, **others)
    if not mask[:, 0].all():
        raise ValueError(
            "attention_mask has a row that does not begin with a token: pad "
            "behind the text"
        )
    lengths = mask.sum(1).tolist()
    length = packed_length(lengths)
    plan = pack_lengths(lengths, length).to(mask.device)
    row, start, slot = plan.unbind(1)  # (B) each
    shape = int(row.max()) + 1, length  # (R, L')
    first = (row * length + start)[:, None]  # (B, 1), of the [CLS]
    places = (first + mask.cumsum(1) - 1)[mask]  # (N), (16.18)

    def spread(values: Tensor) -> Tensor:
        flat = values.new_zeros(shape).flatten()
        flat[places] = values.expand_as(mask)[mask]
        return flat.view(shape)

    places_alone = torch.arange(mask.shape[1], device=mask.device)  # (L)
    numbers = torch.arange(1, len(mask) + 1, device=mask.device)
    texts = spread(numbers[:, None])  # (R, L'), 0 where there is none
    inputs = (
        spread(input_ids),
        texts[:, :, None] == texts[:, None, :],  # (R, L', L'), (10.4)
        None if token_type_ids is None else spread(token_type_ids),
        spread(places_alone if position_ids is None else position_ids),
    )
    if bert.pooler is None:
        states = bert(*inputs).last_hidden_state.flatten(0, 1)  # (R L', H)
        unpacked = states.new_zeros(*mask.shape, states.shape[-1])
        unpacked[mask] = states[places]
        return BertOutput(unpacked)
    begins = row.new_zeros(shape[0], int(slot.max()) + 1)  # (R, D)
    begins[row, slot] = start
    output = bert(*inputs, masked_positions=begins[:, :0], cls_positions=begins)
    return BertOutput(
        output.last_hidden_state[row],  # (B, 0, H)
        output.pooler_output[row, slot],  # (R, D, H) -> (B, H)
    )
