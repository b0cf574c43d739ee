"""Examples a second in fine-tuning, beside `transformers.Trainer`.

    BERTNB_DATA=../shared/data python benchmarks/fine_tuning_speed.py

MiniLM-L6 learns SST-2, whose texts are short and of unlike length. Both sides
have the same weights, rows, batch size and precision, the fused AdamW, and
pad each batch to its longest row; ours also puts rows of like lengths
together, which the Trainer does on request ("grouped" is the Trainer so), or
takes them by chance and computes no padding ("by chance").
First the gate: the loss of one batch must be the same. Then the sides take
turns, and what is compared is the median of each side's time for an example,
in time of the processor as well as of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import peers
import torch
import transformers
from trainer import minilm

from bertnb import (
    FineTuneConfig,
    FineTuningRun,
    SequenceClassification,
    load_examples,
    load_for_task,
    pad_rows,
)

BATCH = 32


class Clock(transformers.TrainerCallback):
    """Time from the end of the third step to the end of the last."""

    def __init__(self) -> None:
        self.steps = 0
        self.begin = self.end = (0.0, 0.0)

    def now(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what it still has to do counts
        return time.perf_counter(), time.process_time()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            self.begin = self.now()

    def on_train_end(self, *arguments: Any, **more: Any) -> None:
        self.end = self.now()

    def an_example(self) -> tuple[float, float]:
        examples = BATCH * (self.steps - 3)
        wall, cpu = (b - a for a, b in zip(self.begin, self.end, strict=True))
        return wall / examples, cpu / examples


def ours(
    task: Any, steps: int, precision: str, seed: int, group: int | None
) -> Clock:
    model, tokenizer = load_for_task(task, minilm(), 0)
    config = FineTuneConfig(
        batch_size=BATCH,
        group=group,
        min_steps=1,
        precision=precision,
        seed=seed,
    )
    run, clock = FineTuningRun(task, model, tokenizer, config), Clock()
    run.total = steps
    for _ in run.steps():
        clock.on_step_end()
    clock.on_train_end()
    return clock


def trainer(
    rows: list[Any], steps: int, precision: str, seed: int, sampling: str
) -> Clock:
    clock = Clock()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=2
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            bf16=precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            optim="adamw_torch_fused",
            train_sampling_strategy=sampling,
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collate = transformers.DataCollatorWithPadding(tokenizer)
        transformers.Trainer(
            model, settings, collate, rows, callbacks=[clock]
        ).train()
    return clock


def gate(task: Any, rows: list[Any]) -> float:
    """Return the difference of the losses of one batch; at most 1e-5."""
    model, tokenizer = load_for_task(task, minilm(), 0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=2
    )
    head = model.classifier.state_dict()
    theirs.classifier.load_state_dict(head)
    batch = pad_rows(rows[:BATCH], tokenizer.pad_token_id)
    with torch.no_grad():
        losses = [m.eval()(**batch).loss.item() for m in (model, theirs)]
    difference = abs(losses[0] - losses[1])
    if difference > 1e-5:
        raise SystemExit(f"the losses differ by {difference:.1e}")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--record")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    task = SequenceClassification(load_examples("sst2", "train"))
    tokenizer = load_for_task(task, minilm())[1]
    rows = task.rows(task.training, tokenizer, 128)
    plain = [
        {
            "input_ids": row.input_ids,
            "token_type_ids": row.token_type_ids,
            **row.targets,
        }
        for row in rows
    ]
    result: dict[str, Any] = {
        "name": "fine-tuning, SST-2",
        "loss_difference": gate(task, rows),
        "batch": BATCH,
        "steps": asked.steps,
        "rounds": asked.rounds,
    }
    for precision in ("float32", "bfloat16"):
        sides: dict[str, Any] = {
            "ours": lambda seed, p=precision: ours(
                task, asked.steps, p, seed, None
            ),
            "ours, by chance": lambda seed, p=precision: ours(
                task, asked.steps, p, seed, 1
            ),
            "Trainer": lambda seed, p=precision: trainer(
                plain, asked.steps, p, seed, "random"
            ),
            "Trainer, grouped": lambda seed, p=precision: trainer(
                plain, asked.steps, p, seed, "group_by_length"
            ),
        }
        times: dict[str, list[tuple[float, float]]] = {s: [] for s in sides}
        for seed in range(asked.rounds):
            for name, run in sides.items():
                times[name].append(run(seed).an_example())
        table = {}
        for name, found in times.items():
            wall, cpu = (
                statistics.median(some) for some in zip(*found, strict=True)
            )
            table[name] = {
                "examples_per_second": round(1 / wall, 2),
                "examples_per_cpu_second": round(1 / cpu, 2),
            }
        for name in [*sides][1:]:
            for clock, place in (("ratio", 0), ("cpu_ratio", 1)):
                ratios = [
                    b[place] / a[place]
                    for a, b in zip(times["ours"], times[name], strict=True)
                ]
                table[name][clock] = round(statistics.median(ratios), 3)
        result[precision] = table
        for name, line in table.items():
            print(precision, name, line, flush=True)
    peers.add_to_record(asked.record, result)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
