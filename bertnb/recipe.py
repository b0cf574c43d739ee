"""The recipe of a run.

Written by tools/extract.py from notebooks/12_recipe.md: edit that notebook, not this file.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from math import ceil
from pathlib import Path
from typing import Any

import torch

from bertnb.configuration import BertConfig
from bertnb.data import (
    Document,
    encode_documents,
    load_folder,
    load_sotu,
    split_documents,
    split_sentences,
)
from bertnb.next_sentence import SAMPLERS, Sentence
from bertnb.optimization import SCHEDULES, pick_device
from bertnb.rows import Documents, token_counts
from bertnb.runs import World
from bertnb.shards import Shards
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "PRECISIONS",
    "COUNTS",
    "POSITIVE",
    "FREE",
    "PretrainConfig",
    "Chosen",
    "Corpus",
    "load_corpus",
    "cut_documents",
    "run_facts",
    "pick_size",
    "memory_advice",
]


# %% One value for everything
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
COUNTS = (
    "pack batch_size parts total_steps eval_every eval_batches save_every keep "
    "patience max_tokens"
).split()
POSITIVE = ("learning_rate", "max_grad_norm", "divergence", "max_seconds")
# what may be another when a run goes on: no weight depends on it
FREE = (
    "output_dir corpus tokenizer save_every keep patience divergence "
    "max_seconds max_tokens device tensorboard"
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
    the share moves in a straight line to that one over the run, (12.6).
    `schedule` is one of `SCHEDULES`, `bias_correction` as in `adamw`.

    Looking and saving, in steps: held-out scores each `eval_every`, always
    with 15 % of the tokens hidden; a checkpoint each `save_every` (None: as
    often), of which the last `keep` are kept.

    The end: after `total_steps`; or after `patience` evaluations without a
    better held-out loss; or where the held-out loss is `divergence` nats
    above its best. With one of these two the best model is the result, else
    the last. The budgets `max_seconds` of this call and `max_tokens` of the
    whole run (places in rows, padding included) only interrupt: called again,
    the run goes on. `on_nonfinite`: "stop" or "skip", as in `train`.

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
        for name in POSITIVE:
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "more than 0")
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
        """Return the learning rate of step 0, 1, ..., (12.5): never 0."""
        warmup = round(self.warmup_ratio * self.total_steps)
        factor = SCHEDULES[self.schedule]
        return self.learning_rate * factor(
            step + 1, warmup, self.total_steps + 1
        )

    def mlm_probability_at(self, step: int) -> float:
        """Return the share of tokens that step 0, 1, ... hides, (12.6)."""
        last = self.final_mlm_probability
        if last is None or self.total_steps == 1:
            return self.mlm_probability
        way = step / (self.total_steps - 1)
        return self.mlm_probability + way * (last - self.mlm_probability)

    def places(self, steps: int) -> int:
        """Return the places in the rows of so many steps, (12.7)."""
        return steps * self.batch_size * self.sequence_length

    def binding(self) -> dict[str, Any]:
        """Return the values that must not change when a run goes on; those of
        the model are called `model.hidden_size` and so on."""
        values = asdict(self)
        model = values.pop("model")
        bound = {k: v for k, v in values.items() if k not in FREE}
        return bound | {f"model.{k}": v for k, v in model.items()}


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
    digest: str  # of the texts and the tokenizer


def load_corpus(config: PretrainConfig) -> Corpus:
    """Read, split and encode the corpus of a run.

    One document in ten is held out, by `split_documents`. Of fewer than 20
    documents, pieces are held out: see `cut_documents`.

    Raises:
        FileNotFoundError: there is no such folder, or no text in it.
        ValueError: the tokenizer has more pieces than the model, or there is
            too little text.
        BertnbError: shards are damaged, or of another tokenizer.
    """
    if (Path(config.corpus) / "index.json").exists():
        return _prepared(config)
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
        _digest((document.text for document in documents), tokenizer),
    )


def _prepared(config: PretrainConfig) -> Corpus:
    tokenizer = _tokenizer(config, config.tokenizer or config.corpus)
    shards = Shards.open(config.corpus, tokenizer)
    numbered = [Document(str(number), "") for number in range(len(shards))]
    learn, hold = split_documents(numbered)
    return Corpus(
        Chosen(shards, [int(document.name) for document in learn]),
        Chosen(shards, [int(document.name) for document in hold]),
        tokenizer,
        _digest((shard.sha256 for shard in shards.shards), tokenizer),
    )


def _tokenizer(config: PretrainConfig, folder: str) -> WordPieceTokenizer:
    tokenizer = WordPieceTokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer={folder!r} has {tokenizer.vocab_size} pieces, more "
            f"than the model's vocab_size={config.model.vocab_size}"
        )
    return tokenizer


def _digest(texts: Iterable[str], tokenizer: WordPieceTokenizer) -> str:
    cleaning = [tokenizer.lowercase, tokenizer.strip_accents]
    start = json.dumps([tokenizer.vocabulary, *cleaning], sort_keys=True)
    digest = hashlib.sha256(start.encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def cut_documents(
    documents: Sequence[Document], least: int = 20
) -> list[Document]:
    """Cut documents into pieces of whole sentences, where there are few.

    At least `least` documents come back as they are. Fewer are cut into
    about `least` pieces together. Held-out pieces then have neighbours to
    learn from, so their scores may be too kind.

    Raises:
        ValueError: they are fewer than 10 pieces even so.
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


# %% What a record says of its run
def run_facts(config: Any, processes: int = 1) -> dict[str, Any]:
    """Return a record's first line: the configuration (a dataclass), hardware,
    versions, commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text() if cpuinfo.exists() else ""
    cpu = re.search(r"model name\s*: (.+)", lines)
    device = pick_device(config.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
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
        "commit": _commit(),
        "resumed_at": [],
    }


def _commit() -> str | None:
    """Return the commit of this package; None where it is not in git."""
    folder = str(resources.files("bertnb"))
    try:
        done = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


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


def memory_advice(config: PretrainConfig, world: World) -> str:
    """Return what to change after a batch did not fit into the memory."""
    mine = config.batch_size // world.size
    text = (
        f"out of memory with {mine // config.parts} rows of sequence_length="
        f"{config.sequence_length} at a time (batch_size={config.batch_size}, "
        f"parts={config.parts}, {world.size} processes)"
    )
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        text += (
            f"; the GPU has {total / 2**30:.1f} GiB, {free / 2**30:.1f} free"
        )
    more = [p for p in range(config.parts + 1, mine + 1) if mine % p == 0]
    if more:
        text += (
            f". parts={more[0]} takes {mine // more[0]} rows at a time, for "
            "the same gradient; begin in another output_dir"
        )
    half = config.sequence_length // 2
    return f"{text}. sequence_length={half} halves a row, with another result"
