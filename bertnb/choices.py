"""Choices for a first run.

Written by tools/extract.py from notebooks/21_choices.md: edit that notebook, not this file.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import repeat
from math import sqrt
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import trange

from bertnb.configuration import BertConfig
from bertnb.data import load_sotu
from bertnb.engine import PretrainResult
from bertnb.inference import evaluating
from bertnb.next_sentence import accuracy_interval
from bertnb.optimization import (
    adamw,
    autocast,
    pick_device,
    pick_precision,
    train,
)
from bertnb.pretraining import BertForPreTraining
from bertnb.recipe import PretrainConfig, load_corpus
from bertnb.shards import Shards
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "SHAPES",
    "named_config",
    "count_tokens",
    "choose_config",
    "unigram_loss",
    "summarize",
    "measure_speed",
]


# %% The models with names
SHAPES = {  # name: (N, H)
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


def named_config(
    size: str, vocab_size: int = 30522, length: int = 128
) -> BertConfig:
    """Return the model of a size that has a name, to be trained from nothing.

    Args:
        size: one of `SHAPES`.
        length: the longest row. A model that never sees longer ones has no
            positions for them: they would stay as they were drawn.

    Raises:
        ValueError: there is no such size.
    """
    if size not in SHAPES:
        raise ValueError(f"size={size!r}: expected one of {', '.join(SHAPES)}")
    layers, hidden = SHAPES[size]
    dropout = 0.0 if hidden <= 256 else 0.1
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=round(0.02 * sqrt(768 / hidden), 3),  # (21.2)
    )


# %% How much text
def count_tokens(corpus: str) -> int:
    """Return about how many tokens a corpus of `PretrainConfig` has.

    Raises:
        FileNotFoundError: there is no such folder, or no text in it.
    """
    if corpus == "sotu":
        return sum(len(document.text) for document in load_sotu()) // 5
    root = Path(corpus)
    if (root / "index.json").exists():
        return Shards.open(root, verify=False).tokens
    files = [root] if root.is_file() else root.rglob("*")
    sizes = [
        path.stat().st_size * (3 if path.suffix == ".gz" else 1)
        for path in files
        if path.name.endswith((".txt", ".txt.gz"))
    ]
    if not sizes:
        raise FileNotFoundError(
            f"corpus={corpus!r} holds no text: expected a folder with *.txt "
            "or *.txt.gz files, one that `prepare` has made, or 'sotu'"
        )
    return sum(sizes) // 5


# %% The rest of the choices
def choose_config(settings: Mapping[str, Any]) -> PretrainConfig:
    """Complete the settings of a run by its corpus and its machine.

    Args:
        settings: `corpus` and `output_dir`, and any other field of
            `PretrainConfig`; `model` may be a dictionary. In its place
            `size`, one of `SHAPES`, and `vocab_size`.

    Raises:
        FileNotFoundError: there is no such corpus.
        TypeError: a value is of another type than its field.
        ValueError: a setting is unknown, missing or out of its range, or the
            output would lie among the texts.
    """
    values = dict(settings)
    _check(values)
    tokens = count_tokens(values["corpus"])
    on_cpu = pick_device(values.get("device")).type == "cpu"
    length = values.get("sequence_length", 64)
    rows = min(32 if on_cpu else 256, max(1, tokens // (20 * length)))
    rows = values.get("batch_size", rows)
    steps = max(200, 40 * tokens // max(1, rows * length))  # (21.1)
    steps = values.get("total_steps", min(steps, 10_000 if on_cpu else 100_000))
    size, pieces = values.pop("size", None), values.pop("vocab_size", None)
    model = values.pop("model", None)
    if isinstance(model, dict):
        model = BertConfig.from_dict(model)
    if model is None or size is not None:
        size = size or ("tiny" if on_cpu else "small")
        pieces = pieces or _pieces(values, tokens)
        model = named_config(size, pieces, length)
    defaults = {
        "model": model,
        "sequence_length": length,
        "batch_size": rows,
        "total_steps": steps,
        "learning_rate": round(0.003 * 128 / model.hidden_size, 5),  # (21.3)
        "mlm_probability": 0.45,
        "final_mlm_probability": 0.15,
        "eval_every": max(50, steps // 20),
        "divergence": 0.5,
    }
    return PretrainConfig(**defaults | values)


def _check(values: dict[str, Any]) -> None:
    """Refuse names and types that `PretrainConfig` does not know."""
    known: dict[str, Any] = {f.name: f.type for f in fields(PretrainConfig)}
    known |= {"model": BertConfig | dict, "size": str, "vocab_size": int}
    if unknown := sorted(values.keys() - known):
        raise ValueError(
            f"settings: unknown {', '.join(unknown)}; known: "
            f"{', '.join(sorted(known))}"
        )
    if missing := sorted({"corpus", "output_dir"} - values.keys()):
        raise ValueError(f"settings: {' and '.join(missing)} must be given")
    for name, value in values.items():
        whole = isinstance(value, int) and isinstance(0.0, known[name])
        if not whole and not isinstance(value, known[name]):
            kind = getattr(known[name], "__name__", known[name])
            raise TypeError(f"{name}={value!r}: expected a value of {kind}")
    output = Path(values["output_dir"]).resolve()
    if output.is_relative_to(Path(values["corpus"]).resolve()):
        raise ValueError(
            f"output_dir={values['output_dir']!r} lies in the corpus: its "
            "vocab.txt would be read as a text. Choose another folder"
        )


def _pieces(values: dict[str, Any], tokens: int) -> int:
    """Return the size of the vocabulary: the tokenizer's, if there is one."""
    folder = values.get("tokenizer") or values["corpus"]
    if values.get("tokenizer") or (Path(folder) / "index.json").exists():
        return WordPieceTokenizer.from_pretrained(folder).vocab_size
    return 4096 if tokens < 5e6 else 8192 if tokens < 5e7 else 30522


# %% What came out
def unigram_loss(config: PretrainConfig) -> float:
    """Return the held-out loss, in nats, of the training text's frequencies.

    One is added to each count. Of a large corpus, 2,000 to 4,000 documents
    are counted on either side.

    Args:
        config: that of a run whose folder has its tokenizer.
    """
    corpus = load_corpus(replace(config, tokenizer=config.output_dir))
    counts = []
    for documents in (corpus.training, corpus.held_out):
        some = range(0, len(documents), max(1, len(documents) // 2000))
        ids = [t for i in some for sentence in documents[i] for t in sentence]
        counts.append(np.bincount(ids, minlength=corpus.tokenizer.vocab_size))
    shares = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-counts[1] @ np.log(shares) / counts[1].sum())


def summarize(config: PretrainConfig, result: PretrainResult) -> dict[str, Any]:
    """Return what a run has come to, as names and values for a report.

    The scores are those of the model in the folder. None are there before
    the first evaluation, or after a signal, when there is no time for more.
    """
    facts = {"output": config.output_dir, "stopped": result.stopped}
    if not result.records or result.stopped in ("SIGINT", "SIGTERM"):
        return facts
    record = result.records[-1]
    if (config.patience, config.divergence) != (None, None):  # the best is kept
        record = min(result.records, key=lambda r: r["masked_lm_loss"])
    share = record["next_sentence_accuracy"]
    low, high = accuracy_interval(share, record["pairs"])
    return facts | {
        "step": record["step"],
        "masked_lm_loss": record["masked_lm_loss"],
        "unigram_loss": unigram_loss(config),
        "masked_lm_accuracy": record["masked_lm_accuracy"],
        "next_sentence_accuracy": share,
        "next_sentence_low": low,
        "next_sentence_high": high,
    }


# %% How fast this machine is
def measure_speed(
    config: BertConfig,
    length: int = 128,
    batch_size: int = 32,
    rounds: int = 10,
    device: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Time a step of training and a forward pass on this machine.

    Full rows, 15 % of the places to predict, the precision that the device
    is faster in; medians of `rounds`, after two to warm up.

    Returns:
        `parameters`, `device`, `threads`, `precision`, and for `training` and
        `reading` milliseconds and tokens a second.
    """
    place = pick_device(device)
    precision = pick_precision(place)
    model = BertForPreTraining(config).to(place)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(place),
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
    }
    ids = torch.randint(config.vocab_size, (batch_size, length), device=place)
    count = max(1, round(0.15 * length))
    places = torch.arange(count, device=place) * (length // count)
    batch = {
        "input_ids": ids,
        "masked_positions": places.expand(batch_size, -1),
        "labels": ids[:, places],
        "next_sentence_label": ids[:, 0] % 2,
    }
    steps = train(
        model, adamw(model), repeat(batch), lambda _: 1e-4, precision=precision
    )

    def learn() -> None:
        float(next(steps).loss)  # waits for the device

    def read() -> None:
        with evaluating(model), autocast(place, precision):
            model.bert(ids).last_hidden_state.sum().item()

    for name, work in (("training", learn), ("reading", read)):
        seconds = _median_seconds(work, rounds, name if progress else None)
        facts[f"{name}_milliseconds"] = round(1000 * seconds, 3)
        facts[f"{name}_tokens_per_second"] = round(ids.numel() / seconds)
    return facts


def _median_seconds(
    work: Callable[[], None], rounds: int, name: str | None
) -> float:
    times = []
    for _ in trange(rounds + 2, desc=name, disable=name is None):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return median(times[2:])
