"""Next sentence prediction.

Written by tools/extract.py from notebooks/09_next_sentence.md: edit that notebook, not this file.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch.nn.functional as F
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import IGNORE, check_targets

__all__ = [
    "IS_NEXT",
    "NOT_NEXT",
    "Sentence",
    "Pair",
    "sample_pairs",
    "truncate_pair",
    "original_pairs",
    "Sampler",
    "SAMPLERS",
    "next_sentence_loss",
    "NextSentenceOutput",
    "BertForNextSentencePrediction",
    "accuracy_interval",
]


# %% Pairs from documents
IS_NEXT, NOT_NEXT = 0, 1  # the original's labels
Sentence = list[int]


@dataclass(frozen=True)
class Pair:
    """Two segments of token ids, and whether the second follows the first."""

    first: Sentence
    second: Sentence
    label: int  # IS_NEXT or NOT_NEXT
    documents: tuple[int, int] | None = None  # where the segments come from


def sample_pairs(
    documents: Sequence[Sequence[Sentence]],
    max_tokens: int,
    rng: random.Random,
) -> list[Pair]:
    """Cut documents into pairs of neighbouring segments, and give every other
    pair a stranger as its second segment, (9.1).

    Exactly half of the pairs (one less if their number is odd) are NOT_NEXT,
    and their second segment is always from another document. A pair has at
    most `max_tokens` tokens. Empty sentences and documents are left out; a
    document of one sentence gives strangers, but no pair.

    Raises:
        ValueError: fewer than two documents, or no room for two tokens.
    """
    filled = _filled(documents, max_tokens)
    if len(filled) < 2:
        raise ValueError(
            f"documents has {len(filled)} with text: expected at least 2, "
            "for a random second segment comes from another document"
        )
    neighbours = [
        (own, *split)
        for own, (_, document) in enumerate(filled)
        for split in _neighbours(document, max_tokens, rng)
    ]
    rng.shuffle(neighbours)
    half = len(neighbours) // 2
    pairs = []
    for i, (own, first, second) in enumerate(neighbours):
        other, label = own, IS_NEXT
        if i < half:
            other = rng.randrange(len(filled) - 1)
            other, label = other + (other >= own), NOT_NEXT
            # as long as a true second segment, or its length would tell
            wanted = max_tokens - len(first)
            second = _stretch(filled[other][1], wanted, rng)
        first, second = truncate_pair(first, second, max_tokens, rng)
        numbers = filled[own][0], filled[other][0]
        pairs.append(Pair(first, second, label, numbers))
    rng.shuffle(pairs)
    return pairs


def _filled(
    documents: Sequence[Sequence[Sentence]], max_tokens: int
) -> list[tuple[int, list[Sentence]]]:
    """Return the documents with text and their numbers, without the empty
    sentences."""
    if max_tokens < 2:
        raise ValueError(
            f"max_tokens={max_tokens}: expected at least 2, "
            "one token for each segment"
        )
    cleaned = [[s for s in document if s] for document in documents]
    return [(i, document) for i, document in enumerate(cleaned) if document]


def _neighbours(
    document: Sequence[Sentence], max_tokens: int, rng: random.Random
) -> list[tuple[Sentence, Sentence]]:
    """Group sentences to about `max_tokens`, and cut each group in two."""
    splits: list[tuple[Sentence, Sentence]] = []
    group: list[Sentence] = []
    size = 0
    for i, sentence in enumerate(document):
        group.append(sentence)
        size += len(sentence)
        full = size >= max_tokens or i == len(document) - 1
        if full and len(group) > 1:
            cut = rng.randint(1, len(group) - 1)
            splits.append((_joined(group[:cut]), _joined(group[cut:])))
            group, size = [], 0
    return splits


def _joined(sentences: Iterable[Sentence]) -> Sentence:
    return [token for sentence in sentences for token in sentence]


def _stretch(
    document: Sequence[Sentence], wanted: int, rng: random.Random
) -> Sentence:
    """Return sentences from a random place on, until `wanted` tokens."""
    segment: Sentence = []
    for i in range(rng.randrange(len(document)), len(document)):
        segment.extend(document[i])
        if len(segment) >= wanted:
            break
    return segment


def truncate_pair(
    first: Sentence, second: Sentence, max_tokens: int, rng: random.Random
) -> tuple[Sentence, Sentence]:
    """Take tokens off the longer segment, at its front or its end by chance,
    until both fit."""
    front, sizes = [0, 0], [len(first), len(second)]
    while sum(sizes) > max_tokens:
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        front[longer] += rng.random() < 0.5
    a, b = (slice(f, f + n) for f, n in zip(front, sizes, strict=True))
    return list(first[a]), list(second[b])


# %% The sampler of the original
def original_pairs(
    documents: Sequence[Sequence[Sentence]],
    max_tokens: int,
    rng: random.Random,
    short_seq_prob: float = 0.1,
) -> list[Pair]:
    """Cut documents into pairs as the original BERT does.

    More than half of the pairs are NOT_NEXT, and with few documents some of
    these come from the same document; `lint_pairs` counts both. With the
    probability `short_seq_prob` the pairs of a document aim at a shorter
    length, uniform in [2, `max_tokens`].

    Raises:
        ValueError: no document has text, no room for two tokens, or
            `short_seq_prob` is not a probability.
    """
    if not 0 <= short_seq_prob <= 1:
        raise ValueError(f"short_seq_prob={short_seq_prob}: expected 0 to 1")
    filled = _filled(documents, max_tokens)
    if not filled:
        raise ValueError("documents has none with text: expected at least 1")
    rng.shuffle(filled)
    pairs = []
    for own in range(len(filled)):
        target = max_tokens
        if rng.random() < short_seq_prob:
            target = rng.randint(2, max_tokens)
        pairs += _original_pairs(filled, own, target, max_tokens, rng)
    rng.shuffle(pairs)
    return pairs


def _original_pairs(
    filled: Sequence[tuple[int, Sequence[Sentence]]],
    own: int,
    target: int,
    max_tokens: int,
    rng: random.Random,
) -> list[Pair]:
    """Return the pairs whose first segments are from document `own`."""
    number, document = filled[own]
    pairs, start = [], 0
    while start < len(document):
        end = _chunk_end(document, start, target)
        cut = start + 1
        if end - start > 1:
            cut = rng.randint(start + 1, end - 1)
        first = _joined(document[start:cut])
        if end - start == 1 or rng.random() < 0.5:
            other, text = filled[_ten_tries(filled, own, rng)]
            label = NOT_NEXT
            second = _stretch(text, target - len(first), rng)
            start = cut  # the rest of the chunk is put back
        else:
            label, other = IS_NEXT, number
            second = _joined(document[cut:end])
            start = end
        first, second = truncate_pair(first, second, max_tokens, rng)
        pairs.append(Pair(first, second, label, (number, other)))
    return pairs


def _chunk_end(document: Sequence[Sentence], start: int, target: int) -> int:
    """Return the end of the sentences from `start` on that reach `target`."""
    size = 0
    for i in range(start, len(document)):
        size += len(document[i])
        if size >= target:
            return i + 1
    return len(document)


def _ten_tries(filled: Sequence[object], own: int, rng: random.Random) -> int:
    """Draw a document, at most ten times, until it is another one."""
    for _ in range(10):
        other = rng.randrange(len(filled))
        if other != own:
            break
    return other


Sampler = Callable[
    [Sequence[Sequence[Sentence]], int, random.Random], list[Pair]
]
SAMPLERS: dict[str, Sampler] = {
    "exact": sample_pairs,
    "original": original_pairs,
}


def next_sentence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log P(label), (9.3).

    Args:
        logits: (B, 2) floats: the scores of "follows" (0) and "does not" (1).
        labels: int64 (B,), 0 or 1; -100 does not count.

    Raises:
        ValueError: a shape or a label is wrong.
    """
    if labels.dim() != 1 or logits.shape != (len(labels), 2):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}; expected (B, 2) and (B,)"
        )
    check_targets(labels, "labels", 2)
    total = F.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE, reduction="sum"
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


@dataclass
class NextSentenceOutput:
    """What `BertForNextSentencePrediction` returns."""

    loss: Tensor | None
    logits: Tensor  # (B, 2)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BertForNextSentencePrediction(PretrainedModel):
    """BERT with the next-sentence head on the pooled [CLS], (9.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        initialize(self.next_sentence, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> NextSentenceOutput:
        """Score whether segment B follows segment A: label 0 = follows.

        Other arguments as in `BertModel`.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            output_hidden_states,
            output_attentions,
        )
        logits = self.next_sentence(encoded.pooler_output)
        loss = None if labels is None else next_sentence_loss(logits, labels)
        return NextSentenceOutput(
            loss, logits, encoded.hidden_states, encoded.attentions
        )


# %% The interval of an accuracy
def accuracy_interval(accuracy: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy measured on `trials` independent
    cases, (9.7).

    Raises:
        ValueError: the accuracy lies outside [0, 1], or there was no trial.
    """
    if not 0 <= accuracy <= 1 or trials < 1:
        raise ValueError(
            f"accuracy={accuracy}, trials={trials}: expected a share in [0, 1] "
            "of at least one trial"
        )
    u = NormalDist().inv_cdf(0.975)
    variance = accuracy * (1 - accuracy) / trials + u**2 / (4 * trials**2)
    scale = 1 + u**2 / trials
    middle = (accuracy + u**2 / (2 * trials)) / scale
    reach = u * variance**0.5 / scale
    return max(0.0, middle - reach), min(1.0, middle + reach)
