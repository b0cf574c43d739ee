"""Fine-tuning.

Written by tools/extract.py from notebooks/16_tuning.md: edit that notebook, not this file.
"""

import hashlib
import json
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bertnb.configuration import BertnbError
from bertnb.folders import PretrainedModel
from bertnb.inference import evaluating, length_batches
from bertnb.masked_lm import IGNORE
from bertnb.optimization import (
    SCHEDULES,
    adamw,
    autocast,
    pick_device,
    pick_precision,
    train,
)
from bertnb.recipe import PRECISIONS, run_facts
from bertnb.runs import Checkpoints, StopRequest, locked
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "Row",
    "Task",
    "pad_rows",
    "Shuffled",
    "load_for_task",
    "row_logits",
    "predict",
    "evaluate",
    "FineTuneConfig",
    "FineTuningRun",
    "FineTuneResult",
    "fine_tune",
    "SeedReport",
    "fine_tune_seeds",
]


# %% The code: tasks and rows
@dataclass(frozen=True)
class Row:
    """What a model reads of an example, and what it should answer.

    `targets` are by the model's argument, such as "labels": a number, or a
    list with one for each token. `origins` say for each token what decoding
    needs: the number of its word, or its characters, or None.
    """

    example: int  # the number of the example it is made of
    input_ids: list[int]
    token_type_ids: list[int]
    targets: dict[str, Any] = field(default_factory=dict)
    origins: tuple[Any, ...] = ()


class Task(ABC):
    """What is to be learnt: examples, and how they become rows, and a model's
    scores become answers.

    A task is a value: the loop, the device and the files are not its business.
    """

    training: Sequence[Any]
    validation: Sequence[Any]
    metric: Any  # the name of the score, the higher the better, that chooses
    model_class: ClassVar[type[PretrainedModel]]

    @abstractmethod
    def rows(
        self,
        examples: Sequence[Any],
        tokenizer: WordPieceTokenizer,
        max_length: int,
    ) -> list[Row]:
        """Return one or several rows of each example, in their order; with
        targets, where the examples have them.

        Raises:
            ValueError: an example cannot be read; the message names it.
        """

    @abstractmethod
    def decode(
        self,
        examples: Sequence[Any],
        rows: Sequence[Row],
        logits: Sequence[Tensor],
    ) -> list[Any]:
        """Return an answer for each example from the scores of its rows:
        float32 (C,), or (tokens of the row, C)."""

    @abstractmethod
    def score(
        self, examples: Sequence[Any], answers: Sequence[Any]
    ) -> dict[str, float]:
        """Compare answers with the truth; `metric` is one of the scores."""

    def head_arguments(self) -> dict[str, Any]:
        """Return what `model_class.from_pretrained` needs to know."""
        return {}

    def prepare(self, model: Any) -> None:
        """Make the model fit the task.

        Raises:
            ValueError: the head has other labels, or another number of them.
        """
        head = self.head_arguments()
        wanted = head.get("labels")
        if wanted is not None and model.label_names != wanted:
            raise ValueError(
                f"the model has the labels {model.label_names}, the task "
                f"{wanted}: load the model with labels=..., or give the task "
                "the model's"
            )
        count = head.get("num_labels")
        if count is not None and model.num_labels != count:
            raise ValueError(
                f"the model has num_labels={model.num_labels}, the task needs "
                f"{count}: load it with num_labels={count}"
            )

    def logits(self, output: Any) -> Tensor:
        """Return the scores in what the model returns."""
        return output.logits


# %% The code: batches
def pad_rows(
    rows: Sequence[Row], pad_token_id: int, targets: bool = True
) -> dict[str, Tensor]:
    """Return rows as a model's arguments, (B, L) for the longest of them.

    Rows of one length need no `attention_mask`, and get none.
    """
    width = max(len(row.input_ids) for row in rows)
    batch = {
        "input_ids": _filled([r.input_ids for r in rows], width, pad_token_id),
        "token_type_ids": _filled([r.token_type_ids for r in rows], width, 0),
    }
    lengths = torch.tensor([[len(row.input_ids)] for row in rows])  # (B, 1)
    if int(lengths.min()) < width:
        batch["attention_mask"] = torch.arange(width) < lengths  # (B, L)
    for name in rows[0].targets if targets else ():
        values = [row.targets[name] for row in rows]
        several = isinstance(values[0], list)
        batch[name] = (
            _filled(values, width, IGNORE) if several else torch.tensor(values)
        )
    return batch


def _filled(rows: Sequence[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


class Shuffled:
    """Rows in batches, another order each epoch, like lengths together.

    `batch(step)` depends on the step and the seed only, so that a run that
    was stopped goes on with the same batches.

    Args:
        group: how many batches are sorted by length among themselves: 1 is
            plain shuffling.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        pad_token_id: int,
        seed: int = 0,
        group: int = 50,
    ) -> None:
        self.rows, self.batch_size, self.pad = rows, batch_size, pad_token_id
        self.seed, self.group = seed, group
        self.per_epoch = -(-len(rows) // batch_size)
        self._order = lru_cache(maxsize=1)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[list[int]]:
        """Return the row numbers of each batch of an epoch."""
        chance = torch.Generator().manual_seed(1000003 * self.seed + epoch)
        order = torch.randperm(len(self.rows), generator=chance).tolist()
        batches: list[list[int]] = []
        size = self.group * self.batch_size
        for start in range(0, len(order), size):
            some = order[start : start + size]
            lengths = [len(self.rows[i].input_ids) for i in some]
            batches += [
                [some[i] for i in batch]
                for batch in length_batches(lengths, self.batch_size)
            ]
        places = torch.randperm(len(batches), generator=chance).tolist()
        return [batches[place] for place in places]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step of the run, counted from 0."""
        epoch, place = divmod(step, self.per_epoch)
        chosen = [self.rows[i] for i in self._order(epoch)[place]]
        return pad_rows(chosen, self.pad)


# %% The code: answers and scores
def load_for_task(
    task: Task, path_or_hub_id: str | Path, seed: int = 0
) -> tuple[PretrainedModel, WordPieceTokenizer]:
    """Return a checkpoint with a head for the task, untrained where it has
    none, and its tokenizer. The seed decides how the head begins."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # that a head is new is no news here
        warnings.filterwarnings("ignore", ".*they start untrained")
        model = task.model_class.from_pretrained(
            path_or_hub_id, **task.head_arguments()
        )
    return model, WordPieceTokenizer.from_pretrained(path_or_hub_id)


def row_logits(
    task: Task,
    model: nn.Module,
    rows: Sequence[Row],
    pad_token_id: int,
    batch_size: int = 64,
    precision: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return the scores of each row: float32 on the CPU, (C,) for one answer
    a row, (tokens, C) for one a token."""
    device = next(model.parameters()).device
    found: list[Any] = [None] * len(rows)
    lengths = [len(row.input_ids) for row in rows]
    with evaluating(model), autocast(device, precision):
        for batch in length_batches(lengths, batch_size):
            padded = pad_rows([rows[i] for i in batch], pad_token_id, False)
            output = model(**{k: t.to(device) for k, t in padded.items()})
            logits = task.logits(output).float().cpu()
            for i, scores in zip(batch, logits, strict=True):
                found[i] = scores if scores.dim() == 1 else scores[: lengths[i]]
    return found


def predict(
    task: Task,
    model: PretrainedModel,
    tokenizer: WordPieceTokenizer,
    examples: Sequence[Any],
    max_length: int = 128,
    batch_size: int = 64,
    precision: torch.dtype = torch.float32,
) -> list[Any]:
    """Return the model's answer to each example; what it is says the task.

    Args:
        max_length: of a row, in tokens; what is done with longer examples
            says the task.
        precision: of the matrix products.

    Raises:
        TypeError: `model` is not of the task's class.
        ValueError: the model or the tokenizer does not fit, `max_length` or
            `batch_size` is out of range, or an example cannot be read.
    """
    _check_fit(task, model, tokenizer, max_length)
    rows = task.rows(examples, tokenizer, max_length)
    logits = row_logits(
        task, model, rows, tokenizer.pad_token_id, batch_size, precision
    )
    return task.decode(examples, rows, logits)


def evaluate(
    task: Task,
    model: PretrainedModel,
    tokenizer: WordPieceTokenizer,
    examples: Sequence[Any] | None = None,
    max_length: int = 128,
    batch_size: int = 64,
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Return the task's scores of a model.

    Args:
        examples: with the truth; None: those of the task's validation.

    Raises:
        ValueError: there is no example, or as in `predict`.
    """
    examples = task.validation if examples is None else examples
    if not len(examples):
        raise ValueError(
            "there is no example to score: give `examples`, or a task with "
            "`validation`"
        )
    return task.score(
        examples,
        predict(
            task, model, tokenizer, examples, max_length, batch_size, precision
        ),
    )


def _check_fit(
    task: Task,
    model: PretrainedModel,
    tokenizer: WordPieceTokenizer,
    max_length: int,
) -> None:
    if not isinstance(model, task.model_class):
        raise TypeError(
            f"model is of type {type(model).__name__}: {type(task).__name__} "
            f"needs {task.model_class.__name__}.from_pretrained(...)"
        )
    limit, words = (
        model.config.max_position_embeddings,
        model.config.vocab_size,
    )
    if not 3 <= max_length <= limit:
        raise ValueError(
            f"max_length={max_length}: expected 3 to {limit}, the model's "
            "max_position_embeddings"
        )
    if tokenizer.vocab_size > words:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the model only "
            f"vocab_size={words}: load both from the same folder"
        )
    task.prepare(model)


# %% The code: one value for the settings
@dataclass(frozen=True)
class FineTuneConfig:
    """Everything that decides a fine-tuning run, beside task and model.

    `output_dir`: a folder for the best model, its tokenizer, the log, and a
    checkpoint to go on from; None: nothing is written.

    The length: `epochs` times through the training examples, but `min_steps`
    at least: few examples need more rounds. `patience`: stop after so many
    evaluations without a better score. `eval_every`: steps between two
    evaluations; None: an epoch, or a tenth of the run if that is longer.

    A step: `batch_size` rows of at most `max_length` tokens, in `parts`, one
    after the other. `learning_rate`, `warmup_ratio`, `schedule`,
    `weight_decay`, `bias_correction` and `max_grad_norm` as in pretraining.
    `frozen_layers`: None: all learn; 0: the embeddings stay as they are; more:
    so many of the lowest layers, too. `layer_decay`: each layer learns at this fraction of the
    rate of the one above it, (16.8).

    `seed`: of the order and of dropout. `device`: None: CUDA where there is
    one. `precision`: "float32", "bfloat16", "float16", or "auto", what the
    device does faster.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    output_dir: str | None = None
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.1
    schedule: str = "hugging_face"
    weight_decay: float = 0.01
    bias_correction: bool = True
    max_grad_norm: float = 1.0
    parts: int = 1
    max_length: int = 128
    min_steps: int = 200
    eval_every: int | None = None
    patience: int | None = None
    frozen_layers: int | None = None
    layer_decay: float = 1.0
    seed: int = 0
    device: str | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        counts = "epochs batch_size parts max_length min_steps eval_every "
        for name in (counts + "patience").split():
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= 1
            self._require(name, value is None or whole, "1, 2, 3, ...")
        for name in ("learning_rate", "max_grad_norm"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        self._require("warmup_ratio", 0 <= self.warmup_ratio <= 1, "0 to 1")
        self._require("layer_decay", 0 < self.layer_decay <= 1, "0 to 1")
        for name in ("weight_decay", "frozen_layers", "seed"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "0 or more")
        known = {"schedule": tuple(SCHEDULES), "precision": PRECISIONS}
        for name, values in known.items():
            expected = "one of " + ", ".join(values)
            self._require(name, getattr(self, name) in values, expected)

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(
                f"{name}={getattr(self, name)!r}: expected {expected}"
            )


# %% The code: the state of a run
class FineTuningRun:
    """The model, the rows and the state of one run."""

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
        _check_fit(task, model, tokenizer, config.max_length)
        rows = _training_rows(task, tokenizer, config)
        self.batches = Shuffled(
            rows, config.batch_size, tokenizer.pad_token_id, config.seed
        )
        self.total = max(
            config.epochs * self.batches.per_epoch, config.min_steps
        )
        self.every = config.eval_every or max(
            self.batches.per_epoch, self.total // 10
        )
        self.digest = hashlib.sha256(repr(rows).encode()).hexdigest()
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
        """Return a parameter's share of the learning rate, (16.8)."""
        layers = self.model.config.num_hidden_layers
        return float(
            self.config.layer_decay ** (layers + 1 - _depth(name, layers))
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        config = self.config
        warmup = round(config.warmup_ratio * self.total)
        schedule = SCHEDULES[config.schedule]
        return config.learning_rate * schedule(step, warmup, self.total)

    def steps(self) -> Iterator[int]:
        """Take the steps that are still to be done; give their numbers."""
        config = self.config
        for report in train(
            self.model,
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
            self.losses += report.loss.nan_to_num(0, 0, 0)
            yield report.step

    def evaluate(self, seconds: float) -> None:
        """Score the model on the validation examples; keep it if it is best."""
        scores: dict[str, float] = {}
        config = self.config
        if len(self.task.validation):
            scores = evaluate(
                self.task,
                self.model,
                self.tokenizer,
                max_length=config.max_length,
                precision=self.precision,
            )
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
        if self.waited == 0:
            state = self.model.state_dict()
            self.best = {k: t.cpu().clone() for k, t in state.items()}
            if config.output_dir is not None:
                self.model.save_pretrained(config.output_dir)
                self.tokenizer.save_pretrained(config.output_dir)

    @property
    def waited(self) -> int:
        """How many evaluations lie behind the best one; without validation
        the last is the best."""
        if not self.records or not len(self.task.validation):
            return 0
        scores = [record[self.task.metric] for record in self.records]
        return len(scores) - 1 - scores.index(max(scores))

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
            "bound": json.dumps(self.bound()),
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if cuda else None,
            "losses": self.losses,
            "since": self.since,
            "best": self.best,
            "log": json.dumps([self.facts, *self.records]),
        }
        Checkpoints(folder / "checkpoints", 1).save(self.done, state)

    def bound(self) -> dict[str, Any]:
        """Return what must be the same when a run goes on."""
        free = ("output_dir", "patience", "device")
        values = asdict(self.config) | {"digest of the rows": self.digest}
        return {k: v for k, v in values.items() if k not in free}

    def resume(self) -> None:
        """Take over the checkpoint in the folder, if there is one.

        Raises:
            BertnbError: it is of another task or configuration.
        """
        if self.config.output_dir is None:
            return
        device = self.losses.device
        folder = Path(self.config.output_dir) / "checkpoints"
        state = Checkpoints(folder, 1).load(device)
        if state is None:
            return
        theirs = json.loads(state["bound"])
        changed = [
            f"{name} was {theirs.get(name)!r} and is {value!r}"
            for name, value in self.bound().items()
            if theirs.get(name) != value
        ]
        if changed:
            raise BertnbError(
                f"{self.config.output_dir} holds another run: "
                f"{'; '.join(changed)}. Choose another output_dir, or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.done, self.since = state["done"], state["since"]
        self.losses = state["losses"]
        self.best = {k: t.cpu() for k, t in state["best"].items()}
        self.facts, *self.records = json.loads(state["log"])
        self.facts["resumed_at"] = [*self.facts["resumed_at"], self.done]
        torch.set_rng_state(state["random"].cpu())
        if state["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _training_rows(
    task: Task, tokenizer: WordPieceTokenizer, config: FineTuneConfig
) -> list[Row]:
    if not len(task.training):
        raise ValueError("the task has no training examples: give `training`")
    rows = task.rows(task.training, tokenizer, config.max_length)
    without = [row.example for row in rows if not row.targets]
    if without:
        raise ValueError(
            f"training example {without[0]} has no label: training needs one "
            f"for each ({len(without)} lack it)"
        )
    return rows


def _depth(name: str, layers: int) -> int:
    """Return 0 for embeddings, 1 to N for layers, N + 1 for what is above."""
    parts = name.split(".")
    if "embeddings" in parts:
        return 0
    numbers = [int(part) for part in parts if part.isdecimal()]
    inside = numbers and any(p in ("layer", "layers") for p in parts)
    return numbers[0] + 1 if inside else layers + 1


@contextmanager
def _frozen(model: PretrainedModel, count: int | None) -> Iterator[None]:
    """Take embeddings and the lowest layers out of training for a while."""
    layers = model.config.num_hidden_layers
    count = -1 if count is None else count
    if count > layers:
        raise ValueError(
            f"frozen_layers={count}: the model has num_hidden_layers={layers}"
        )
    held = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _depth(name, layers) <= count
    ]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


# %% The code: the loop on one screen
@dataclass(frozen=True)
class FineTuneResult:
    """The trained model with its best weights, and how it got there.

    `best` are the scores of these weights; `records` has a line an
    evaluation. `stopped` is None after the last step, "patience", or
    "SIGTERM" or "SIGINT": then the same call goes on where it stopped.
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

    The model is trained in place. With `output_dir`, the folder holds the
    best model in Hugging Face's layout, and the same call goes on where it
    was stopped.

    Args:
        config: None: the defaults.
        progress: show a bar on standard error.

    Raises:
        BertnbError: `output_dir` holds another run, or another process
            writes to it.
        FloatingPointError: the loss is not finite any more.
        TypeError: `model` is not of the task's class.
        ValueError: model, tokenizer or examples do not fit; the message says
            which.
    """
    config = config or FineTuneConfig()
    folder = config.output_dir
    alone = nullcontext() if folder is None else locked(folder)
    with StopRequest() as stop, alone, _frozen(model, config.frozen_layers):
        run = FineTuningRun(task, model, tokenizer, config)
        run.resume()
        stopped = _go_on(run, stop, progress)
    if stopped in (None, "patience"):
        model.load_state_dict(run.best)
    best = run.records[-1 - run.waited] if run.records else {}
    return FineTuneResult(model.eval(), tokenizer, run.records, best, stopped)


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
        for _ in run.steps():
            bar.update()
            if run.done == run.total or run.done % run.every == 0:
                run.evaluate(time.perf_counter() - clock)
                clock = time.perf_counter()
                score = run.records[-1].get(run.task.metric)
                bar.set_postfix({str(run.task.metric): score})
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
        scores[seed] = result.best[task.metric]
    values = list(scores.values())
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return SeedReport(scores, statistics.fmean(values), deviation)
