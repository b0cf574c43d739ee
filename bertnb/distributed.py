"""Many workers.

Written by tools/extract.py from notebooks/14_scale.md: edit that notebook, not this file.
"""

from dataclasses import dataclass
from math import ceil, log2

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bertnb.encoder import BertLayer

__all__ = [
    "Cluster",
    "allreduce_seconds",
    "step_seconds",
    "memory_per_rank",
    "shard_model",
    "full_state",
]


# %% Send while you compute
@dataclass(frozen=True)
class Cluster:
    """Equal workers and their network, as a model on paper sees them.

    `ranks` is how many; `flops`, the operations a second of one; `bandwidth`,
    the bytes a second that one sends while it receives as many; `latency`,
    the seconds until a message gets going. Give what a program gets, not what
    a data sheet promises.

    Raises:
        ValueError: a number is out of its range.
    """

    ranks: int
    flops: float
    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks}: expected 1 or more")
        if self.flops <= 0 or self.bandwidth <= 0 or self.latency < 0:
            raise ValueError(
                f"flops={self.flops}, bandwidth={self.bandwidth}, latency="
                f"{self.latency}: expected positive rates, and no negative time"
            )


def allreduce_seconds(cluster: Cluster, size: float) -> float:
    """Return the seconds until every rank has the sum of all ranks' vectors of
    `size` bytes, (14.4), on a ring or on two trees."""
    n = cluster.ranks
    send = size / cluster.bandwidth  # seconds
    ring = (n - 1) * (cluster.latency + send / n)
    trees = ceil(log2(n)) * cluster.latency + send
    return 2 * min(ring, trees) if n > 1 else 0.0


def step_seconds(
    cluster: Cluster,
    operations: float,
    gradient_bytes: float,
    late_bytes: float = 0.0,
    bucket_bytes: float = 25 * 2**20,
) -> float:
    """Return the seconds of one data-parallel step, (14.5).

    Args:
        operations: of one rank, forward and backward.
        gradient_bytes: of the whole model.
        late_bytes: of these, what is ready only when the backward pass is
            over: the word table's, where it is tied to the output.
        bucket_bytes: what is added up at a time; DDP's default.

    Raises:
        ValueError: `late_bytes` is not a part of `gradient_bytes`.
    """
    early = gradient_bytes - late_bytes
    if early < 0 or late_bytes < 0:
        raise ValueError(
            f"late_bytes={late_bytes}: expected 0 to gradient_bytes="
            f"{gradient_bytes}"
        )
    compute = operations / cluster.flops
    buckets = max(1, ceil(early / bucket_bytes))
    hidden = buckets * allreduce_seconds(cluster, early / buckets)
    late = allreduce_seconds(cluster, late_bytes)
    return compute / 3 + max(2 * compute / 3, hidden) + late  # (14.5)


# %% What does not fit
def memory_per_rank(
    parameters: int, ranks: int = 1, stage: int = 0
) -> dict[str, float]:
    """Return the bytes that weights, gradients and moments take on one rank,
    (14.7), in float32; activations are not in it.

    Args:
        stage: of ZeRO. 0: DDP, everything on every rank; 1: moments spread
            over the ranks; 2: gradients too; 3: weights too.

    Raises:
        ValueError: there is no such stage, or no rank.
    """
    if stage not in (0, 1, 2, 3) or ranks < 1:
        raise ValueError(
            f"stage={stage}, ranks={ranks}: expected stage 0, 1, 2 or 3, and "
            "1 rank or more"
        )
    return {
        "weights": 4 * parameters / (ranks if stage >= 3 else 1),
        "gradients": 4 * parameters / (ranks if stage >= 2 else 1),
        "moments": 8 * parameters / (ranks if stage >= 1 else 1),
    }


def shard_model(model: nn.Module) -> nn.Module:
    """Spread a model over all ranks, in place: stage 3 of (14.7).

    Each `BertLayer` is a unit, what is outside of them another. Call it after
    the weights are on their device, and before the optimiser is made. Needs
    PyTorch 2.6 or newer.

    Raises:
        RuntimeError: torch.distributed is not set up.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "shard_model spreads a model over processes: start the program "
            "with torchrun and call torch.distributed.init_process_group first"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, BertLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state of a model that is spread over the ranks, on the
    CPU: what a model that is not spread loads and saves.

    All ranks must call it together.
    """
    from torch.distributed.tensor import DTensor

    state = model.state_dict().items()
    with torch.no_grad():
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
            for name, t in state
        }
