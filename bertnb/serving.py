"""Serving.

Written by tools/extract.py from notebooks/16_serving.md: edit that notebook, not this file.
"""

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bertnb.configuration import BertnbError
from bertnb.encoder import BertModel

__all__ = ["LEVELS", "ROWS", "TINY", "Int8Linear", "quantize", "body_of"]


# %% The code: a linear layer of whole numbers
LEVELS = 127  # the largest whole number of 8 bits, on both sides of zero
ROWS = 256  # tokens at once
TINY = 1e-30  # a step for numbers that are all the same


class Int8Linear(nn.Module):
    """A linear map in whole numbers, (16.10): 8 bits for weights and inputs.

    It is made from a float32 `nn.Linear`, on the CPU, and only computes: it
    can be neither trained nor saved.

    Raises:
        ValueError: a weight is not finite.
    """

    weight: Tensor
    scale: Tensor
    row_sum: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        if not weight.isfinite().all():
            raise ValueError(
                "linear has a weight that is not finite: load the model again"
            )
        scale = weight.abs().amax(1).clamp(min=TINY) / LEVELS  # t_j, (16.9)
        whole = (weight / scale[:, None]).round()  # p_jk, (16.8)
        bias = torch.zeros(self.out_features)
        if linear.bias is not None:
            bias = linear.bias.detach().clone()
        self.register_buffer("weight", whole.to(torch.int8))  # (out, K)
        self.register_buffer("scale", scale)  # (out,)
        self.register_buffer("row_sum", whole.sum(1))  # u_j, (out,)
        self.register_buffer("bias", bias)  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., out), in the dtype of `x`.

        Raises:
            BertnbError: in training mode.
        """
        if self.training:
            raise BertnbError(
                "an int8 model cannot be trained: train the model that "
                "quantize was given, then quantize again"
            )
        rows = x.detach().flatten(0, -2).float()  # (T, K)
        y = rows.new_empty(len(rows), self.out_features)
        for some, place in zip(rows.split(ROWS), y.split(ROWS), strict=True):
            self._few(some, place)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def _few(self, rows: Tensor, place: Tensor) -> None:
        """(T, K) -> (T, out), written to its place: few rows stay in the cache."""
        high, low = rows.amax(1, True), rows.amin(1, True)
        middle = (high + low) / 2  # (T, 1), (16.9)
        step = ((high - low) / (2 * LEVELS)).clamp(min=TINY)
        q = (rows - middle).mul_(1 / step).round_().to(torch.int8)  # (16.8)
        whole = torch._int_mm(q, self.weight.t())  # (T, out), exact, (16.11)
        y = whole.float().mul_(step).addcmul_(middle, self.row_sum)
        torch.addcmul(self.bias, y, self.scale, out=place)  # (16.10)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise BertnbError(
            "an int8 model cannot be saved: save the model that quantize was "
            "given (quantising takes no longer than reading a file)"
        )


_Model = TypeVar("_Model", bound=nn.Module)


def quantize(model: _Model) -> _Model:
    """Return a copy for the CPU whose encoder computes in 8 bits, by (16.10).

    `embed`, `fill_mask` and whatever else only reads the model work as
    before. Embeddings and heads stay float32. Tokens do not see each other's
    steps: neighbours and padding change a result no more than they do in
    float32. The copy is in evaluation mode and can be neither trained nor
    saved (`BertnbError`).

    Args:
        model: a `BertModel`, or a model with one as `bert`; left as it is.

    Raises:
        TypeError: `model` holds no `BertModel`.
        ValueError: a weight is not finite.
    """
    body_of(model)
    copy = deepcopy(model).cpu().float().requires_grad_(False)
    for parent in list(body_of(copy).encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return copy.eval()


def body_of(model: nn.Module) -> BertModel:
    """Return the `BertModel` in a model, or the model itself.

    Raises:
        TypeError: there is none.
    """
    body = getattr(model, "bert", model)
    if not isinstance(body, BertModel):
        raise TypeError(
            f"model is of type {type(model).__name__}: expected a BertModel, "
            "or a model that has one as its attribute bert"
        )
    return body
