"""Choose the hyper-parameters of each set in `plans.json`.

    BERTNB_DATA=../shared/data python benchmarks/tune.py stsb --rates 1e-4 2e-4
    BERTNB_DATA=../shared/data python benchmarks/tune.py stsb --dropout 0
    python benchmarks/tune.py --choose

The first trains MiniLM-L6 with `bertnb.fine_tune`, one seed a rate, and adds
a line each to a record; what else is named replaces the plan's. The last
writes the plans that were best. What is scored is never the set of the
results: it is the validation set where there is a test set too, and otherwise
a part of the training set that shares nothing with the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import peers
from fine_tuning import KINDS, run
from trainer import PLANS, PLANS_FILE, minilm

from bertnb import load_examples

NAMED = (
    "epochs",
    "batch_size",
    "dropout",
    "frozen_layers",
    "group",
    "average",
    "r_drop",
)


def held_out(task: str) -> tuple[list[Any], list[Any]]:
    """Return examples to learn from, and others to choose a rate by."""
    training = load_examples(*KINDS[task][1])
    if task in ("stsb", "wnut17"):
        return training, load_examples(task, "validation")
    if task == "sst2":
        return apart(training)
    cut = 4 * len(training) // 5
    while (
        task == "squad" and training[cut].context == training[cut - 1].context
    ):
        cut += 1
    return training[:cut], training[cut:]


def apart(examples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return phrases of SST-2, and longer ones that share no four words.

    The set has each sentence and its phrases: a part drawn by chance would
    have been seen, phrase by phrase, in training.
    """

    def fours(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    scored = [e for e in examples if len(e.text.split()) >= 12][::20]
    seen = {four for example in scored for four in fours(example.text)}
    return [e for e in examples if not fours(e.text) & seen], scored


def choose(record: str) -> None:
    """Write the plan with the best score of each set into the plans."""
    with open(record, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    plans = dict(PLANS)
    for task in plans:
        found = [line for line in lines if line["task"] == task]
        if found:
            plans[task] = max(found, key=lambda line: line["score"])["plan"]
    PLANS_FILE.write_text(json.dumps(plans, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=KINDS)
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--frozen-layers", type=int)
    parser.add_argument("--group", type=int)
    parser.add_argument("--average", type=float)
    parser.add_argument("--r-drop", type=float)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--record", default="book/runs/fine-tuning-rates.jsonl")
    asked = parser.parse_args()
    if asked.choose:
        choose(asked.record)
        return
    named = {
        name: getattr(asked, name)
        for name in NAMED
        if getattr(asked, name) is not None
    }
    planned = PLANS[asked.task] | named
    for rate in asked.rates or [planned["learning_rate"]]:
        plan = planned | {"learning_rate": rate}
        kind = KINDS[asked.task][0]
        training, scored = held_out(asked.task)
        found = run(kind(training), scored, plan, minilm(), 0)
        score = found["scores"][kind.metric]
        entry = {"task": asked.task, "plan": plan, "score": score, **found}
        peers.add_line(asked.record, entry | peers.facts(0))
        print(asked.task, plan, score, flush=True)


if __name__ == "__main__":
    main()
