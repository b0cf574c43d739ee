"""Optimisation.

Written by tools/extract.py from notebooks/11_optimization.md: edit that notebook, not this file.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "parameter_groups",
    "adamw",
    "linear_warmup_decay",
    "pick_device",
    "pick_precision",
    "Step",
    "train",
]


# %% The two groups
def parameter_groups(
    model: nn.Module, weight_decay: float = 0.01
) -> list[dict[str, object]]:
    """Return AdamW's two groups, for (11.6): matrices and embeddings decay,
    biases and LayerNorm weights do not."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = name.endswith("bias") or "norm" in name.lower()
        (no_decay if exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """Return PyTorch's fused AdamW, (11.6), on the two groups, with the
    original's constants; `train` sets the learning rate."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def linear_warmup_decay(
    step: int, warmup_steps: int, total_steps: int
) -> float:
    """Return the factor on the learning rate, (11.7): up from 0 to 1 over the
    warm-up, then straight down to 0.

    Raises:
        ValueError: a negative number, or a warm-up longer than the run.
    """
    if min(step, warmup_steps) < 0 or not warmup_steps <= total_steps >= 1:
        raise ValueError(
            f"step={step}, warmup_steps={warmup_steps}, total_steps="
            f"{total_steps}: expected step >= 0 and 0 <= warmup_steps <= "
            "total_steps, at least one step in all"
        )
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


# %% The loop
def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or CUDA where there is one, else the CPU."""
    return torch.device(
        name or ("cuda" if torch.cuda.is_available() else "cpu")
    )


def pick_precision(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it faster than float32
    (sm80, AVX512-BF16, AMX), else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = device.type == "cpu" and any(
            getattr(torch.cpu, probe, bool)() for probe in probes
        )
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class Step:
    """What one optimisation step reports."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float  # before clipping


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    schedule: Callable[[int], float],
    first_step: int = 0,
    max_grad_norm: float = 1.0,
    precision: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """The one loop of this package: take a step for each batch, and report it.

    Args:
        batches: dictionaries of arguments for `model`, whose output has a
            `loss`.
        schedule: the learning rate of step 0, 1, 2, ...
        first_step: the number of the first batch: not 0 in a run that goes on.
        max_grad_norm: gradients are scaled down to this global norm, (11.8).
        precision: bfloat16 multiplies matrices in bfloat16; weights, their
            sums and the optimiser stay float32.

    Raises:
        ValueError: the model returns no loss.
        FloatingPointError: the loss or the gradient is not finite; the
            weights are those before that step.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer.zero_grad()  # of whoever called backward before
    for step, batch in enumerate(batches, first_step):
        learning_rate = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(
            device.type, precision, enabled=precision != torch.float32
        ):
            loss = model(**inputs).loss
        if loss is None:
            raise ValueError(
                f"the model returns no loss at step {step}: the batch has "
                f"{', '.join(batch)}, but no labels"
            )
        _check_finite("loss", loss, step)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        _check_finite("norm of the gradient", grad_norm, step)
        optimizer.step()
        optimizer.zero_grad()
        yield Step(step, loss.item(), learning_rate, grad_norm.item())


def _check_finite(what: str, value: Tensor, step: int) -> None:
    if not value.isfinite():
        raise FloatingPointError(
            f"the {what} is {value.item()} at step {step}: try a lower "
            "learning rate or a longer warm-up"
        )
