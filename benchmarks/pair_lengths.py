"""How full rows are, one pair a row and packed, by the length of the texts.

    BERTNB_DATA=FOLDER python benchmarks/pair_lengths.py book/runs/pair-lengths.jsonl

takes about a minute on one core. The texts: the State of the Union addresses
and their paragraphs; the Wikipedia articles of `lm/` and their paragraphs,
where that folder is; and lengths drawn from the published histogram of the
original's pairs of all of Wikipedia (`peers.WIKIPEDIA`). The first line of the
record says how it was made; each other line is one text, sampler and length of
a row. The chapter on rows shows it.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import facts, wikipedia_lengths

from bertnb import (
    SAMPLERS,
    Document,
    Pair,
    WordPieceTokenizer,
    book_model,
    encode_documents,
    load_sotu,
    pack_pairs,
    read_folder,
)

DEPTHS = (1, 2, 3, 4, 8, 16)


def paragraphs(documents: list[Document]) -> list[Document]:
    """Return each paragraph as a document of its own."""
    return [
        Document(f"{document.name}#{i}", text)
        for document in documents
        for i, text in enumerate(document.text.split("\n\n"))
        if text.strip()
    ]


def texts() -> Iterator[tuple[str, list[Document]]]:
    corpora = {"addresses": load_sotu()}
    data = os.environ.get("BERTNB_DATA")
    if data:
        file = Path(data, "lm", "squad_wikipedia_articles.txt.gz")
        corpora["articles"] = list(read_folder(file, blank_lines=True))
    for name, documents in corpora.items():
        if name == "articles":  # a line of the file is a paragraph
            documents = [
                Document(d.name, d.text.replace("\n", "\n\n"))
                for d in documents
            ]
        yield name, documents
        yield f"paragraphs of {name}", paragraphs(documents)


def packed(pairs: list[Pair], length: int) -> dict[str, Any]:
    """Return the pairs' lengths, and how full their rows are by `pack`."""
    sizes = [3 + len(pair.first) + len(pair.second) for pair in pairs]
    rows = {d: len(pack_pairs(pairs, length, d)) for d in DEPTHS}
    return {
        "pairs": len(pairs),
        "mean_tokens": round(sum(sizes) / len(sizes), 2),
        "filled": {
            d: round(sum(sizes) / length / n, 4) for d, n in rows.items()
        },
        "gain": {d: round(len(pairs) / n, 3) for d, n in rows.items()},
        "pairs_by_tenth": [  # of the row's length, up to it
            sum(10 * (n - 1) // length == tenth for n in sizes)
            for tenth in range(10)
        ],
    }


def main() -> None:
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    lines: list[dict[str, Any]] = [facts() | {"pieces": tokenizer.vocab_size}]
    for name, documents in texts():
        encoded = encode_documents(documents, tokenizer)
        tokens = sum(len(s) for document in encoded for s in document)
        for length in (128, 512):
            for sampler, draw in SAMPLERS.items():
                pairs = draw(encoded, length - 3, random.Random(0))
                lines.append(
                    {"text": name, "documents": len(encoded), "tokens": tokens}
                    | {"length": length, "sampler": sampler}
                    | packed(pairs, length)
                )
                print(json.dumps(lines[-1]), flush=True)
    drawn = wikipedia_lengths(50_000, 512)
    pairs = [Pair([0] * (n // 2), [0] * (n - n // 2 - 3), 0) for n in drawn]
    lines.append(
        {"text": "Wikipedia, lengths as published", "length": 512}
        | {"sampler": "original"}
        | packed(pairs, 512)
    )
    print(json.dumps(lines[-1]))
    if sys.argv[1:]:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
