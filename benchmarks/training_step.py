"""One training step of ours beside one of `transformers`, like for like.

python benchmarks/training_step.py mini [--compile] [--record FILE]

First both must give the same losses and gradients from the same weights and
batch; only then they are timed, in rounds in which each has its turn. A step is
everything: copy to the device, forward, backward, clipping, fused AdamW. With
`--curve STEPS` both are trained that long without dropout, and the largest
difference of their losses is reported instead of times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from peers import (
    BOUNDS,
    SIZES,
    Peer,
    add_to_record,
    autocast,
    configuration,
    gate,
    models,
    peak_megabytes,
    predictions,
    problem,
    race,
    show,
    warm_up,
    wikipedia_lengths,
)

ROWS = {"tiny": 2, "mini": 8, "small": 8, "base": 4, "large": 1}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, help="pairs; default by the size")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--precision", default="float32", choices=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--packed", action="store_true", help="Wikipedia's lengths, ours packed"
    )
    parser.add_argument("--curve", type=int, metavar="STEPS")
    parser.add_argument("--record", metavar="FILE")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.batch = options.batch or ROWS[options.size]
    return options


def pairs(options: argparse.Namespace, number: int, seed: int = 0) -> Any:
    """Return a batch of `number` pairs: full rows, or Wikipedia's lengths."""
    lengths = [options.length] * number
    if options.packed:
        lengths = wikipedia_lengths(number, options.length, seed)
    depth = 8 if options.packed else 1
    return problem(lengths, options.length, options.vocabulary, depth, seed)


def compiled(options: argparse.Namespace, model: torch.nn.Module) -> Any:
    if not options.compile:
        return model
    return torch.compile(model, dynamic=False, backend=options.backend)


def warm_and_compare(
    peers: list[Peer], options: argparse.Namespace
) -> dict[str, float]:
    """Take the first steps; without dropout, return how far compilation moved
    each peer's first loss, and stop if it did."""
    moved = {}
    for peer in peers:
        peer.model.train()
        with torch.no_grad(), autocast(peer.device, peer.precision):
            loss = float(peer.model(**peer.batch).loss)
        warm_up(peer, 2)
        if not options.dropout:
            moved[peer.name] = abs(peer.first_loss - loss)
            if not moved[peer.name] <= BOUNDS[peer.precision]:
                raise SystemExit(f"compiled, the loss is another one: {moved}")
    return moved


def memory(options: argparse.Namespace) -> None:
    """Take three steps of one peer, and print its peak: runs in a process of
    its own, for the system counts per process."""
    device, precision = torch.device("cpu"), getattr(torch, options.precision)
    batches = pairs(options, options.batch)
    config = configuration(
        options.size, options.length, options.vocabulary, options.dropout
    )
    both = dict(zip(("ours", "theirs"), models(config, device), strict=True))
    model = both.pop(options.memory)
    both.clear()  # the other model
    start = peak_megabytes()
    batch = getattr(batches, options.memory)
    peer = Peer(options.memory, model, batch, batches.tokens, device, precision)
    for _ in range(3):
        peer.step()
    print(
        json.dumps(
            {"start_megabytes": start, "peak_megabytes": peak_megabytes()}
        )
    )


def peak_of(options: argparse.Namespace, who: str) -> dict[str, float]:
    """Return what `memory` prints for one peer, in a fresh process."""
    names = ("length", "batch", "dropout", "vocabulary", "precision")
    given = [f"--{name}={getattr(options, name)}" for name in names]
    given += ["--packed"] if options.packed else []
    command = [sys.executable, __file__, options.size, *given, "--memory", who]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """Train both on the same batches; return the largest loss difference."""
    device = torch.device(options.device)
    config = configuration(
        options.size, options.length, options.vocabulary, dropout=0.0
    )
    ours, theirs = models(config, device)
    batches = [pairs(options, options.batch, seed) for seed in range(20)]
    peers = [
        Peer("ours", ours, {}, 1, device),
        Peer("theirs", theirs, {}, 1, device),
    ]
    differences, first, last = [], 0.0, 0.0
    for step in range(options.curve):
        found = []
        for peer in peers:
            peer.batch = getattr(batches[step % len(batches)], peer.name)
            peer.model.train()
            found.append(peer.step().item())
        differences.append(abs(found[0] - found[1]))
        first, last = (first if step else found[0]), found[0]
    print(
        f"{options.curve} steps: loss {first:.4f} to {last:.4f}, "
        f"largest difference {max(differences):.1e}"
    )
    return {
        "steps": options.curve,
        "first_loss": round(first, 5),
        "last_loss": round(last, 5),
        "largest_difference": max(differences),
        "first_difference": differences[0],
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run the gate, then the race."""
    device, precision = (
        torch.device(options.device),
        getattr(torch, options.precision),
    )
    config = configuration(
        options.size, options.length, options.vocabulary, options.dropout
    )
    ours, theirs = models(config, device)
    few = pairs(options, min(options.batch, 8), seed=1)
    passed = gate(ours, theirs, few, device, precision)
    if not passed["passed"]:
        raise SystemExit(f"the gate failed, so nothing is timed: {passed}")
    batches = pairs(options, options.batch)
    peers = [
        Peer(
            name,
            model,
            batch,
            batches.tokens,
            device,
            precision,
            compiled(options, model),
        )
        for name, model, batch in (
            ("ours", ours, batches.ours),
            ("theirs", theirs, batches.theirs),
        )
    ]
    result: dict[str, Any] = {"gate": passed}
    if options.compile:
        result["compilation_moves_loss"] = warm_and_compare(peers, options)
    else:
        for peer in peers:
            warm_up(peer, 2)
    result |= race(peers, options.rounds)
    if device.type == "cpu" and not options.compile:
        for name, peer in result["peers"].items():
            peer |= peak_of(options, name)
    return result


def main(words: list[str] | None = None) -> dict[str, Any]:
    options = arguments(words)
    if options.memory:
        memory(options)
        return {}
    setting = {
        "size": options.size,
        "length": options.length,
        "pairs": options.batch,
        "packed": options.packed,
        "compiled": options.compile,
        "precision": options.precision,
        "dropout": 0.0 if options.curve else options.dropout,
        "vocabulary": options.vocabulary,
        "predictions_a_full_row": predictions(options.length),
    }
    print(", ".join(f"{k} {v}" for k, v in setting.items()), flush=True)
    if options.curve:
        result = {"what": "curve", "setting": setting, **curve(options)}
    else:
        result = {"what": "step", "setting": setting, **compare(options)}
        show(result)
    add_to_record(options.record, result)
    return result


if __name__ == "__main__":
    main()
