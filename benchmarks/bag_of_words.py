"""Score SST-2 by a bag of words, the opponent of every classifier.

    BERTNB_DATA=../shared/data python benchmarks/bag_of_words.py

Words as the files have them, split at spaces, weighted by their rarity, and
a logistic regression; then also pairs of neighbouring words.
"""

from __future__ import annotations

import argparse
import time

import peers
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from bertnb.named_sets import load_examples


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, help="learn from the first ones")
    parser.add_argument("--record", default="book/runs/bag-of-words.jsonl")
    asked = parser.parse_args(arguments)
    train = load_examples("sst2", "train")[: asked.texts]
    test = load_examples("sst2", "validation")
    for longest in (1, 2):
        began = time.perf_counter()
        words = TfidfVectorizer(
            token_pattern=r"\S+", ngram_range=(1, longest), sublinear_tf=True
        )
        model = LogisticRegression(C=10, max_iter=1000)
        model.fit(
            words.fit_transform([e.text for e in train]),
            [e.label for e in train],
        )
        right = model.score(
            words.transform([e.text for e in test]), [e.label for e in test]
        )
        entry = {
            "task": "sst2",
            "by": "bag of words",
            "words in a row": longest,
            "features": len(words.vocabulary_),
            "examples": len(train),
            "scored": len(test),
            "scores": {"accuracy": round(float(right), 5)},
            "seconds": round(time.perf_counter() - began, 1),
        }
        peers.add_line(asked.record, entry | peers.facts(None))
        print(entry, flush=True)


if __name__ == "__main__":
    main()
