"""From pairs to batches.

Written by tools/extract.py from notebooks/10_rows.md: edit that notebook, not this file.
"""

import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bertnb.masked_lm import IGNORE, mask_tokens
from bertnb.next_sentence import SAMPLERS, Pair, Sentence, truncate_pair
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "Batch",
    "collate_rows",
    "collate_pairs",
    "special_tokens",
    "model_arguments",
    "best_fit",
    "pack_pairs",
    "most_predictions",
    "Documents",
    "token_counts",
    "PretrainingData",
    "move",
]


# %% Rows
Batch = dict[str, Tensor]


def collate_rows(
    rows: Sequence[Sequence[Pair]],
    tokenizer: WordPieceTokenizer,
    length: int,
    pack: int = 1,
) -> Batch:
    """Write rows of pairs: [CLS] A [SEP] B [SEP] for each, then [PAD], (10.3).

    Returns:
        int64 (B, L): `input_ids`; `token_type_ids`; `position_ids`, from 0 in
        each pair; `document_ids`, the number 1, 2, ... of the pair in its row,
        0 for padding. int64 (B, D) with D = `pack`: `cls_positions`, filled
        with 0; `next_sentence_label`, filled with -100.

    Raises:
        ValueError: a row does not fit, (10.2), or has more than `pack` pairs.
    """
    pairs = [pair for row in rows for pair in row]
    counts = np.array([len(row) for row in rows])  # (B), pairs in a row
    _require("pack", pack, counts.max() <= pack, f"{counts.max()} or more")
    heads = np.array([2 + len(pair.first) for pair in pairs])  # [CLS] A [SEP]
    sizes = heads + [len(pair.second) + 1 for pair in pairs]  # B [SEP]
    row = np.arange(len(rows)).repeat(counts)  # of each pair
    slot = np.arange(len(pairs)) - (counts.cumsum() - counts).repeat(counts)
    before = sizes.cumsum() - sizes  # tokens before a pair, in all rows
    start = before - before[np.arange(len(pairs)) - slot]  # and in its row
    tokens = int((start + sizes).max())
    if tokens > length:
        raise ValueError(
            f"a row has {tokens} tokens with its frames, and length={length}: "
            "cut the pairs, or take fewer"
        )
    position = np.arange(sizes.sum()) - before.repeat(sizes)  # of each token
    place = (row * length + start).repeat(sizes) + position  # in all rows

    def spread(values: Iterable[int], padding: int = 0) -> Tensor:
        flat = np.full(len(rows) * length, padding)
        flat[place] = values
        return torch.from_numpy(flat.reshape(len(rows), length))

    def table(values: Iterable[int], filling: int) -> Tensor:
        places = np.full((len(rows), pack), filling)
        places[row, slot] = values
        return torch.from_numpy(places)

    return {
        "input_ids": spread(_framed(pairs, tokenizer), tokenizer.pad_token_id),
        "token_type_ids": spread(position >= heads.repeat(sizes)),
        "position_ids": spread(position),
        "document_ids": spread((slot + 1).repeat(sizes)),
        "cls_positions": table(start, 0),
        "next_sentence_label": table([pair.label for pair in pairs], IGNORE),
    }


def _framed(pairs: Sequence[Pair], tokenizer: WordPieceTokenizer) -> np.ndarray:
    """Return the ids of all pairs, one after the other, each in its frame."""
    cls, sep = (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)
    parts = ((cls, pair.first, sep, pair.second, sep) for pair in pairs)
    ids = chain.from_iterable(chain.from_iterable(parts))
    return np.fromiter(ids, np.int64)


def collate_pairs(
    pairs: Sequence[Pair], tokenizer: WordPieceTokenizer, length: int
) -> Batch:
    """Write each pair as a row [CLS] A [SEP] B [SEP] [PAD]... of `length` ids.

    Returns:
        `input_ids`, `token_type_ids`, `attention_mask`, `special_tokens_mask`
        (B, L) and `next_sentence_label` (B,).

    Raises:
        ValueError: a pair does not fit, (10.2); nothing is cut here.
    """
    rows = collate_rows([[pair] for pair in pairs], tokenizer, length)
    special = special_tokens(rows["input_ids"], tokenizer)
    return model_arguments(rows) | {"special_tokens_mask": special}


def special_tokens(input_ids: Tensor, tokenizer: WordPieceTokenizer) -> Tensor:
    """Return bool (B, L): True for [CLS], [SEP] and [PAD]."""
    frame = input_ids == tokenizer.cls_token_id
    frame |= input_ids == tokenizer.sep_token_id
    return frame | (input_ids == tokenizer.pad_token_id)


def model_arguments(rows: Batch) -> Batch:
    """Name what the model takes of `collate_rows`: a mask for `document_ids`.

    With one pair a row the mask is (B, L), `next_sentence_label` is (B,), and
    the positions are the model's own. With more the mask is bool (B, L, L):
    a token attends to those of its own pair, (10.4), and padding to padding.
    """
    batch = dict(rows)
    documents = batch.pop("document_ids")
    if batch["cls_positions"].shape[1] > 1:
        same = documents[:, :, None] == documents[:, None, :]  # (B, L, L)
        return batch | {"attention_mask": same}
    del batch["position_ids"], batch["cls_positions"]
    labels = batch["next_sentence_label"][:, 0]
    return batch | {"attention_mask": documents, "next_sentence_label": labels}


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expected}")


# %% Filling rows
def best_fit(sizes: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Put up to `most` things in a row of `length`; return their numbers.

    Each in turn goes to the row where it leaves the least room, or begins a
    new one. The rows come in the order in which they are begun.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # what is free in the open rows, ascending
    with_room: dict[int, list[list[int]]] = defaultdict(list)
    for number, size in enumerate(sizes):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            rows.append([])
            row, room = rows[-1], length
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        row.append(number)
        room -= size
        if len(row) < most:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(row)
    return rows


def pack_pairs(
    pairs: Sequence[Pair], length: int, pack: int
) -> list[list[Pair]]:
    """Put up to `pack` pairs in a row of `length` tokens, (10.2), by
    `best_fit`: with `pack` = 1 in the order of the pairs."""
    sizes = [3 + len(pair.first) + len(pair.second) for pair in pairs]
    return [[pairs[i] for i in row] for row in best_fit(sizes, length, pack)]


def most_predictions(length: int, pack: int, mlm_probability: float) -> int:
    """Return P, the most words that a row of up to `pack` pairs hides, (10.6).

    A pair of n >= 5 tokens hides max(1, round(mlm_probability * n)).
    """
    hidden = np.array(
        [
            n >= 5 and max(1, round(mlm_probability * n))
            for n in range(length + 1)
        ]
    )
    most = np.zeros_like(hidden)  # of the pairs so far, in n tokens
    for _ in range(pack):
        most = np.array(
            [(most[: n + 1] + hidden[n::-1]).max() for n in range(length + 1)]
        )
    return int(most[length])


# %% The batch of a step
class Documents(Protocol):
    """Numbered documents of sentences of ids: a list, or `Shards`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sequence[Sentence]: ...


def token_counts(documents: Documents) -> Iterator[int]:
    """Give the number of tokens of each document.

    Documents that know it, as `Shards` do, are not read for it.
    """
    known = getattr(documents, "token_counts", None)
    if known is not None:
        yield from known()
        return
    for number in range(len(documents)):
        yield sum(map(len, documents[number]))


@dataclass
class PretrainingData:
    """Encoded documents that give the batch of any step as a pure function of
    the seed, the step's number and the rank, (10.8).

    Each epoch cuts the documents into new pairs; each batch hides new words.
    In memory are the pairs of one block: documents from all over the corpus,
    others in each epoch, with about `block_tokens` tokens together.

    Args:
        documents: sentences of token ids: a list, or `Shards`.
        length: L, tokens a row. batch_size: B, rows a batch of this rank.
        mlm_probability: the share of tokens to predict.
        sampler: "exact" or "original", how pairs are drawn (`SAMPLERS`).
        short_seq_prob: the share of pairs that are cut to a length uniform in
            [2, L - 3]. The sampler "original" makes its own short pairs.
        dupe_factor: None: every epoch is new. A number: so many epochs, which
            then return with the same pairs and the same hidden words.
        block_tokens: the size of a block. Smaller needs less memory; the
            strangers of a pair come from the same block.
        pack: D, the most pairs in a row.
        rank, ranks: this process, and how many share the documents: in each
            epoch every rank reads its own, as many batches as the others.

    Raises:
        ValueError: an argument is out of range, or the documents give fewer
            rows than a batch needs.
    """

    documents: Documents
    tokenizer: WordPieceTokenizer
    length: int = 64
    batch_size: int = 32
    mlm_probability: float = 0.15
    seed: int = 0
    sampler: str = "exact"
    short_seq_prob: float = 0.0
    dupe_factor: int | None = None
    block_tokens: int = 2**22
    pack: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        self._check()
        self._runs, self._blocks = _blocks(
            self.documents, self.block_tokens, self.ranks
        )
        self.max_predictions = most_predictions(
            self.length, self.pack, self.mlm_probability
        )  # P
        self._kept: tuple[int, list[list[Pair]]] = (-1, [])
        rows = len(self._rows(0))
        self.batches_per_block = rows // self.batch_size
        if self.batches_per_block == 0:
            raise ValueError(
                f"batch_size={self.batch_size}: the documents of a block give "
                f"only {rows} rows"
            )
        self.batches_per_epoch = (
            self._blocks // self.ranks * self.batches_per_block
        )

    def _check(self) -> None:
        for name in ("batch_size", "block_tokens", "pack", "ranks"):
            value = getattr(self, name)
            _require(name, value, value >= 1, "1 or more")
        room = self.length - 3  # for the two segments
        _require("length", self.length, room >= 2, "5 or more: 3 for the frame")
        share = self.mlm_probability
        _require("mlm_probability", share, 0 < share <= 1, "a share in (0, 1]")
        known = self.sampler in SAMPLERS
        _require(
            "sampler", self.sampler, known, f"one of {', '.join(SAMPLERS)}"
        )
        most = 1 if self.sampler == "exact" else 0
        share, where = self.short_seq_prob, f"with sampler={self.sampler!r}"
        possible = 0 <= share <= most
        _require("short_seq_prob", share, possible, f"0 to {most} {where}")
        copies, rank, ranks = self.dupe_factor, self.rank, self.ranks
        possible = copies is None or copies >= 1
        _require("dupe_factor", copies, possible, "None, or 1 or more")
        _require("rank", rank, 0 <= rank < ranks, f"0 to {ranks - 1}")

    def batch(
        self,
        step: int,
        device: str | torch.device = "cpu",
        mlm_probability: float | None = None,
    ) -> Batch:
        """Return the batch of step 0, 1, 2, ...: rows with words hidden.

        The rows travel to the device, and the words are hidden there. The
        names are those of the model's arguments. `input_ids` hold what stands
        in the hidden words' places; `masked_positions` and `labels` are (B, P)
        with P = `max_predictions`. With `pack` > 1 there are `position_ids`
        and `cls_positions`, and the mask is bool (B, L, L).

        Args:
            mlm_probability: another share for this batch. P stays as it is
                unless the share is larger than that of the data.

        Raises:
            ValueError: `step` is negative, or a block gives no pair.
        """
        _require("step", step, step >= 0, "0 or more")
        if self.dupe_factor is not None:
            step %= self.dupe_factor * self.batches_per_epoch
        mine, i = divmod(step, self.batches_per_block)  # (10.8)
        rows = self._rows(mine * self.ranks + self.rank)
        if not rows:
            raise ValueError(
                f"block_tokens={self.block_tokens}: the documents of a block "
                "give no pair; choose a larger number"
            )
        start = i * self.batch_size
        chosen = [rows[(start + j) % len(rows)] for j in range(self.batch_size)]
        batch = collate_rows(chosen, self.tokenizer, self.length, self.pack)
        batch = {
            name: move(t, torch.device(device)) for name, t in batch.items()
        }
        share = (
            self.mlm_probability if mlm_probability is None else mlm_probability
        )
        return model_arguments(batch) | self._hide(batch, step, share)

    def _hide(self, rows: Batch, step: int, mlm_probability: float) -> Batch:
        """Hide words, on the device where the rows are."""
        ids, slots = rows["input_ids"], self.max_predictions
        if mlm_probability > self.mlm_probability:
            slots = most_predictions(self.length, self.pack, mlm_probability)
        seed = random.Random(f"{self.seed} mask {step}").getrandbits(63)
        ids, places, labels = mask_tokens(
            ids,
            special_tokens(ids, self.tokenizer),
            vocab_size=self.tokenizer.vocab_size,
            mask_token_id=self.tokenizer.mask_token_id,
            mlm_probability=mlm_probability,
            max_predictions=slots,
            pad_token_id=self.tokenizer.pad_token_id,
            generator=torch.Generator(ids.device).manual_seed(seed ^ self.rank),
            document_ids=rows["document_ids"] if self.pack > 1 else None,
        )
        return {"input_ids": ids, "masked_positions": places, "labels": labels}

    def _rows(self, visit: int) -> list[list[Pair]]:
        """Return the rows of a visit to a block; the last visit's are kept."""
        if self._kept[0] != visit:
            self._kept = (-1, [])  # first let go: never two blocks in memory
            pairs = self._pairs(visit)
            self._kept = (visit, pack_pairs(pairs, self.length, self.pack))
        return self._kept[1]

    def _pairs(self, visit: int) -> list[Pair]:
        documents = [
            self.documents[i] for run in self._block(visit) for i in run
        ]
        rng = random.Random(f"{self.seed} {visit}")
        pairs = SAMPLERS[self.sampler](documents, self.length - 3, rng)
        return [self._shortened(pair, rng) for pair in pairs]

    def _shortened(self, pair: Pair, rng: random.Random) -> Pair:
        if rng.random() >= self.short_seq_prob:
            return pair
        room = rng.randint(2, self.length - 3)
        first, second = truncate_pair(pair.first, pair.second, room, rng)
        return replace(pair, first=first, second=second)

    def _block(self, visit: int) -> list[range]:
        """Return the runs that a visit reads, (10.7)."""
        epoch, block = divmod(visit, self._blocks)
        chance = random.Random(f"{self.seed} runs {epoch}")
        dealt: list[range] = []
        for start in range(0, len(self._runs), self._blocks):
            hand = self._runs[start : start + self._blocks]
            dealt += chance.sample(hand, len(hand))
        mine = dealt[block :: self._blocks]
        return sorted(mine, key=lambda run: run.start)


def _blocks(
    documents: Documents, block_tokens: int, ranks: int
) -> tuple[list[range], int]:
    """Cut documents into runs of neighbours, the largest first; return them
    and the number of blocks that they are dealt to, (10.7)."""
    counts = np.fromiter(token_counts(documents), np.int64)
    total = int(counts.sum())
    enough = max(1, min(block_tokens, ceil(total / ranks)) // 64)
    runs: list[tuple[int, range]] = []
    start = size = 0
    for number, count in enumerate(counts, 1):
        size += int(count)
        if size >= enough or (size and number == len(counts)):
            runs.append((size, range(start, number)))
            start, size = number, 0
    runs.sort(key=lambda run: -run[0])
    # at least two runs a block, for a stranger is from another document
    most = len(runs) // (2 * ranks)
    expected = f"at most {len(runs) // 2}, two documents for each"
    _require("ranks", ranks, ranks == 1 or most > 0, expected)
    blocks = max(1, min(ceil(total / (block_tokens * ranks)), most))
    return [run for _, run in runs], ranks * blocks


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; the host need not wait for a GPU."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
