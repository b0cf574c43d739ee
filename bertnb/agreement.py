"""Two passes that agree.

Written by tools/extract.py from notebooks/16_think_twice.md: edit that notebook, not this file.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bertnb.folders import PretrainedModel
from bertnb.masked_lm import IGNORE

__all__ = ["disagreement", "ReadTwice"]


# %% The code
def disagreement(first: Tensor, again: Tensor, targets: Tensor) -> Tensor:
    """Return how far two passes are apart, (16.15), a mean over the targets.

    Args:
        first, again: (..., C) floats, the finite scores of the two passes; of
            numbers (B, 1).
        targets: int64 (...); -100, or a place of C or more, does not count.
            Or floats: then the mean is of the squared differences.

    Raises:
        ValueError: the shapes do not fit.
    """
    numbers = targets.is_floating_point()
    shape = first.shape if numbers else (*targets.shape, first.shape[-1])
    if first.shape != again.shape or first.shape != shape:
        raise ValueError(
            f"first and again have the shapes {tuple(first.shape)} and "
            f"{tuple(again.shape)}, targets {tuple(targets.shape)}: expected "
            "two alike; for classes, the shape of targets and one dimension "
            "more"
        )
    if numbers:
        return (first.float() - again.float()).square().mean()
    log_p, log_q = (s.float().log_softmax(-1) for s in (first, again))
    terms = (log_p.exp() - log_q.exp()) * (log_p - log_q)  # (..., C)
    apart = terms.sum(-1) / 2  # (...), (16.15)
    counted = (targets != IGNORE) & (targets < first.shape[-1])
    return (apart * counted).sum() / counted.sum().clamp(min=1)


_SCORES = {  # by the argument that holds their targets
    "labels": "logits",
    "start_positions": "start_logits",
    "end_positions": "end_logits",
}


class ReadTwice(nn.Module):
    """A model in training that reads each row twice, with other dropout, and
    pays `alpha` times the `disagreement` of its two answers, (16.17).

    Its output is that of the model for the batch and the batch again (2B
    rows); `loss` and `losses` have the price in them.

    Args:
        model: for one of the five tasks: an output with `losses`.
        alpha: 0 or more.

    Raises:
        ValueError: nothing in the model is dropped: the answers would always
            be the same.
    """

    def __init__(self, model: PretrainedModel, alpha: float) -> None:
        super().__init__()
        if not any(
            getattr(module, name, 0.0) > 0
            for module in model.modules()
            for name in ("p", "dropout_p")
        ):
            raise ValueError(
                f"r_drop={alpha}: the model drops nothing, so it always "
                "agrees with itself: set dropout, or r_drop=0"
            )
        self.model, self.alpha = model, alpha

    def forward(self, **batch: Tensor) -> Any:
        """Return the model's output for the batch and the batch again."""
        output = self.model(
            **{name: torch.cat([t, t]) for name, t in batch.items()}
        )
        # the loss of an answer's end is halved already, so is its price
        share, losses = self.alpha / len(output.losses), {}
        for name, loss in output.losses.items():
            first, again = getattr(output, _SCORES[name]).chunk(2)
            price = disagreement(first, again, batch[name])
            losses[name] = loss + share * price  # (16.17)
        total = torch.stack([*losses.values()]).sum()
        return replace(output, loss=total, losses=losses)
