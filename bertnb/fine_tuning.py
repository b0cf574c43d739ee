"""Fine-tuning.

Written by tools/extract.py from notebooks/16_tuning.md: edit that notebook, not this file.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from bertnb.agreement import ReadTwice
from bertnb.configuration import BertnbError
from bertnb.folders import PretrainedModel, hf_name, read_weights
from bertnb.optimization import (
    SCHEDULES,
    Step,
    adamw,
    pick_device,
    pick_precision,
    train,
)
from bertnb.recipe import run_facts
from bertnb.runs import (
    Checkpoints,
    StopRequest,
    as_json,
    locked,
    refuse_changes,
    settings_of,
    weights_digest,
)
from bertnb.tasks import (
    FineTuneConfig,
    Row,
    Shuffled,
    Task,
    check_fit,
    dropping,
    freezing,
    labelled_rows,
    layer_depth,
    load_for_task,
    row_logits,
)
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "FineTuningRun",
    "FineTuneResult",
    "fine_tune",
    "SeedReport",
    "fine_tune_seeds",
]


# %% The code: the state of a run
class FineTuningRun:
    """The model, the rows and the state of one run.

    Model and tokenizer must fit the task, see `check_fit`.

    Raises:
        ValueError: there is no training example, or one of training or
            validation cannot be read or has no label.
    """

    def __init__(
        self,
        task: Task,
        model: PretrainedModel,
        tokenizer: WordPieceTokenizer,
        config: FineTuneConfig,
    ) -> None:
        self.task, self.model, self.tokenizer = task, model, tokenizer
        self.config = config
        device = pick_device(config.device)
        model.to(device)
        named = config.precision
        self.precision: torch.dtype = (
            pick_precision(device) if named == "auto" else getattr(torch, named)
        )
        half = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        rows, self.held = labelled_rows(task, tokenizer, config.max_length)
        self.batches = Shuffled(
            rows,
            config.batch_size,
            tokenizer.pad_token_id,
            config.seed,
            config.group,
        )
        self.total = max(
            config.epochs * self.batches.per_epoch, config.min_steps
        )
        self.before_mean = self.total - round(config.average * self.total)
        self.mean = AveragedModel(model) if config.average else None
        weight = config.r_drop
        self.reader = ReadTwice(model, weight) if weight else model
        self.every = config.eval_every or max(
            self.batches.per_epoch, self.total // 10
        )
        self.digest = _digest(rows), _digest(self.held)
        self.began = weights_digest(_named(model.state_dict()))
        self.bound = self._bound()
        self.facts = run_facts(config) | {"task": type(task).__name__}
        self.facts |= {"rows": len(rows), "steps": self.total}
        self.optimizer = adamw(
            model,
            config.weight_decay,
            bias_correction=config.bias_correction,
            factor=self._factor,
        )
        torch.manual_seed(config.seed)
        self.done, self.losses = 0, torch.zeros((), device=device)
        self.since = 0  # steps since the last record
        self.records: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}  # the weights with the best score

    def _factor(self, name: str) -> float:
        """Return a parameter's share of the learning rate, (16.13)."""
        layers = self.model.config.num_hidden_layers
        return float(
            self.config.layer_decay ** (layers + 1 - layer_depth(name, layers))
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        config = self.config
        warmup = round(config.warmup_ratio * self.total)
        schedule = SCHEDULES[config.schedule]
        return config.learning_rate * schedule(step, warmup, self.total)

    def steps(self) -> Iterator[Step]:
        """Take the steps that are still to be done; report each."""
        config = self.config
        for report in train(
            self.reader,
            self.optimizer,
            map(self.batches.batch, range(self.done, self.total)),
            self.rate,
            self.done,
            config.max_grad_norm,
            self.precision,
            config.parts,
            self.scaler if self.scaler.is_enabled() else None,
        ):
            self.done, self.since = report.step + 1, self.since + 1
            if self.mean is not None and self.done > self.before_mean:
                self.mean.update_parameters(self.model)  # (16.14)
            self.losses += report.loss.nan_to_num(0, 0, 0)
            yield report

    @property
    def result(self) -> PretrainedModel:
        """The model with the mean of the weights, once it has begun."""
        if self.mean is None or self.done <= self.before_mean:
            return self.model
        return cast(PretrainedModel, self.mean.module)

    def evaluate(self, seconds: float) -> None:
        """Score the result on the validation examples; keep it if it is best."""
        scores: dict[str, float] = {}
        task, config = self.task, self.config
        if self.held:
            logits = row_logits(
                task,
                self.result,
                self.held,
                self.tokenizer.pad_token_id,
                precision=self.precision,
            )
            answers = task.decode(task.validation, self.held, logits)
            scores = task.score(task.validation, answers)
        record = {
            "step": self.done,
            "epoch": round(self.done / self.batches.per_epoch, 3),
            "training_loss": float(self.losses) / max(1, self.since),
            "learning_rate": self.rate(self.done - 1),
            "seconds": round(seconds, 1),
        }
        self.records.append(record | scores)
        self.losses.zero_()
        self.since = 0
        if self.best_place == len(self.records) - 1:
            state = self.result.state_dict()
            self.best = {k: t.to("cpu", copy=True) for k, t in state.items()}
            if config.output_dir is not None:
                self.result.save_pretrained(config.output_dir)
                limit = self.model.config.max_position_embeddings
                self.tokenizer.save_pretrained(config.output_dir, limit)

    def _scores(self) -> list[float]:
        if not self.held:  # nothing says which is better
            return [0.0] * len(self.records)
        return [record[self.task.metric] for record in self.records]

    @property
    def best_place(self) -> int:
        """Which record is the best, of equal ones the last; -1 for none."""
        scores = self._scores()
        return max(range(len(scores)), key=lambda i: (scores[i], i), default=-1)

    @property
    def waited(self) -> int:
        """How many evaluations ago the best score was reached first; 0
        without validation."""
        scores = self._scores() if self.held else []
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0

    def save(self) -> None:
        """Write the log, and a checkpoint of what the next step depends on."""
        if self.config.output_dir is None:
            return
        folder = Path(self.config.output_dir)
        lines = [json.dumps(line) for line in (self.facts, *self.records)]
        (folder / "log.jsonl.tmp").write_text("\n".join(lines) + "\n", "utf-8")
        (folder / "log.jsonl.tmp").replace(folder / "log.jsonl")
        device = self.losses.device
        cuda = device.type == "cuda"
        state = {
            "bound": json.dumps(self.bound),
            "began": self.began,
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if cuda else None,
            "losses": self.losses,
            "since": self.since,
            "best": self.best,
            "mean": self.mean and self.mean.state_dict(),
            "log": json.dumps([self.facts, *self.records]),
        }
        Checkpoints(folder / "checkpoints", 1).save(self.done, state)

    def _bound(self) -> dict[str, Any]:
        """Return what must be the same when a run goes on."""
        free = ("output_dir", "patience", "device")
        values = asdict(self.config) | {
            "digest of training": self.digest[0],
            "digest of validation": self.digest[1],
            "head": self.task.head_arguments(),
            "task.metric": self.task.metric,
            "model": asdict(self.model.config),
        }
        kept = {k: v for k, v in values.items() if k not in free}
        settings = settings_of(self.task, ("training", "validation"))
        return as_json(kept) | {f"task.{k}": v for k, v in settings.items()}

    def resume(self) -> None:
        """Take over the checkpoint in the folder, if there is one.

        Raises:
            BertnbError: it is of another task or configuration, or of a model
                that is neither what the run began with nor what it came to.
        """
        if self.config.output_dir is None:
            return
        device = self.losses.device
        folder = Path(self.config.output_dir) / "checkpoints"
        state = Checkpoints(folder, 1).load(device)
        if state is None:
            return
        self._check_same(state)
        self.began = state["began"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.done, self.since = state["done"], state["since"]
        self.losses = state["losses"]
        self.best = {k: t.cpu() for k, t in state["best"].items()}
        if self.mean is not None:
            self.mean.load_state_dict(state["mean"])
        self.facts, *self.records = json.loads(state["log"])
        self.facts["resumed_at"] = [*self.facts["resumed_at"], self.done]
        torch.set_rng_state(state["random"].cpu())
        if state["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), device)

    def _check_same(self, state: Mapping[str, Any]) -> None:
        folder = self.config.output_dir
        if "began" not in state:
            raise BertnbError(
                f"{folder} holds checkpoints of another kind of run, or of an "
                "older version: choose another output_dir"
            )
        refuse_changes(json.loads(state["bound"]), self.bound, str(folder))
        own = (
            weights_digest(_named(state[name])) for name in ("model", "best")
        )
        if self.began in (state["began"], *own):
            return
        with suppress(FileNotFoundError, BertnbError):
            # a run that was killed may have written a model and no checkpoint
            if self.began == weights_digest(read_weights(str(folder))[0]):
                return
        raise BertnbError(
            f"{folder} holds a run that began with other weights than `model` "
            "has: load the model that it began with, or choose another "
            "output_dir"
        )


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names that they have in a file."""
    return {hf_name(name): tensor for name, tensor in state.items()}


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        read = row.example, row.input_ids, row.token_type_ids, row.targets
        digest.update(repr(read).encode())
    return digest.hexdigest()[:16]


# %% The code: the loop on one screen
@dataclass(frozen=True)
class FineTuneResult:
    """The trained model with its best weights, and how it got there.

    `records` has a line an evaluation, `best` is the one of these weights: the
    best, of equal scores the last.
    `stopped` is None after the last step, "patience", or "SIGTERM" or
    "SIGINT": then the weights are the last, and with `output_dir` the same
    call goes on where it stopped.
    """

    model: Any
    tokenizer: WordPieceTokenizer
    records: list[dict[str, Any]]
    best: dict[str, Any]
    stopped: str | None = None


def fine_tune(
    task: Task,
    model: PretrainedModel,
    tokenizer: WordPieceTokenizer,
    config: FineTuneConfig | None = None,
    progress: bool = True,
) -> FineTuneResult:
    """Train a model on a task's examples, and return it at its best.

    The model is trained in place, and comes back in eval mode. With
    `output_dir`, the folder holds the best model in Hugging Face's layout, and
    the same call goes on where it was stopped; after an error, with the model
    loaded anew.

    Args:
        config: None: the defaults.
        progress: show a bar on standard error.

    Raises:
        BertnbError: `output_dir` holds another run, or a model of none, or
            another process writes to it.
        FloatingPointError: the loss is not finite any more; the model has
            the weights before that step, the folder the best.
        TypeError: `model` is not of the task's class.
        ValueError: model, tokenizer or examples do not fit; the message says
            which.
    """
    config = config or FineTuneConfig()
    folder = config.output_dir
    check_fit(task, model, tokenizer, config.max_length)
    alone = nullcontext() if folder is None else locked(folder)
    with (
        StopRequest() as stop,
        alone,
        freezing(model, config.frozen_layers),
        dropping(model, config.dropout),
    ):
        run = FineTuningRun(task, model, tokenizer, config)
        run.resume()
        stopped = _go_on(run, stop, progress)
    if stopped in (None, "patience"):
        model.load_state_dict(run.best)
    best = run.records[run.best_place] if run.records else {}
    return FineTuneResult(model, tokenizer, run.records, best, stopped)


def _go_on(run: FineTuningRun, stop: StopRequest, progress: bool) -> str | None:
    """Take steps until the end or a reason to stop, and return the reason."""
    patience, clock = run.config.patience, time.perf_counter()
    if patience is not None and run.waited >= patience:
        return "patience"
    with tqdm(
        desc="fine-tuning",
        total=run.total,
        initial=run.done,
        disable=not progress,
    ) as bar:
        for report in run.steps():
            bar.update()
            due = run.done == run.total or run.done % run.every == 0
            if (due or stop.name) and report.failed:  # waits for the device
                continue  # to the error of `train`, and saves nothing
            if due:
                run.evaluate(time.perf_counter() - clock)
                clock = time.perf_counter()
                if (metric := run.task.metric) in run.records[-1]:
                    bar.set_postfix({metric: run.records[-1][metric]})
                run.save()
                if patience is not None and run.waited >= patience:
                    return "patience"
            if stop.name and run.done < run.total:
                run.save()
                return stop.name
    return None


# %% The code: over seeds
@dataclass(frozen=True)
class SeedReport:
    """The best score of each seed, their mean and standard deviation."""

    scores: dict[int, float]
    mean: float
    deviation: float  # of a sample, n - 1; 0 for one seed


def fine_tune_seeds(
    task: Task,
    path_or_hub_id: str | Path,
    config: FineTuneConfig | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = True,
) -> SeedReport:
    """Fine-tune a checkpoint once for each seed: head, order and dropout
    differ. With `output_dir`, each has a folder `seed-0` and so on in it.

    Raises:
        KeyboardInterrupt: a signal asked to stop; with `output_dir` the same
            call goes on.
        ValueError: no seed, no validation examples, or as in `fine_tune`.
    """
    config = config or FineTuneConfig()
    if not seeds or not len(task.validation):
        raise ValueError(
            f"seeds={list(seeds)}, {len(task.validation)} validation examples: "
            "a report over seeds needs both"
        )
    scores: dict[int, float] = {}
    for seed in seeds:
        model, tokenizer = load_for_task(task, path_or_hub_id, seed)
        folder = config.output_dir and str(
            Path(config.output_dir) / f"seed-{seed}"
        )
        settings = replace(config, seed=seed, output_dir=folder)
        result = fine_tune(task, model, tokenizer, settings, progress)
        if result.stopped not in (None, "patience"):
            raise KeyboardInterrupt(f"{result.stopped} with seed {seed}")
        scores[seed] = result.best[task.metric]
    values = list(scores.values())
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return SeedReport(scores, statistics.fmean(values), deviation)
