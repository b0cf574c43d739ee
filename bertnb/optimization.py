"""Optimisation.

Written by tools/extract.py from notebooks/11_optimization.md: edit that notebook, not this file.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bertnb.masked_lm import IGNORE
from bertnb.rows import move

__all__ = [
    "parameter_groups",
    "adamw",
    "set_learning_rate",
    "linear_warmup_decay",
    "original_warmup_decay",
    "warmup_constant",
    "SCHEDULES",
    "LABELS",
    "count_targets",
    "accumulate_gradients",
    "autocast",
    "Step",
    "train",
    "pick_device",
    "pick_precision",
    "probe_compile",
]


# %% The two groups
def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    factor: Callable[[str], float] | None = None,
) -> list[dict[str, Any]]:
    """Return AdamW's two groups, for (11.6): matrices and embeddings decay,
    biases and LayerNorm weights do not. Parameters without gradient are left
    out.

    Args:
        factor: of the learning rate, by a parameter's name; each value makes
            groups of its own. None: 1 for all.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith("bias") or "norm" in name.lower()
            kind = exempt, 1.0 if factor is None else factor(name)
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": groups[exempt, rate],
            "weight_decay": 0.0 if exempt else weight_decay,
            "factor": rate,
        }
        for exempt, rate in sorted(groups)
    ]


def adamw(
    model: nn.Module,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    bias_correction: bool = True,
    factor: Callable[[str], float] | None = None,
) -> torch.optim.AdamW:
    """Return PyTorch's fused AdamW, (11.6), on the two groups, with the
    original's constants; `train` sets the learning rate.

    Args:
        model: on the device where it will be trained.
        bias_correction: False is the original's Adam, (11.9): the counter of
            the steps begins at 2**23, where beta**t is 0.
        factor: of the learning rate, as in `parameter_groups`.
    """
    groups = parameter_groups(model, weight_decay, factor)
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=betas, eps=eps, fused=True
    )
    if not bias_correction:
        for p in (p for group in groups for p in group["params"]):
            optimizer.state[p] = {
                # a float32 counts in ones as far as 2**24
                "step": torch.full((), 2.0**23, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


# %% Warm-up and decay, by name
def linear_warmup_decay(
    step: int, warmup_steps: int, total_steps: int
) -> float:
    """Return Hugging Face's factor on the learning rate, (11.7): up from 0 to
    1 over the warm-up, then straight down to 0 from there.

    Raises:
        ValueError: a negative number, or a warm-up longer than the run.
    """
    _check_schedule(step, warmup_steps, total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def original_warmup_decay(
    step: int, warmup_steps: int, total_steps: int
) -> float:
    """Return the original's factor, (11.10): up from 0 to 1 over the warm-up,
    then on a line to 0 that began at 1 in step 0.

    Raises:
        ValueError: a negative number, or a warm-up longer than the run.
    """
    _check_schedule(step, warmup_steps, total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, 1 - step / total_steps)


def warmup_constant(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor that rises from 0 to 1 over the warm-up and stays.

    Raises:
        ValueError: a negative number, or a warm-up longer than the run.
    """
    _check_schedule(step, warmup_steps, total_steps)
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def _check_schedule(step: int, warmup_steps: int, total_steps: int) -> None:
    if min(step, warmup_steps) < 0 or not warmup_steps <= total_steps >= 1:
        raise ValueError(
            f"step={step}, warmup_steps={warmup_steps}, total_steps="
            f"{total_steps}: expected step >= 0 and 0 <= warmup_steps <= "
            "total_steps, at least one step in all"
        )


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "hugging_face": linear_warmup_decay,
    "original": original_warmup_decay,
    "constant": warmup_constant,
}


# %% A batch in parts
LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")


def count_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the number of targets of each label argument, int64 (), on the
    device of the batch: those that are not -100 (all of them, where they are
    floats), and of an answer's positions those that were not cut off with the
    end of their row."""
    counts: dict[str, Tensor] = {}
    for name in LABELS:
        if name in batch:
            targets = batch[name]
            # a number may be -100; only a class of that number is none
            counted = (targets != IGNORE) | targets.is_floating_point()
            if name.endswith("_positions"):
                counted &= targets < batch["input_ids"].shape[1]
            counts[name] = counted.sum()
    return counts


def accumulate_gradients(
    model: nn.Module,
    batch: dict[str, Tensor],
    parts: int = 1,
    precision: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add to the gradients that of the batch's loss, in parts, (11.11).

    Where torch.distributed is set up, the loss is that of the batches of all
    ranks together, and the gradient R times this rank's share of it, (11.12):
    DistributedDataParallel takes the mean over the ranks.

    Args:
        model: on the device of the batch. Its output has `losses`, the mean
            loss of each label argument, or only one `loss`.
        batch: the model's arguments, the rows in front in each.
        parts: how many times to go forward and backward, with so many rows
            at a time.
        precision: of the matrix products, by autocast.
        scaler: multiplies what is differentiated, (11.13).

    Returns:
        The loss, float (), not scaled and without history.

    Raises:
        ValueError: fewer rows than parts; no loss; or one loss for several
            label arguments, where their shares are needed.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    totals = _over_ranks(_counts(batch))
    shares: list[Tensor] = []
    for part in _split(batch, parts):
        last = len(shares) + 1 == parts
        # ranks exchange gradients behind the last part, not behind each
        hold = nullcontext if last else getattr(model, "no_sync", nullcontext)
        with hold():
            with autocast(totals["rows"].device, precision):
                output = model(**part)
            losses = _losses(output, batch, split=parts * ranks > 1)
            counts = _counts(part)
            weighted = [
                loss * (counts[k].to(loss.dtype) / totals[k].clamp(min=1))
                for k, loss in losses.items()
            ]
            share = torch.stack(weighted).sum()  # (11.11)
            scaled = share if scaler is None else scaler.scale(share)
            (scaled * ranks).backward()  # (11.12)
        shares.append(share.detach())
    return _over_ranks({"loss": torch.stack(shares).sum()})["loss"]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which matrix products have this precision."""
    half = precision != torch.float32
    return torch.autocast(device.type, precision, enabled=half)


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    rows = min(len(tensor) for tensor in batch.values())
    if not 1 <= parts <= rows:
        raise ValueError(
            f"parts={parts}: expected 1 to {rows}, the rows of the batch"
        )
    pieces = {k: t.tensor_split(parts) for k, t in batch.items()}
    return [{k: p[i] for k, p in pieces.items()} for i in range(parts)]


def _counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(iter(batch.values()))
    rows = torch.full((), len(first), device=first.device)
    return count_targets(batch) | {"rows": rows}


def _losses(
    output: Any, batch: dict[str, Tensor], split: bool
) -> dict[str, Tensor]:
    """Return the terms of the loss by the arguments that hold their targets."""
    if output.loss is None:
        raise ValueError(
            f"the model returns no loss: the batch has {', '.join(batch)}; "
            f"expected targets too ({', '.join(LABELS)})"
        )
    terms: dict[str, Tensor] | None = getattr(output, "losses", None)
    if terms is not None:
        return terms
    labels = [name for name in LABELS if name in batch]
    if len(labels) == 1:
        return {labels[0]: output.loss}
    if labels and split:
        raise ValueError(
            f"the model returns one loss for {' and '.join(labels)}, so that "
            "parts of it cannot be weighted: use parts=1 in one process, or a "
            "model whose output has `losses`"
        )
    return {"rows": output.loss}


def _over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums over all ranks."""
    if not dist.is_initialized():
        return values
    packed = torch.stack(list(values.values()))
    dist.all_reduce(packed)
    return dict(zip(values, packed.unbind(), strict=True))


# %% The loop
@dataclass(frozen=True)
class Step:
    """What one optimisation step reports. The tensors are (), on the model's
    device; reading one (`float(step.loss)`) waits for the device.
    """

    step: int
    loss: Tensor
    learning_rate: float
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # int64, the steps up to here that were held back
    failed: Tensor  # bool, this or an earlier step stops the run


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    schedule: Callable[[int], float],
    first_step: int = 0,
    max_grad_norm: float = 1.0,
    precision: torch.dtype = torch.float32,
    parts: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    on_nonfinite: str = "stop",
) -> Iterator[Step]:
    """The one loop of this package: take a step for each batch, and report it.

    Args:
        model: may be compiled, or a DistributedDataParallel.
        optimizer: a fused one, such as `adamw`.
        batches: dictionaries of arguments for `model`, labels among them.
        schedule: the learning rate of step 0, 1, 2, ...
        first_step: the number of the first batch: not 0 in a run that goes on.
        max_grad_norm: gradients are scaled down to this global norm, (11.8).
        precision: of the matrix products; weights, their sums and the
            optimiser stay float32.
        parts: of each batch, one after the other, (11.11): less memory. Of a
            batch with fewer rows, one for each row.
        scaler: for float16, (11.13). It holds back a step that overflows, and
            goes on with a smaller factor.
        on_nonfinite: a step whose loss or gradient is not finite is not
            taken. "stop": nor is any later one, and the loop raises: at once
            on a CPU, on other devices up to 16 steps later. "skip": the loop
            goes on.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the weights and
            the optimiser are those before that step.
        ValueError: an argument is out of its range, or the model gives no
            loss.
    """
    _check_training(optimizer, precision, scaler, on_nonfinite)
    device = next(model.parameters()).device
    guard = _Guard(optimizer, device, on_nonfinite == "stop", scaler)
    recent: list[Step] = []
    patience = _patience(device)
    model.train()
    optimizer.zero_grad()  # of whoever called backward before
    for step, batch in enumerate(batches, first_step):
        rate = schedule(step)
        set_learning_rate(optimizer, rate)
        inputs = {name: move(tensor, device) for name, tensor in batch.items()}
        most = min(parts, *(len(tensor) for tensor in inputs.values()))
        loss = accumulate_gradients(model, inputs, most, precision, scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        guard.step(loss, norm)
        optimizer.zero_grad()
        report = Step(step, loss, rate, norm, guard.skipped, guard.failed)
        recent.append(report)
        if len(recent) == patience:
            _stop_if_failed(recent)
        yield report
    _stop_if_failed(recent)


class _Guard:
    """Take the optimiser's step where loss and gradient are finite: decided
    on the device, which nobody waits for."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        stops: bool,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.optimizer, self.scaler, self.stops = optimizer, scaler, stops
        self.one = torch.ones((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)

    def step(self, loss: Tensor, norm: Tensor) -> None:
        overflow = ~norm.isfinite()
        if self.stops:
            fault = overflow
            if self.scaler is not None:  # the factor may be what overflows
                fault = overflow & (self.scaler.scale(self.one) <= 1)
            self.failed = self.failed | fault | ~loss.isfinite()
        held = self.failed | overflow | ~loss.isfinite()
        self.skipped = self.skipped + held
        # a fused optimiser does nothing where found_inf is 1
        self.optimizer.found_inf = held.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        if self.scaler is not None:
            self.scaler.update()  # (11.14)


def _patience(device: torch.device) -> int:
    """Return after how many steps to look: a CPU does not compute ahead."""
    return 1 if device.type == "cpu" else 16


def _stop_if_failed(recent: list[Step]) -> None:
    """Raise if one of the steps failed, else forget them."""
    if recent and recent[-1].failed:  # waits for the device
        bad = next(report for report in recent if report.failed)
        loss, norm = bad.loss.item(), bad.grad_norm.item()
        what = "norm of the gradient" if math.isfinite(loss) else "loss"
        raise FloatingPointError(
            f"the {what} is {norm if math.isfinite(loss) else loss} at step "
            f"{bad.step}: that step was not taken. Try a lower learning rate "
            "or a longer warm-up; on_nonfinite='skip' leaves such steps out"
        )
    recent.clear()


def _check_training(
    optimizer: torch.optim.Optimizer,
    precision: torch.dtype,
    scaler: torch.amp.GradScaler | None,
    on_nonfinite: str,
) -> None:
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(
            f"on_nonfinite={on_nonfinite!r}: expected 'stop' or 'skip'"
        )
    if precision == torch.float16 and scaler is None:
        raise ValueError(
            "precision=torch.float16 without a scaler: small gradients would "
            "become 0; add scaler=torch.amp.GradScaler(device.type)"
        )
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} that is not fused, and "
            "cannot hold back a step on the device: pass fused=True, or use "
            "adamw(model)"
        )


# %% What the machine does faster
def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or CUDA where there is one, else the CPU.

    Raises:
        ValueError: CUDA is asked for, and there is none.
    """
    there = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if there else "cpu"))
    if device.type == "cuda" and not there:
        raise ValueError(
            f"device={name!r}: PyTorch sees no CUDA device here: use 'cpu', or "
            "install a build of PyTorch for CUDA and its driver"
        )
    return device


def pick_precision(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it faster than float32
    (sm80, AVX512-BF16, AMX), float16 on an older GPU, else float32."""
    if device.type == "cuda":
        new = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if new else torch.float16
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = device.type == "cpu" and any(
        getattr(torch.cpu, probe, bool)() for probe in probes
    )
    return torch.bfloat16 if fast else torch.float32


def probe_compile(
    model: nn.Module,
    batch: dict[str, Tensor],
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> nn.Module:
    """Return the model compiled for batches of this shape or, with a warning,
    the model itself where that does not work.

    Goes forward and backward once, in training mode. Weights, mode and random
    numbers are afterwards what they were; gradients are cleared.
    """
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    training = model.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            compiled = cast(
                nn.Module,
                torch.compile(model.train(), fullgraph=True, dynamic=False),
            )
            with autocast(device, precision):
                loss = compiled(**inputs).loss
            loss.backward()
    except Exception as error:  # a compiler may raise anything
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            "torch.compile does not work here, the run goes on without it: "
            f"{type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return model
    finally:
        model.train(training)
        model.zero_grad()
    return compiled
