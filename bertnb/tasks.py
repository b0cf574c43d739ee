"""Tasks.

Written by tools/extract.py from notebooks/16_tasks.md: edit that notebook, not this file.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertnb.folders import PretrainedModel
from bertnb.inference import evaluating, length_batches
from bertnb.masked_lm import IGNORE
from bertnb.optimization import SCHEDULES, autocast
from bertnb.recipe import PRECISIONS
from bertnb.rows import move
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "Row",
    "Task",
    "pad_rows",
    "Shuffled",
    "load_for_task",
    "labelled_rows",
    "row_logits",
    "predict",
    "evaluate",
    "check_fit",
    "layer_depth",
    "freezing",
    "FineTuneConfig",
    "dropping",
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
                f"{wanted}: load the model with load_for_task, or give the "
                "task the model's"
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
            plain shuffling. None: 50, or fewer, so that an epoch has at least
            four groups.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        pad_token_id: int,
        seed: int = 0,
        group: int | None = None,
    ) -> None:
        self.rows, self.batch_size, self.pad = rows, batch_size, pad_token_id
        quarter = len(rows) // (4 * batch_size)
        self.seed, self.group = seed, group or min(50, max(1, quarter))
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
    """Return a checkpoint with a head for the task, and its tokenizer.

    A trained head is taken over by the names of its classes (see
    `BertClassifier.for_classes`); without one, or with one for other classes,
    it begins untrained, and the seed decides how.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # that a head is new is no news here
        warnings.filterwarnings("ignore", ".*they start untrained")
        model = task.model_class.for_classes(
            path_or_hub_id, **task.head_arguments()
        )
    return model, WordPieceTokenizer.from_pretrained(path_or_hub_id)


def labelled_rows(
    task: Task, tokenizer: WordPieceTokenizer, max_length: int
) -> list[list[Row]]:
    """Return the rows of training and of validation, all with their truth.

    Raises:
        ValueError: there is no training example, or one of either cannot be
            read or has no label.
    """
    if not len(task.training):
        raise ValueError("the task has no training examples: give `training`")
    found = []
    for part in ("training", "validation"):
        try:
            rows = task.rows(getattr(task, part), tokenizer, max_length)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from error
        without = sorted({row.example for row in rows if not row.targets})
        if without:
            raise ValueError(
                f"{part} example {without[0]} has no label, {len(without)} in "
                "all have none: give them one, or leave them out"
            )
        found.append(rows)
    return found


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
            output = model(**{k: move(t, device) for k, t in padded.items()})
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
    """Return the model's answer to each example; the task says what it is.

    Args:
        max_length: of a row, in tokens; the task says what is done with
            longer examples.
        precision: of the matrix products.

    Raises:
        TypeError: `model` is not of the task's class.
        ValueError: the model or the tokenizer does not fit, `max_length` or
            `batch_size` is out of range, or an example cannot be read.
    """
    check_fit(task, model, tokenizer, max_length)
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


def check_fit(
    task: Task,
    model: PretrainedModel,
    tokenizer: WordPieceTokenizer,
    max_length: int,
) -> None:
    """Refuse what does not go together, and make the model fit the task.

    Raises:
        TypeError: `model` is not of the task's class.
        ValueError: it has other labels than the task, or reads fewer tokens
            than `max_length`, or knows fewer than the tokenizer gives.
    """
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


# %% Which layers learn, and how fast
def layer_depth(name: str, layers: int) -> int:
    """Return 0 for embeddings, 1 to N for layers, N + 1 for what is above."""
    parts = name.split(".")
    if "embeddings" in parts:
        return 0
    numbers = [int(part) for part in parts if part.isdecimal()]
    inside = numbers and any(p in ("layer", "layers") for p in parts)
    return numbers[0] + 1 if inside else layers + 1


@contextmanager
def freezing(model: PretrainedModel, count: int | None) -> Iterator[None]:
    """Take embeddings and the lowest layers out of training for a while.

    Behind it the model has no dropout, however training ended.

    Args:
        count: of the layers; 0: the embeddings only; None: nothing is held.

    Raises:
        ValueError: the model has fewer layers.
    """
    layers = model.config.num_hidden_layers
    count = -1 if count is None else count
    if count > layers:
        raise ValueError(
            f"frozen_layers={count}: the model has num_hidden_layers={layers}"
        )
    held = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and layer_depth(name, layers) <= count
    ]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.eval()
        for parameter in held:
            parameter.requires_grad_(True)


# %% The code: one value for the settings
_FROM_ZERO = ("frozen_layers", "seed")  # counts that may be 0


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
    after the other. `group`: how many batches are made of like lengths at a
    time, see `Shuffled`: None: 50, or less; 1: by chance. `learning_rate`,
    `warmup_ratio`, `schedule`, `weight_decay`, `bias_correction` and
    `max_grad_norm` as in pretraining.
    `frozen_layers`: None: all learn; 0: the embeddings stay as they are; more:
    so many of the lowest layers, too. `layer_decay`: each layer learns at this
    fraction of the rate of the one above it, (16.13). `dropout`: the share
    that is dropped in training; None: the model's own. `average`: the result
    has the mean of the weights over this share of the steps, the last ones,
    (16.14); 0: the last weights. `r_drop`: each row is read twice, and this
    times the disagreement is added to the loss, (16.17); 0: once.

    `seed`: of the order and of dropout. `device`: None: CUDA where there is
    one. `precision`: "float32", "bfloat16", "float16", or "auto", what the
    device does faster.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    output_dir: str | Path | None = None
    epochs: int = 3
    batch_size: int = 32
    group: int | None = None
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
    dropout: float | None = None
    average: float = 0.0
    r_drop: float = 0.0
    seed: int = 0
    device: str | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():  # the log is JSON
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
            elif isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, name, int(value))  # of NumPy, too
            elif isinstance(value, Real) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))
        counts = "epochs batch_size parts max_length min_steps"
        open_to_none = ("group", "eval_every", "patience", "frozen_layers")
        for name in (*counts.split(), *open_to_none, "seed"):
            value, least = getattr(self, name), int(name not in _FROM_ZERO)
            whole = isinstance(value, int) and value >= least
            free = value is None and name in open_to_none
            self._require(name, free or whole, f"{least}, {least + 1}, ...")
        for name in ("learning_rate", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < inf, "more than 0")
        for name in ("warmup_ratio", "average"):
            self._require(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        self._require(
            "layer_decay", 0 < self.layer_decay <= 1, "more than 0, at most 1"
        )
        for name in ("weight_decay", "r_drop"):
            self._require(name, 0 <= getattr(self, name) < inf, "0 or more")
        share = 0.0 if self.dropout is None else self.dropout
        self._require("dropout", 0 <= share < 1, "0 or more, less than 1")
        known = {"schedule": tuple(SCHEDULES), "precision": PRECISIONS}
        for name, values in known.items():
            expected = "one of " + ", ".join(values)
            self._require(name, getattr(self, name) in values, expected)

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(
                f"{name}={getattr(self, name)!r}: expected {expected}"
            )


@contextmanager
def dropping(model: nn.Module, share: float | None) -> Iterator[None]:
    """Let all that drops a share of its input drop this one for a while.

    Args:
        share: 0 <= share < 1; None: what each drops anyway.
    """
    named = [
        (module, "p" if isinstance(module, nn.Dropout) else "dropout_p")
        for module in model.modules()
    ]
    before = [(m, n, getattr(m, n)) for m, n in named if hasattr(m, n)]
    for module, name, value in before:
        setattr(module, name, value if share is None else share)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
