"""Positions.

Written by tools/extract.py from notebooks/03_positions.md: edit that notebook, not this file.
"""

import torch
from torch import Tensor, nn

from bertnb.configuration import BertConfig

__all__ = ["sinusoidal_positions", "LearnedPositions", "may_look", "check_ids"]


# %% The code: sinusoids
def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """Return the table of (3.7), float32 (length, dim), row p for place p.

    Even columns hold sines and odd columns cosines, the fastest pair first.

    Raises:
        ValueError: `dim` is odd or not positive, or `length` is negative.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(
            f"dim={dim}: expected a positive even number, "
            "a sine and a cosine for each frequency"
        )
    if length < 0:
        raise ValueError(f"length={length}: expected 0 or more positions")
    position = torch.arange(length)[:, None]
    column = torch.arange(0, dim, 2, dtype=torch.float64)  # 2i, (dim / 2,)
    frequency = 10000.0 ** (-column / dim)  # (3.6)
    angle = position * frequency  # (length, dim / 2)
    table = torch.stack((angle.sin(), angle.cos()), dim=-1)
    return table.flatten(-2).float()


# %% The code: learned positions
class LearnedPositions(nn.Embedding):
    """BERT's positions, (3.9): a trained row for each of the first places."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.max_position_embeddings, config.hidden_size)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the rows (..., H) of the ids (...).

        Raises:
            ValueError: an id is negative or beyond the table.
        """
        limit = "max_position_embeddings"
        check_ids(position_ids, "position_ids", self.num_embeddings, limit)
        return super().forward(position_ids)


def may_look(values: Tensor) -> bool:
    """Return whether a check may read a tensor's values.

    A compiled graph has none to read. On a GPU each look lets the device run
    dry, which no step of training should: it does not look while gradients
    are recorded.
    """
    training = values.is_cuda and torch.is_grad_enabled()
    return not (torch.compiler.is_compiling() or training or not values.numel())


def check_ids(ids: Tensor, name: str, size: int, limit: str) -> None:
    """Raise a readable error for integer `ids` outside 0..size-1.

    Where `may_look` says no, PyTorch itself stops at a wrong id: later, with
    a message of the device's, and the process must be started again.

    Args:
        ids: what will index a table of `size` rows.
        name: the argument's name, for the message.
        size: the number of rows.
        limit: the name of the configuration key that sets `size`.

    Raises:
        TypeError: `ids` are not int32 or int64.
        ValueError: an id lies outside the table.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name} has dtype {ids.dtype}; expected torch.int64 ids "
            "(use .long())"
        )
    if not may_look(ids):
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(
            f"{name} holds {bad}; expected 0 to {size - 1} ({limit}={size}): "
            f"correct the ids, or use a model with a larger {limit}"
        )
