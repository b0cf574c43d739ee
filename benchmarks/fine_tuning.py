"""Fine-tune with `bertnb.fine_tune`, and write what came out to a record.

    BERTNB_DATA=../shared/data python benchmarks/fine_tuning.py sst2 --seed 0

The hyper-parameters are those of `benchmarks/trainer.py`, the peer, and so are
the weights and the examples. The weights after the last step are scored, not
the best on the way: there is nothing to be chosen by.

On a GPU with a network, one command fills the columns of the results page for
another model:

    python benchmarks/fine_tuning.py all --model google-bert/bert-base-uncased

Stopped, it goes on: what the record has is not done again.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "0")  # a model may be on the hub
import peers
from trainer import plan_for, recorded, weights

from bertnb import (
    BertnbError,
    FineTuneConfig,
    QuestionAnswering,
    SequenceClassification,
    SequenceRegression,
    Task,
    TokenClassification,
    evaluate,
    fine_tune,
    load_examples,
    load_for_task,
    pick_precision,
)

KINDS: dict[str, tuple[Any, tuple[str, str], tuple[str, str]]] = {
    "sst2": (SequenceClassification, ("sst2", "train"), ("sst2", "validation")),
    "stsb": (SequenceRegression, ("stsb", "train"), ("stsb", "test")),
    "wnut17": (TokenClassification, ("wnut17", "train"), ("wnut17", "test")),
    "wikigold": (
        TokenClassification,
        ("wikigold", "train"),
        ("wikigold", "test"),
    ),
    "squad": (
        partial(QuestionAnswering, stride=128),
        ("squad", "train"),
        ("xquad.en", "validation"),
    ),
}


def run(
    task: Task,
    examples: list[Any],
    plan: dict[str, Any],
    folder: str,
    seed: int,
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """Train on the task's examples, score others; return what to record."""
    model, tokenizer = load_for_task(task, folder, seed)
    config = FineTuneConfig(
        **{"max_length": 128}
        | {name: value for name, value in plan.items() if name != "examples"},
        min_steps=1,
        seed=seed,
        output_dir=None if checkpoints is None else str(checkpoints),
        eval_every=None if checkpoints is None else 200,
    )
    cpu = time.process_time()
    result = fine_tune(task, model, tokenizer, config)
    if result.stopped:  # a model that is half trained is no result
        raise SystemExit(f"seed {seed}: stopped by {result.stopped}")
    times = {"seconds": sum(record["seconds"] for record in result.records)}
    if checkpoints is None:  # else a part may be another process's
        times["cpu_seconds"] = time.process_time() - cpu
    precision = pick_precision(next(model.parameters()).device)
    scores = evaluate(
        task,
        model,
        tokenizer,
        examples,
        max_length=config.max_length,
        precision=precision,
    )
    return {
        "scores": scores,
        **{name: round(value, 1) for name, value in times.items()},
        "examples": len(task.training),
        "scored": len(examples),
        "precision": str(precision).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", choices=[*KINDS, "all"])
    parser.add_argument("--model", help="a folder or a name; default: MiniLM")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, help="only the first so many")
    parser.add_argument("--record", default="book/runs/fine-tuning.jsonl")
    parser.add_argument(
        "--checkpoints", type=Path, help="a folder; stopped, a run goes on"
    )
    asked = parser.parse_args()
    for seed in asked.seed:
        for task in KINDS if asked.task == "all" else [asked.task]:
            plan = plan_for(task, asked.model, asked.examples)
            entry = {
                "task": task,
                "model": asked.model or "MiniLM-L6",
                "by": "bertnb.fine_tune",
                "plan": plan,
                "seed": seed,
            }
            if recorded(asked.record, entry):
                continue
            try:
                kind, training, scored = KINDS[task]
                some = load_examples(*training)[: plan.get("examples")]
                entry |= run(
                    kind(some),
                    load_examples(*scored),
                    plan,
                    weights(asked.model),
                    seed,
                    asked.checkpoints and asked.checkpoints / f"{task}-{seed}",
                )
            except BertnbError as error:  # a set that is not to be had here
                if asked.task != "all":
                    raise
                print(f"{task} is left out: {error}", flush=True)
                continue
            peers.add_line(asked.record, entry | peers.facts(seed))
            print(entry, flush=True)


if __name__ == "__main__":
    main()
