"""The ceilings of this machine, and how near the parts of a BERT come to them.

python benchmarks/roofline.py [SIZE] [--record FILE]

Measures a large product of matrices and a large copy; then each kind of work
of a forward pass alone, on random numbers, with what it computes and what it
moves. Operations that are no products are counted as the formulas of the book
have them: 1 an element for a sum, 8 for a LayerNorm, 5 for a GELU, and 14 a
parameter for AdamW; a root and an error function count as one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peers import SIZES, add_to_record, configuration, predictions
from torch import Tensor

Work = tuple[Callable[[], Any], float, float]  # what, operations, elements


def fastest(action: Callable[[], Any], seconds: float) -> float:
    """Return the seconds of the fastest of many repetitions: others on the
    machine only ever slow it down."""
    action()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found) < 5:
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return min(found)


def ceilings(
    size: int, megabytes: int, vector: int, seconds: float
) -> dict[str, float]:
    """Return operations a second in two precisions; and bytes a second of a
    copy, in memory and of so few numbers that they stay in the cache."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        took = fastest(
            lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 5 * seconds
        )
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / took
    for name, numbers in (("memory", megabytes * 2**18), ("cache", vector)):
        source = torch.randn(numbers)
        target = torch.empty_like(source)
        took = fastest(lambda a=source, b=target: b.copy_(a), 2 * seconds)
        found[f"{name}_bytes"] = 2 * numbers * 4 / took
    return {name: round(rate) for name, rate in found.items()}


def works(
    size: str, rows: int, length: int, dtype: torch.dtype
) -> dict[str, Work]:
    """Return the kinds of work in a forward pass, and the optimiser's, with the
    sizes that they have in a step."""
    c = configuration(size, length, 30522, 0.0)
    h, f, v = c.hidden_size, c.intermediate_size, c.vocab_size
    t, p = rows * length, rows * predictions(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    def product(m: int, k: int, n: int) -> Work:
        x, w = random(m, k), random(n, k)
        return lambda: F.linear(x, w), 2 * m * k * n, m * k + k * n + m * n

    heads = rows, c.num_attention_heads, length, c.head_size
    q, k, u = (random(*heads) for _ in range(3))
    x, y, wide = random(t, h), random(t, h), random(t, f)
    weight, bias = random(h), random(h)
    n = t * h
    found: dict[str, Work] = {
        "projection": product(t, h, h),
        "feed-forward": product(t, h, f),
        "words": product(p, h, v),
        "attention": (
            lambda: F.scaled_dot_product_attention(q, k, u),
            4 * length * n,
            4 * n,
        ),
        "LayerNorm": (
            lambda: F.layer_norm(x, (h,), weight, bias),
            8 * n,
            2 * n,
        ),
        "GELU": (lambda: F.gelu(wide), 5 * t * f, 2 * t * f),
        "sum": (lambda: x + y, n, 3 * n),
    }
    if dtype == torch.float32:
        parameter = torch.nn.Parameter(torch.randn(v * h))  # the word table
        parameter.grad = torch.randn(v * h)
        adam = torch.optim.AdamW([parameter], fused=True)
        found["AdamW"] = adam.step, 14 * v * h, 7 * v * h
    return found


@torch.no_grad()
def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("size", choices=SIZES, nargs="?", default="mini")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="of the large copy"
    )
    parser.add_argument("--square", type=int, default=2048)
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="for each measurement"
    )
    parser.add_argument("--record", metavar="FILE")
    o = parser.parse_args(words)
    hidden = SIZES[o.size][1]
    vector = o.batch * o.length * hidden  # one vector a token
    found = ceilings(o.square, o.megabytes, vector, o.seconds)
    print({name: f"{rate / 1e9:.0f} G/s" for name, rate in found.items()})
    kernels = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, work in works(o.size, o.batch, o.length, dtype).items():
            action, flops, elements = work
            took = fastest(action, o.seconds)
            moved = elements * dtype.itemsize
            kernels.append(
                {
                    "kernel": name,
                    "precision": str(dtype).removeprefix("torch."),
                    "flops": flops,
                    "bytes": moved,
                    "seconds": took,
                }
            )
            print(
                f"{name:14}{kernels[-1]['precision']:10}"
                f"{flops / moved:8.1f} FLOP/byte{flops / took / 1e9:9.1f} GFLOP/s"
                f"{moved / took / 1e9:8.1f} GB/s",
                flush=True,
            )
    setting = {"size": o.size, "length": o.length, "pairs": o.batch}
    result = {
        "what": "roofline",
        "setting": setting,
        "ceilings": found,
        "kernels": kernels,
    }
    add_to_record(o.record, result)
    return result


if __name__ == "__main__":
    main()
