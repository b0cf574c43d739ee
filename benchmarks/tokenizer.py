"""Our tokenizer beside the library `tokenizers` used directly.

First all must give the same ids; only then they are timed, in rounds in which
each has its turn. Times are those of the processor, on one thread, so that other
programs on the machine do not count; the ratio is the median of the rounds'
own ratios.

python benchmarks/tokenizer.py [--rounds 15] [--record FILE]

The text is `lm/squad_wikipedia_articles_dev.txt.gz` in the folder BERTNB_DATA
(default ../shared/data), with the vocabulary of bert-base-uncased.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from tokenizers import Tokenizer
from transformers import BertTokenizerFast

from bertnb import WordPieceTokenizer, basic_tokenize, wordpiece

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("BERTNB_DATA", ROOT.parent / "shared/data"))
BATCH, LENGTH, READABLE = 32, 128, 100  # the readable one cuts a few lines


def programs(
    folder: str, lines: list[str]
) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return task -> who -> what to time; the first of a task is ours."""
    ours = WordPieceTokenizer.from_pretrained(folder)
    ours.save_pretrained(folder)
    direct = Tokenizer.from_file(f"{folder}/tokenizer.json")
    framed = Tokenizer.from_file(f"{folder}/tokenizer.json")
    framed.enable_truncation(LENGTH)
    framed.enable_padding()
    theirs = BertTokenizerFast.from_pretrained(folder)
    batches = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]

    def tensors(inputs: list[Any]) -> list[torch.Tensor]:
        encoded = framed.encode_batch_fast(inputs)
        return [
            torch.tensor([row.ids for row in encoded]),
            torch.tensor([row.type_ids for row in encoded]),
            torch.tensor([row.attention_mask for row in encoded]),
        ]

    def hugging_face(*texts: list[str]) -> list[torch.Tensor]:
        out = theirs(
            *texts,
            max_length=LENGTH,
            truncation=True,
            padding=True,
            return_tensors="pt",
        )
        return list(out.values())

    def by_hand() -> list[list[int]]:
        ids = ours.vocabulary
        return [
            [ids[p] for w in basic_tokenize(t) for p in wordpiece(w, ids)]
            for t in lines[:READABLE]
        ]

    return {
        "ids of lines": {
            "bertnb": lambda: ours.ids(lines),
            "tokenizers": lambda: [
                row.ids
                for row in direct.encode_batch_fast(
                    lines, add_special_tokens=False
                )
            ],
            "transformers": lambda: theirs(lines, add_special_tokens=False)[
                "input_ids"
            ],
        },
        "tensors of texts": {
            "bertnb": lambda: [
                list(ours(b, max_length=LENGTH).values()) for b in batches
            ],
            "tokenizers": lambda: [tensors(b) for b in batches],
            "transformers": lambda: [hugging_face(b) for b in batches],
        },
        "tensors of pairs": {
            "bertnb": lambda: [
                list(ours(b, b[::-1], max_length=LENGTH).values())
                for b in batches
            ],
            "tokenizers": lambda: [
                tensors(list(zip(b, b[::-1], strict=True))) for b in batches
            ],
            "transformers": lambda: [hugging_face(b, b[::-1]) for b in batches],
        },
        f"ids of {READABLE} lines": {
            "bertnb": lambda: ours.ids(lines[:READABLE]),
            "readable": by_hand,
        },
    }


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, list) else value


def measure(
    runs: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, dict[str, float]]:
    """Return who -> median seconds, and the median ratio of ours to them."""
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(rounds):
        names = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for who in names:
            started = time.process_time()
            runs[who]()
            seconds[who].append(time.process_time() - started)
    mine = seconds["bertnb"]
    return {
        who: {
            "cpu_seconds": round(statistics.median(times), 5),
            "bertnb_takes": round(
                statistics.median(
                    a / b for a, b in zip(mine, times, strict=True)
                ),
                3,
            ),
        }
        for who, times in seconds.items()
    }


def facts() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(
        r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else ""
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    )
    names = ("tokenizers", "transformers", "torch")
    return {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {
            "cpu": found[1] if found else platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in names},
        },
        "seed": None,
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "lm/squad_wikipedia_articles_dev.txt.gz"
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    characters = sum(map(len, lines))
    print(f"{len(lines):,} lines, {characters:,} characters")
    record: dict[str, Any] = {
        **facts(),
        "text": {"name": name, "lines": len(lines), "characters": characters},
        "tasks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(
            DATA / "vocabs/bert-base-uncased-vocab.txt", f"{folder}/vocab.txt"
        )
        for task, runs in programs(folder, lines).items():
            results = [plain(run()) for run in runs.values()]  # the gate
            if any(result != results[0] for result in results):
                raise SystemExit(f"{task}: the results differ; not timed")
            record["tasks"][task] = measure(runs, arguments.rounds)
            for who, found in record["tasks"][task].items():
                print(
                    f"{task:18} {who:13} {found['cpu_seconds']:8.3f} s,"
                    f" ours takes {found['bertnb_takes']:.3f} of it",
                    flush=True,
                )
    if arguments.record:
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        Path(arguments.record).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
