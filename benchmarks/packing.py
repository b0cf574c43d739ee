"""Several pairs in a row, beside one: real tokens a second at length 512.

python benchmarks/packing.py [SIZE] [--record FILE]

The lengths of the pairs are Wikipedia's, by a published histogram (peers.py);
what they hold is random. Ours packed and padded, and theirs padded, must give
the same losses and gradients before they are timed. Then follows how full rows
become, for these lengths and for the pairs of the State of the Union addresses.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from peers import (
    MLM,
    SIZES,
    Peer,
    add_to_record,
    configuration,
    gate,
    models,
    problem,
    race,
    random_pair,
    show,
    warm_up,
    wikipedia_lengths,
)

from bertnb.data import encode_documents, load_sotu
from bertnb.next_sentence import Pair, sample_pairs
from bertnb.pretraining import book_model
from bertnb.rows import pack_pairs
from bertnb.tokenization import WordPieceTokenizer

DEPTHS = (1, 2, 3, 4, 8, 16)


def sotu_pairs(length: int, documents: int) -> list[Pair]:
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    encoded = encode_documents(load_sotu()[:documents], tokenizer)
    return sample_pairs(encoded, length - 3, random.Random(0))


def fill(pairs: list[Pair], length: int) -> dict[str, Any]:
    """Return the share of real tokens in rows of up to 1, 2, 3, ... pairs."""
    tokens = sum(3 + len(pair.first) + len(pair.second) for pair in pairs)
    shares = {}
    for depth in DEPTHS:
        rows = pack_pairs(pairs, length, depth)
        shares[str(depth)] = round(tokens / (len(rows) * length), 4)
    most = sum(len(p.first) + len(p.second) + 3 == length for p in pairs)
    return {
        "pairs": len(pairs),
        "mean_tokens": round(tokens / len(pairs), 1),
        "of_full_length": round(most / len(pairs), 4),
        "full": shares,
    }


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("size", choices=SIZES, nargs="?", default="mini")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--documents", type=int, default=237)
    parser.add_argument("--record", metavar="FILE")
    o = parser.parse_args(words)
    device = torch.device("cpu")
    config = configuration(o.size, o.length, o.vocabulary, 0.1)
    ours, theirs = models(config, device)
    lengths = wikipedia_lengths(o.pairs, o.length)
    packed, padded = (
        problem(lengths, o.length, o.vocabulary, depth)
        for depth in (o.depth, 1)
    )
    gates = [
        gate(ours, theirs, batches, device) for batches in (packed, padded)
    ]
    if not all(found["passed"] for found in gates):
        raise SystemExit(f"the gate failed, so nothing is timed: {gates}")
    peers = [
        Peer(name, model, batch, packed.tokens, device)
        for name, model, batch in (
            ("ours packed", ours, packed.ours),
            ("ours padded", ours, padded.ours),
            ("theirs padded", theirs, padded.theirs),
        )
    ]
    for peer in peers:
        warm_up(peer, 1)
    rng = random.Random(0)
    many = [
        random_pair(i, n, 30522, rng)
        for i, n in enumerate(wikipedia_lengths(4096, o.length))
    ]
    result = {
        "what": "packing",
        "setting": {
            "size": o.size,
            "length": o.length,
            "pairs": o.pairs,
            "depth": o.depth,
            "share_hidden": MLM,
            "dropout": 0.1,
        },
        "gates": gates,
        "rows": {p.name: len(p.batch["input_ids"]) for p in peers},
        **race(peers, o.rounds),
        "fill": {
            "Wikipedia": fill(many, o.length),
            "State of the Union": fill(
                sotu_pairs(o.length, o.documents), o.length
            ),
        },
    }
    show(result)
    for name, found in result["fill"].items():
        print(name, found)
    add_to_record(o.record, result)
    return result


if __name__ == "__main__":
    main()
