"""The speed table of one GPU: everything that a short lease can answer.

python benchmarks/gpu.py --record FILE [--seconds 330] [--parts NAME ...]

Parts run in the order of their importance until the time is used; the record is
written after each, and a part that fails is noted and left. Called again with
the same record, it goes on with the parts that are still missing. Everything
runs on a CPU too: `python benchmarks/gpu.py --tiny --device cpu`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import torch
from peers import (
    Peer,
    Problem,
    configuration,
    facts,
    gate,
    models,
    our_model,
    predictions,
    problem,
    race,
    seconds,
    show,
    warm_up,
    wikipedia_lengths,
)

from bertnb import layers
from bertnb.configuration import BertConfig
from bertnb.speed import model_flops_utilization, training_flops

DATASHEET = 989e12  # dense bf16 of an H100 or H200 (SXM), operations a second
DEPTH = 8  # pairs in a packed row, at most


@dataclass
class Lease:
    """What the parts need to know, and what they have found."""

    device: torch.device
    tiny: bool
    backend: str
    deadline: float
    record: dict[str, Any]
    dropout: float = 0.1
    rounds: int = 10

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def config(
        self, size: str, length: int, vocabulary: int = 30522
    ) -> BertConfig:
        size = "tiny" if self.tiny else size
        words = vocabulary - 30000 if self.tiny else vocabulary
        return configuration(size, length, words, self.dropout)

    def length(self, length: int) -> int:
        return length // 8 if self.tiny else length

    def rows(self, rows: int) -> int:
        return 8 if self.tiny else rows

    def compiled(self, model: torch.nn.Module) -> Callable[..., Any]:
        return torch.compile(model, dynamic=False, backend=self.backend)


# %% Useful work
def useful_flops(config: BertConfig, lengths: Sequence[int]) -> int:
    """Count the operations that the pairs need: no padding, all layers full."""
    return sum(training_flops(config, n, predictions(n)) for n in lengths)


def add_utilization(
    result: dict[str, Any], per_token: float, lease: Lease
) -> None:
    """Add the useful rate of each peer, and its share of both ceilings."""
    measured = lease.record["parts"].get("ceilings", {}).get("matmul_flops")
    for peer in result["peers"].values():
        work, took = per_token * peer["tokens"], peer["seconds"]
        peer["useful_tflops"] = round(work / took / 1e12, 4)
        for name, peak in (("measured", measured), ("datasheet", DATASHEET)):
            if peak:
                share = model_flops_utilization(work, took, peak)
                peer[f"mfu_of_{name}"] = round(share, 4)


# %% Parts
def timed(action: Callable[[], Any], device: torch.device, times: int) -> float:
    """Return the median seconds of an action on the device."""
    found = []
    for _ in range(times + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[3:])


def ceilings(lease: Lease) -> dict[str, Any]:
    """Measure what the card can do: a large product, and a large copy."""
    n = 256 if lease.tiny else 8192
    half = {"device": lease.device, "dtype": torch.bfloat16}
    a, b = torch.randn(n, n, **half), torch.randn(n, n, **half)
    out = torch.empty(n, n, **half)
    took = timed(lambda: torch.mm(a, b, out=out), lease.device, 20)
    source = torch.randn(2**20 if lease.tiny else 2**31, **half)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), lease.device, 10)
    return {
        "matmul": f"{n}^3, bf16, random",
        "matmul_flops": round(2 * n**3 / took),
        "copy_bytes_per_second": round(
            2 * source.numel() * source.element_size() / copied
        ),
    }


def gates(
    lease: Lease, ours: Any, theirs: Any, small: Problem
) -> list[dict[str, Any]]:
    return [
        gate(ours, theirs, small, lease.device, precision)
        for precision in (torch.float32, torch.bfloat16)
    ]


def against(
    lease: Lease, size: str, length: int, number: int, packed: bool, eager: bool
) -> dict[str, Any]:
    """Race ours against theirs, both compiled in bf16, on the same pairs; and,
    with half the pairs, both without compilation."""
    length, number = lease.length(length), lease.rows(number)
    config = lease.config(size, length)
    ours, theirs = models(config, lease.device)

    def pairs(number: int, seed: int = 0) -> Problem:
        lengths = [length] * number
        if packed:
            lengths = wikipedia_lengths(number, length, seed)
        depth = DEPTH if packed else 1
        return problem(lengths, length, config.vocab_size, depth, seed)

    result: dict[str, Any] = {
        "size": size,
        "config": config.to_dict(),
        "length": length,
        "packed": packed,
        "pairs": number,
        "gates": gates(
            lease, ours, theirs, pairs(min(number, max(8, 8192 // length)), 1)
        ),
    }
    whole, half = pairs(number), pairs(number // 2)
    common = {"device": lease.device, "precision": torch.bfloat16}
    peers = [
        Peer("ours compiled", ours, whole.ours, whole.tokens, **common),
        Peer("theirs compiled", theirs, whole.theirs, whole.tokens, **common),
    ]
    for peer in peers:
        peer.call = lease.compiled(peer.model)
    if eager:
        peers += [
            Peer("theirs eager", theirs, half.theirs, half.tokens, **common),
            Peer("ours eager", ours, half.ours, half.tokens, **common),
        ]
    for peer in peers:
        warm_up(peer, 5)
        print(f"{peer.name}: first step {peer.first_seconds:.1f} s", flush=True)
    result |= {
        "rows": {p.name: len(p.batch["input_ids"]) for p in peers},
        **race(peers, lease.rounds, 1 if lease.tiny else 5),
    }
    work = useful_flops(config, whole.lengths)
    add_utilization(result, work / whole.tokens, lease)
    show(result)
    return result


def fitting(
    lease: Lease, size: str, length: int, number: int, packed: bool, eager: bool
) -> dict[str, Any]:
    """Race with as many pairs as fit in the memory: halve until they do."""
    while True:
        try:
            return against(lease, size, length, number, packed, eager)
        except torch.OutOfMemoryError:
            if number < 16:
                raise
            number //= 2
            print(f"out of memory: {number} pairs instead", flush=True)
        clean()


def ours_alone(
    lease: Lease,
    config: BertConfig,
    length: int,
    number: int,
    precision: torch.dtype,
    compiled: bool = True,
) -> dict[str, float]:
    """Time our step alone, on full rows, in a graph of its own."""
    clean()
    batch = problem([length] * number, length, config.vocab_size)
    model = our_model(config, lease.device)
    peer = Peer(
        "ours", model, batch.ours, batch.tokens, lease.device, precision
    )
    if compiled:
        peer.call = lease.compiled(model)
    warm_up(peer, 5)
    took = statistics.median(seconds(peer, 1) for _ in range(20))
    return {
        "seconds": round(took, 5),
        "tokens_per_second": round(batch.tokens / took),
        "first_step_seconds": round(peer.first_seconds, 2),
        "peak_megabytes": round(peer.peak_bytes / 2**20),
    }


def shallow(lease: Lease, length: int, vocabulary: int = 30522) -> BertConfig:
    """Return base with four of its layers: it compiles in a third of the time."""
    config = lease.config("base", length, vocabulary)
    return replace(config, num_hidden_layers=2 if lease.tiny else 4)


def micro_batch(lease: Lease) -> dict[str, Any]:
    """Time four layers of base at length 128 for more and more rows."""
    length = lease.length(128)
    config = shallow(lease, length)
    found = []
    for rows in (4, 8) if lease.tiny else (16, 64, 256, 1024):
        here = ours_alone(lease, config, length, rows, torch.bfloat16)
        work = useful_flops(config, [length] * rows)
        rate = round(work / here["seconds"] / 1e12, 4)
        found.append({"rows": rows, **here, "useful_tflops": rate})
        print(found[-1], flush=True)
    return {"layers": config.num_hidden_layers, "scaling": found}


@contextlib.contextmanager
def float32_stream() -> Iterator[None]:
    """Let LayerNorm return float32 under autocast, as PyTorch's own does."""
    kept = layers.LayerNorm.forward
    layers.LayerNorm.forward = torch.nn.LayerNorm.forward
    try:
        yield
    finally:
        layers.LayerNorm.forward = kept


def precision(lease: Lease) -> dict[str, Any]:
    """Time four layers of base in each precision."""
    length, rows = lease.length(128), lease.rows(256)
    config = shallow(lease, length)
    matmul = torch.backends.cuda.matmul
    found: dict[str, Any] = {"layers": config.num_hidden_layers, "rows": rows}
    for name, dtype, setting in (
        ("bfloat16", torch.bfloat16, contextlib.nullcontext()),
        ("bfloat16, float32 stream", torch.bfloat16, float32_stream()),
        ("tf32", torch.float32, contextlib.nullcontext()),
        ("float32", torch.float32, contextlib.nullcontext()),
    ):
        matmul.allow_tf32 = name == "tf32"
        with setting:
            found[name] = ours_alone(lease, config, length, rows, dtype)
        print(name, found[name], flush=True)
    matmul.allow_tf32 = False
    return found


def vocabulary(lease: Lease) -> dict[str, Any]:
    """Time four layers of base with BERT's vocabulary, and with six words more:
    a multiple of 64."""
    length, rows = lease.length(128), lease.rows(256)
    found: dict[str, Any] = {"rows": rows}
    for size in (30522, 30528):
        config = shallow(lease, length, size)
        found["layers"] = config.num_hidden_layers
        for compiled in (True, False):
            name = f"{size} {'compiled' if compiled else 'eager'}"
            found[name] = ours_alone(
                lease, config, length, rows, torch.bfloat16, compiled
            )
            print(name, found[name], flush=True)
    return found


# name -> what runs, and the seconds it may need on an H100
PARTS: dict[str, tuple[Callable[[Lease], dict[str, Any]], float]] = {
    "ceilings": (ceilings, 10),
    "base_128": (lambda x: fitting(x, "base", 128, 512, False, True), 100),
    "base_512": (lambda x: fitting(x, "base", 512, 128, True, False), 90),
    "large_512": (lambda x: fitting(x, "large", 512, 64, True, False), 150),
    "large_128": (lambda x: fitting(x, "large", 128, 256, False, False), 150),
    "micro_batch": (micro_batch, 70),
    "precision": (precision, 60),
    "vocabulary": (vocabulary, 50),
}


# %% The lease
def clean() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def alarm(*_: Any) -> None:
    raise TimeoutError("the time of the lease is used")


def run_part(lease: Lease, name: str) -> dict[str, Any]:
    """Run one part; what goes wrong is its result."""
    part, needs = PARTS[name]
    needs = 0 if lease.tiny else needs
    if lease.left() <= needs:
        return {"skipped": f"{lease.left():.0f} s left, it may need {needs}"}
    print(f"== {name} ({lease.left():.0f} s left)", flush=True)
    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(max(1, round(lease.left())))
    started = time.monotonic()
    try:
        result = part(lease)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(result, flush=True)
    finally:
        signal.alarm(0)
    clean()
    return {**result, "took_seconds": round(time.monotonic() - started, 1)}


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", help="of torch.compile", default=None)
    parser.add_argument("--rounds", type=int, help="default: 10, tiny: 2")
    parser.add_argument("--tiny", action="store_true", help="a trial run")
    options = parser.parse_args(words)
    backend = options.backend or ("aot_eager" if options.tiny else "inductor")
    record: dict[str, Any] = {"facts": facts(), "parts": {}}
    if options.record and options.record.exists():
        record["parts"] = json.loads(options.record.read_text())["parts"]
    record["facts"]["tiny"] = options.tiny
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    lease = Lease(device, options.tiny, backend, deadline, record)
    lease.rounds = options.rounds or (2 if options.tiny else 10)
    for name in options.parts:
        done = record["parts"].get(name, {"skipped": ""})
        if not {"skipped", "error"} & done.keys():
            continue
        record["parts"][name] = run_part(lease, name)
        if options.record:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record, indent=1) + "\n"
            options.record.write_text(text, encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
