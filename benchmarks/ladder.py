"""What each optimisation brings to a training step: one more on each rung.

python benchmarks/ladder.py [SIZE] [--record FILE]

All rungs run the same model on the same batch, in rounds in which each has its
turn; a rung's gain is the median of the rounds' own ratios to the rung before.
First all must give the same loss.
"""

from __future__ import annotations

import argparse
import functools
from itertools import pairwise
from typing import Any

import torch
from peers import (
    SIZES,
    Peer,
    add_to_record,
    autocast,
    configuration,
    our_model,
    problem,
    race,
    show,
    spread,
    warm_up,
)

from bertnb.optimization import parameter_groups

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def rungs(
    size: str,
    length: int,
    rows: int,
    vocabulary: int,
    dropout: float,
    backend: str,
) -> list[Peer]:
    """Return the variants, the plainest first, all with the same weights."""
    device = torch.device("cpu")
    config = configuration(size, length, vocabulary, dropout)
    model = our_model(config, device)
    batches = problem([length] * rows, length, vocabulary)
    every, hidden = batches.theirs, batches.ours
    # asked for all states, the last layer computes all places
    all_places = functools.partial(model, output_hidden_states=True)
    plain = torch.optim.AdamW(parameter_groups(model), lr=1e-4)
    call = torch.compile(model, dynamic=False, backend=backend)
    float32, bfloat16 = torch.float32, torch.bfloat16
    variants: list[tuple[str, Any, torch.dtype, Any, Any]] = [
        ("every position decoded", every, float32, model, plain),
        ("hidden positions only", hidden, float32, all_places, plain),
        ("last layer where read", hidden, float32, model, plain),
        ("fused AdamW", hidden, float32, model, None),
        ("compiled", hidden, float32, call, None),
        ("bfloat16", hidden, bfloat16, call, None),
    ]
    return [
        Peer(
            name, model, batch, batches.tokens, device, precision, do, optimizer
        )
        for name, batch, precision, do, optimizer in variants
    ]


@torch.no_grad()
def check(peers: list[Peer]) -> dict[str, float]:
    """Return each rung's loss without dropout; stop where they differ."""
    found = {}
    for peer in peers:
        peer.model.eval()
        with autocast(peer.device, peer.precision):
            found[peer.name] = float(peer.model(**peer.batch).loss)
        difference = abs(found[peer.name] - found[peers[0].name])
        if not difference <= BOUND[peer.precision]:
            raise SystemExit(f"not timed, for the losses differ: {found}")
    print(f"the same loss on every rung, {found[peers[0].name]:.4f}")
    return {name: round(loss, 6) for name, loss in found.items()}


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("size", choices=SIZES, nargs="?", default="mini")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--record", metavar="FILE")
    o = parser.parse_args(words)
    peers = rungs(o.size, o.length, o.batch, o.vocabulary, o.dropout, o.backend)
    losses = check(peers)
    for peer in peers:
        warm_up(peer, 2)
    result = {
        "what": "ladder",
        "setting": {
            "size": o.size,
            "length": o.length,
            "pairs": o.batch,
            "dropout": o.dropout,
            "vocabulary": o.vocabulary,
        },
        "losses": losses,
        **race(peers, o.rounds),
    }
    times = list(result["times"].items())
    result["gains"] = {
        name: spread(
            [a / b for a, b in zip(before, after, strict=True)], 3, "gain"
        )
        for (_, before), (name, after) in pairwise(times)
    }
    show(result)
    for name, gain in result["gains"].items():
        print(f"{name:24} {gain['gain']:.2f}x faster than the rung before")
    add_to_record(o.record, result)
    return result


if __name__ == "__main__":
    main()
