"""What the training benchmarks share: two models with the same weights, the
same batch for both, the gate that they must pass, and a fair clock.

"ours" is `bertnb.BertForPreTraining`; "theirs" is the class of that name in
`transformers`, in its best setting: fused AdamW, SDPA attention, and no mask
where no row has padding.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# a machine without the package installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from bertnb.configuration import BertConfig
from bertnb.masked_lm import IGNORE, mask_tokens
from bertnb.next_sentence import Pair
from bertnb.optimization import adamw, autocast
from bertnb.pretraining import BertForPreTraining
from bertnb.rows import (
    collate_rows,
    model_arguments,
    most_predictions,
    pack_pairs,
    special_tokens,
)

transformers.utils.logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parents[1]

# layers, hidden size, heads
SIZES = {
    "tiny": (2, 32, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
# Lengths of the pairs for length 512 from Wikipedia: the share, in thousandths,
# of 1-32, 33-64, ... 481-511, and 512 tokens. Summed from the histogram that
# Krell et al. publish with arXiv 2107.02027; the mean is 256 tokens.
WIKIPEDIA = (36, 140, 114, 80, 62, 52, 44, 39, 34, 30, 28, 25, 23, 21, 20, 18)
FULL = 234
MLM = 0.15
# what the functions of the package ask of a tokenizer
FRAME: Any = SimpleNamespace(pad_token_id=0, cls_token_id=2, sep_token_id=3)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # of a loss, in nats
COSINE = 0.999  # of a gradient
Batch = dict[str, Tensor]


def configuration(
    size: str, length: int, vocab_size: int, dropout: float
) -> BertConfig:
    layers, hidden, heads = SIZES[size]
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=max(length, 128),
    )


def our_model(
    config: BertConfig, device: torch.device, seed: int = 0
) -> BertForPreTraining:
    torch.manual_seed(seed)
    with torch.device(device):
        return BertForPreTraining(config)


def models(
    config: BertConfig, device: torch.device, seed: int = 0
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return our model, and theirs read from the folder that ours wrote."""
    ours = our_model(config, device, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.BertForPreTraining.from_pretrained(
            folder, attn_implementation="sdpa"
        )
    return ours, theirs.to(device)


# %% Batches
@dataclass(frozen=True)
class Problem:
    """The same pairs for both; `tokens` are real ones, without padding."""

    ours: Batch
    theirs: Batch
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def wikipedia_lengths(number: int, length: int, seed: int = 0) -> list[int]:
    """Return lengths as the histogram has them, in random order: `number`
    quantiles, so that their mean is the histogram's; scaled down where `length`
    is below 512."""
    bins = [(max(17, 32 * i + 1), min(32 * i + 32, 511)) for i in range(16)]
    total, lengths = sum(WIKIPEDIA) + FULL, []
    for i in range(number):
        left = (i + 0.5) / number * total
        drawn = 512.0
        for share, (low, high) in zip(WIKIPEDIA, bins, strict=True):
            if left < share:
                drawn = low + (high - low) * left / share
                break
            left -= share
        lengths.append(max(5, round(drawn * length / 512)))
    random.Random(seed).shuffle(lengths)
    return lengths


def predictions(length: int) -> int:
    return most_predictions(length, 1, MLM)


def problem(
    lengths: Sequence[int],
    length: int,
    vocab_size: int,
    depth: int = 1,
    seed: int = 0,
) -> Problem:
    """Return pairs of random words of these lengths, frames counted, with words
    hidden: one a row for them, and for us up to `depth`. Neither side gets a
    mask where no row has padding."""
    rng = random.Random(seed)
    pairs = [random_pair(i, n, vocab_size, rng) for i, n in enumerate(lengths)]
    padded = collate_rows([[pair] for pair in pairs], FRAME, length)
    ids = padded["input_ids"]
    shown, positions, targets = mask_tokens(
        ids,
        special_tokens(ids, FRAME),
        vocab_size=vocab_size,
        mask_token_id=4,
        mlm_probability=MLM,
        generator=torch.Generator().manual_seed(seed),
    )
    padded["input_ids"] = shown
    labels = F.pad(torch.full_like(ids, IGNORE), (0, 1))  # a bin for no target
    places = positions.where(targets != IGNORE, length)
    labels = labels.scatter(1, places, targets)[:, :length]
    theirs = model_arguments(padded)
    ours = theirs | {"masked_positions": positions, "labels": targets}
    if depth > 1:
        rows = pack_pairs(pairs, length, depth)
        ours = packed(rows, padded["input_ids"], labels, depth)
    elif min(lengths) == length:
        del ours["attention_mask"], theirs["attention_mask"]
    return Problem(
        ours, theirs | {"labels": labels.contiguous()}, tuple(lengths)
    )


def random_pair(
    number: int, tokens: int, vocab_size: int, rng: random.Random
) -> Pair:
    """Return a pair that has so many tokens with its frame, and a number."""
    words = rng.choices(range(5, vocab_size), k=tokens - 3)
    cut = max(1, len(words) // 2)
    order = rng.randrange(2)
    return Pair(words[:cut], words[cut:], order, (number, number))


def packed(
    rows: Sequence[Sequence[Pair]], ids: Tensor, labels: Tensor, depth: int
) -> Batch:
    """Lay rows of pairs out, with the ids and labels that each has alone."""
    length = ids.shape[1]
    batch = collate_rows(rows, FRAME, length, depth)
    numbers = [
        [pair.documents[0] for pair in row if pair.documents] for row in rows
    ]
    owner = torch.tensor([row + [0] * (depth - len(row)) for row in numbers])
    real = batch["document_ids"] > 0
    pair = owner.gather(1, (batch["document_ids"] - 1).clamp(min=0))  # (B, L)
    batch["input_ids"] = ids[pair, batch["position_ids"]] * real
    label = labels[pair, batch["position_ids"]].where(real, IGNORE)
    slots = most_predictions(length, depth, MLM)
    place = torch.arange(length).where(label != IGNORE, length)
    place = place.sort(-1).values[:, :slots]
    return model_arguments(batch) | {
        "masked_positions": place.where(place < length, 0),
        "labels": F.pad(label, (0, 1), value=IGNORE).gather(1, place),
    }


# %% The gate
def losses(
    model: torch.nn.Module,
    batch: Batch,
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, Tensor]:
    """Return both losses, computed from the scores in float32."""
    inputs = {k: v.to(device) for k, v in batch.items()}
    wanted = {k: inputs.pop(k) for k in ("labels", "next_sentence_label")}
    with autocast(device, precision):
        out = model(**inputs)
    scores = out.prediction_logits, out.seq_relationship_logits
    return {
        name: F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        for (name, targets), logits in zip(wanted.items(), scores, strict=True)
    }


def five_tensors(model: Any) -> dict[str, Tensor]:
    layers = model.bert.encoder.layer
    mine = isinstance(model, BertForPreTraining)
    return {
        "word embeddings": model.bert.embeddings.word_embeddings.weight,
        "first query": (
            layers[0].attention.query
            if mine
            else layers[0].attention.self.query
        ).weight,
        "first attention norm": (
            layers[0].attention_norm
            if mine
            else layers[0].attention.output.LayerNorm
        ).weight,
        "last feed-forward": (
            layers[-1].feed_forward.output if mine else layers[-1].output.dense
        ).weight,
        "head": (
            model.masked_lm.dense
            if mine
            else model.cls.predictions.transform.dense
        ).weight,
    }


def gate(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    batches: Problem,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Compare losses and gradients, without dropout."""
    found: list[dict[str, Tensor]] = []
    gradients = []
    for model, batch in ((ours, batches.ours), (theirs, batches.theirs)):
        model.eval()
        here = losses(model, batch, device, precision)
        sum(here.values()).backward()
        gradients.append({k: t.grad for k, t in five_tensors(model).items()})
        found.append({k: v.detach() for k, v in here.items()})
        model.zero_grad()
        model.train()
    mine, other = found
    result = {
        "precision": str(precision).removeprefix("torch."),
        "loss": {k: round(float(v), 6) for k, v in mine.items()},
        "loss_difference": {k: float((mine[k] - other[k]).abs()) for k in mine},
        "gradient_cosine": {
            k: float(
                F.cosine_similarity(
                    gradients[0][k].flatten().double(),
                    gradients[1][k].flatten().double(),
                    dim=0,
                )
            )
            for k in gradients[0]
        },
        "bound": BOUNDS[precision],
    }
    worst = max(result["loss_difference"].values())
    least = min(result["gradient_cosine"].values())
    result["passed"] = worst <= BOUNDS[precision] and least >= COSINE
    print(
        f"gate {result['precision']}: losses differ by {worst:.1e} (at most "
        f"{BOUNDS[precision]:g}), gradients' cosine {least:.6f} (at least "
        f"{COSINE}): {'passed' if result['passed'] else 'FAILED'}",
        flush=True,
    )
    return result


# %% The clock
class Peer:
    """One side of a race: a full step is copy, forward, backward, clip, update."""

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        batch: Batch,
        tokens: int,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        call: Callable[..., Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.name, self.model, self.device = name, model, device
        self.batch, self.tokens = batch, tokens
        if device.type == "cuda":
            self.batch = {k: v.pin_memory() for k, v in batch.items()}
        self.precision = precision
        self.call = model if call is None else call
        self.optimizer = optimizer or adamw(model)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        self.first_seconds = self.first_loss = 0.0
        self.peak_bytes = 0

    def step(self) -> Tensor:
        inputs = {
            k: v.to(self.device, non_blocking=True)
            for k, v in self.batch.items()
        }
        with autocast(self.device, self.precision):
            loss = self.call(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def state_bytes(self) -> int:
        """Bytes of the weights and the optimiser's state."""
        tensors = list(self.model.parameters())
        for state in self.optimizer.state.values():
            tensors += [t for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def seconds(peer: Peer, steps: int) -> float:
    """Return the seconds of a step, the mean of `steps`."""
    cuda = peer.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        peer.step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def warm_up(peer: Peer, steps: int) -> None:
    """Take the first steps, with compilation; note time, memory and loss."""
    peer.model.train()
    started = time.perf_counter()
    peer.first_loss = float(peer.step())
    peer.first_seconds = time.perf_counter() - started
    if peer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - peer.state_bytes()
    seconds(peer, steps)
    if peer.device.type == "cuda":
        peer.peak_bytes = torch.cuda.max_memory_allocated() - others


def race(peers: Sequence[Peer], rounds: int, steps: int = 1) -> dict[str, Any]:
    """Time the peers in rounds, in which each has its turn; the first is ours.

    `compared` holds, for each other peer, the median and the quartiles of the
    rounds' own ratios: how many times as long as ours it takes for a token.
    """
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    before = ticks()
    for turn in range(rounds):
        k = turn % len(peers)
        for peer in [*peers[k:], *peers[:k]]:
            if peer.device.type == "cuda":
                peer.step()  # its memory and its clocks are back
            times[peer.name].append(seconds(peer, steps))
    mine = [t / peers[0].tokens for t in times[peers[0].name]]
    result: dict[str, Any] = {"rounds": rounds, "steps_a_round": steps}
    stolen, whole = (b - a for a, b in zip(before, ticks(), strict=True))
    result["stolen_share"] = round(stolen / max(1, whole), 3)
    result["peers"] = {
        peer.name: {
            **spread(times[peer.name], 5, "seconds"),
            "tokens": peer.tokens,
            "tokens_per_second": round(
                peer.tokens / statistics.median(times[peer.name])
            ),
            "first_step_seconds": round(peer.first_seconds, 2),
            "peak_megabytes": round(peer.peak_bytes / 2**20) or None,
        }
        for peer in peers
    }
    result["times"] = {
        name: [round(t, 5) for t in taken] for name, taken in times.items()
    }
    result["compared"] = {
        peer.name: spread(
            [
                b / peer.tokens / a
                for a, b in zip(mine, times[peer.name], strict=True)
            ],
            3,
            "ratio",
        )
        for peer in peers[1:]
    }
    return result


def spread(values: Sequence[float], digits: int, name: str) -> dict[str, float]:
    """Return the best, the median and the quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else (values[0],) * 3
    )
    found = {name: middle, "quartile_1": low, "quartile_3": high}
    return {k: round(v, digits) for k, v in found.items()} | {
        "least": round(min(values), digits)
    }


def ticks() -> tuple[int, int]:
    """Return the processor's time so far that others on the host took, and all
    of it."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0, 0
    fields = [int(x) for x in stat.read_text().split("\n")[0].split()[1:9]]
    return fields[7], sum(fields)


def peak_megabytes() -> float:
    """Return the most memory this program has had. (Linux's `ru_maxrss` would
    also count the process that started it.)"""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return round(int(found[1]) / 2**10, 1) if found else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


# %% Records
def facts(seed: int | None = 0) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(
        r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else ""
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    )
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {
            "cpu": found[1] if found else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": seed,
        # a machine that only has a copy of the tree is told the commit
        "commit": os.environ.get("COMMIT") or commit.stdout.strip() or None,
    }


def add_to_record(path: str | Path | None, entry: dict[str, Any]) -> None:
    """Append one result; the first makes the record, with its facts."""
    if path is None:
        return
    file = Path(path)
    record: dict[str, Any] = {"facts": facts(), "results": []}
    if file.exists():
        record = json.loads(file.read_text(encoding="utf-8"))
    record["results"].append({"command": " ".join(sys.argv), **entry})
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def add_line(path: str | Path, entry: dict[str, Any]) -> None:
    """Append one result to a record that has a result, with its facts, a line."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def show(result: dict[str, Any]) -> None:
    """Print a race as a table."""
    print(f"{'':22}{'ms a step':>10}{'tokens/s':>12}{'MB':>8}{'takes':>8}")
    for name, peer in result["peers"].items():
        ratio = result["compared"].get(name, {"ratio": 1.0})["ratio"]
        memory = peer["peak_megabytes"] or "-"
        print(
            f"{name:22}{1000 * peer['seconds']:10.1f}"
            f"{peer['tokens_per_second']:12,}{memory:>8}{ratio:7.2f}x",
            flush=True,
        )
