"""Next sentence prediction.

Written by tools/extract.py from notebooks/09_next_sentence.md: edit that notebook, not this file.
"""

import random
from collections.abc import Sequence
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
    documents = [[s for s in document if s] for document in documents]
    documents = [document for document in documents if document]
    if len(documents) < 2:
        raise ValueError(
            f"documents has {len(documents)} with text: expected at least 2, "
            "for a random second segment comes from another document"
        )
    if max_tokens < 2:
        raise ValueError(
            f"max_tokens={max_tokens}: expected at least 2, "
            "one token for each segment"
        )
    neighbours = [
        (number, *split)
        for number, document in enumerate(documents)
        for split in _neighbours(document, max_tokens, rng)
    ]
    rng.shuffle(neighbours)
    half = len(neighbours) // 2
    pairs = []
    for i, (number, first, second) in enumerate(neighbours):
        label = NOT_NEXT if i < half else IS_NEXT
        if label == NOT_NEXT:
            second = _stranger(documents, number, max_tokens - len(first), rng)
        pairs.append(
            Pair(*truncate_pair(first, second, max_tokens, rng), label)
        )
    rng.shuffle(pairs)
    return pairs


def _neighbours(
    document: Sequence[Sentence], max_tokens: int, rng: random.Random
) -> list[tuple[Sentence, Sentence]]:
    """Group sentences to about `max_tokens`, and cut each group in two."""
    splits, group = [], []
    for i, sentence in enumerate(document):
        group.append(sentence)
        full = sum(map(len, group)) >= max_tokens or i == len(document) - 1
        if full and len(group) > 1:
            cut = rng.randint(1, len(group) - 1)
            splits.append((_joined(group[:cut]), _joined(group[cut:])))
            group = []
    return splits


def _joined(sentences: Sequence[Sentence]) -> Sentence:
    return [token for sentence in sentences for token in sentence]


def _stranger(
    documents: Sequence[Sequence[Sentence]],
    own: int,
    wanted: int,
    rng: random.Random,
) -> Sentence:
    """Return sentences from a random place of a random other document.

    They fill the row as a true second segment does: a length that differed
    between the classes would give the label away.
    """
    other = rng.randrange(len(documents) - 1)
    document = documents[other + (other >= own)]
    start = rng.randrange(len(document))
    segment: Sentence = []
    for sentence in document[start:]:
        segment = segment + sentence
        if len(segment) >= wanted:
            break
    return segment


def truncate_pair(
    first: Sentence, second: Sentence, max_tokens: int, rng: random.Random
) -> tuple[Sentence, Sentence]:
    """Take tokens off the longer segment, at its front or its end by chance,
    until both fit."""
    first, second = list(first), list(second)
    while len(first) + len(second) > max_tokens:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if rng.random() < 0.5 else -1)
    return first, second


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
