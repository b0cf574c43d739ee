"""Questions about taggers, and what came out, written to a record.

    BERTNB_DATA=../shared/data python benchmarks/taggers.py pieces --seed 0

`pieces`: wikigold, MiniLM-L6; labels on the first piece of a word, on every
piece (I on the later ones), or each word's label copied to all of its pieces.
Entities are counted in words, as the task does, and in pieces.

`cluener`: Chinese characters as words, with the vocabulary of
bert-base-chinese and a small encoder that starts untrained.

`dictionary`: of the entities of the training sentences, the longest match; how
well it does on WNUT-17, wikigold and CLUENER.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peers
import torch
from trainer import data_folder, minilm

from bertnb.configuration import BertConfig
from bertnb.entities import (
    BertForTokenClassification,
    TokenClassification,
    entity_scores,
    spans,
)
from bertnb.examples import TokenExample
from bertnb.fine_tuning import fine_tune
from bertnb.folders import PretrainedModel
from bertnb.masked_lm import IGNORE
from bertnb.named_sets import load_examples
from bertnb.tasks import FineTuneConfig, Row, load_for_task, predict, row_logits
from bertnb.tokenization import WordPieceTokenizer

SCORES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class Copied(TokenClassification):
    """The label of a word on each of its pieces, as many scripts have it."""

    def rows(
        self,
        examples: Sequence[TokenExample],
        tokenizer: WordPieceTokenizer,
        max_length: int,
    ) -> list[Row]:
        return [
            replace(row, targets={"labels": copied(row.targets["labels"])})
            for row in super().rows(examples, tokenizer, max_length)
        ]


def copied(labels: list[int]) -> list[int]:
    """Give pieces without a label that of the piece before, [SEP] none."""
    found = labels[:1]
    for label in labels[1:-1]:
        found.append(found[-1] if label == IGNORE else label)
    return [*found, IGNORE]


def kept(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(scores[name], 4) for name in SCORES}


def train(
    task: TokenClassification,
    model: PretrainedModel,
    tokenizer: WordPieceTokenizer,
    plan: FineTuneConfig,
) -> None:
    if stopped := fine_tune(task, model, tokenizer, plan).stopped:
        raise SystemExit(f"{stopped}: nothing is recorded")


def pieces(
    kind: str, seed: int, plan: FineTuneConfig, limit: int | None = None
) -> dict[str, Any]:
    """Train with labels of this kind; count entities in words and in pieces."""
    training = load_examples("wikigold", "train")[:limit]
    test = load_examples("wikigold", "test")[:limit]
    chosen = Copied if kind == "copied" else TokenClassification
    task = chosen(training, label_all_pieces=kind == "every")
    model, tokenizer = load_for_task(task, minilm(), seed)
    began = time.perf_counter()
    train(task, model, tokenizer, replace(plan, seed=seed))
    seconds = time.perf_counter() - began
    answers = predict(task, model, tokenizer, test)
    names = list(task.labels or ())
    rows = task.rows(test, tokenizer, plan.max_length)
    gold, found = [], []
    for row, z in zip(
        rows, row_logits(task, model, rows, tokenizer.pad_token_id), strict=True
    ):
        labels = row.targets["labels"]
        pairs = zip(labels, z.argmax(-1).tolist(), strict=True)
        found.append([names[k] for y, k in pairs if y != IGNORE])
        gold.append([names[y] for y in labels if y != IGNORE])
    tags = [example.tags or () for example in test]
    return {
        "labels": kind,
        "in words": kept(task.score(test, answers)),
        "in pieces": kept(entity_scores(gold, found)),
        "entities": {
            "in words": sum(len(spans(t)) for t in tags),
            "in pieces": sum(len(spans(t)) for t in gold),
        },
        "examples": len(training),
        "scored": len(test),
        "seconds": round(seconds, 1),
    }


def dictionary(name: str, split: str) -> dict[str, Any]:
    """Find the entities of the training sentences, the longest from the left."""
    training, test = load_examples(name, "train"), load_examples(name, split)
    seen: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for example in training:
        for kind, start, end in spans(example.tags):
            seen[example.words[start:end]][kind] += 1
    longest = max(map(len, seen))
    found = []
    for example in test:
        words, tags, start = example.words, ["O"] * len(example.words), 0
        while start < len(words):
            for end in range(min(len(words), start + longest), start, -1):
                if kinds := seen.get(words[start:end]):
                    kind = kinds.most_common(1)[0][0]
                    inside = [f"I-{kind}"] * (end - start - 1)
                    tags[start:end] = [f"B-{kind}", *inside]
                    break
            else:
                end = start + 1
            start = end
        found.append(tags)
    names = [e.words[i:j] for e in test for _, i, j in spans(e.tags)]
    return {
        "task": name,
        "scores": kept(entity_scores([e.tags for e in test], found)),
        "names": len(names),
        "names seen in training": sum(n in seen for n in names),
        "examples": len(training),
        "scored": len(test),
    }


def cluener(
    seed: int, plan: FineTuneConfig, limit: int | None = None
) -> dict[str, Any]:
    """Train a small encoder from nothing; score it."""
    training = load_examples("cluener", "train")[:limit]
    test = load_examples("cluener", "validation")[:limit]
    file = data_folder() / "vocabs" / "bert-base-chinese-vocab.txt"
    names = file.read_text("utf-8").removesuffix("\n").split("\n")
    tokenizer = WordPieceTokenizer({p: i for i, p in enumerate(names)})
    task = TokenClassification(training)
    torch.manual_seed(seed)
    model = BertForTokenClassification(
        BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=128,
        ),
        **task.head_arguments(),
    )
    began = time.perf_counter()
    train(task, model, tokenizer, replace(plan, seed=seed))
    seconds = time.perf_counter() - began
    scores = task.score(test, predict(task, model, tokenizer, test))
    return {
        "scores": {name: round(value, 4) for name, value in scores.items()},
        "layers": 2,
        "hidden": 128,
        "examples": len(training),
        "scored": len(test),
        "seconds": round(seconds, 1),
    }


PLANS = {
    "pieces": FineTuneConfig(epochs=2, batch_size=16, learning_rate=2e-4),
    "cluener": FineTuneConfig(epochs=4, batch_size=32, learning_rate=1e-3),
}
TESTS = {"wnut17": "test", "wikigold": "test", "cluener": "validation"}


def results(
    question: str, seed: int, plan: FineTuneConfig | None, limit: int | None
) -> Iterator[dict[str, Any]]:
    if plan is None:
        yield from (dictionary(*item) for item in TESTS.items())
    elif question == "cluener":
        yield cluener(seed, plan, limit)
    else:
        for kind in ("first", "every", "copied"):
            yield pieces(kind, seed, plan, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=[*PLANS, "dictionary"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default="book/runs/taggers.jsonl")
    parser.add_argument("--limit", type=int, help="sentences, for a trial")
    parser.add_argument("--steps", type=int, help="of a trial")
    asked = parser.parse_args()
    plan = PLANS.get(asked.question)
    settings = {}
    if plan:
        if asked.steps:
            plan = replace(plan, epochs=1, min_steps=asked.steps)
        said = ("epochs", "min_steps", "batch_size", "learning_rate")
        settings = {"plan": {name: getattr(plan, name) for name in said}}
    for result in results(asked.question, asked.seed, plan, asked.limit):
        entry = {"question": asked.question, **settings, **result}
        print(entry)
        peers.add_line(asked.record, entry | peers.facts(asked.seed))


if __name__ == "__main__":
    main()
