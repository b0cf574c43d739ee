"""Next sentence prediction.

Written by tools/extract.py from notebooks/09_next_sentence.md: edit that notebook, not this file.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from statistics import NormalDist

from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import mean_cross_entropy

__all__ = [
    "IS_NEXT",
    "NOT_NEXT",
    "Sentence",
    "Pair",
    "sample_pairs",
    "truncate_pair",
    "original_pairs",
    "SAMPLERS",
    "next_sentence_loss",
    "NextSentenceOutput",
    "BertForNextSentencePrediction",
    "accuracy_interval",
    "PairReport",
    "FAULTS",
    "lint_pairs",
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

    Exactly half of the pairs (one less if their number is odd) are NOT_NEXT.
    Their second segment is the second segment of another pair, of about the
    same length, and always from another document. A pair has at most
    `max_tokens` tokens. Empty sentences and documents are left out; a document
    of one sentence gives strangers, but no pair.

    Raises:
        ValueError: fewer than two documents, or no room for two tokens.
    """
    filled = _filled(documents, max_tokens)
    if len(filled) < 2:
        raise ValueError(
            f"documents has {len(filled)} with text: expected at least 2, "
            "for a random second segment comes from another document"
        )
    groups = [
        (own, *split)
        for own, (_, document) in enumerate(filled)
        for split in _neighbours(document, max_tokens, rng)
    ]
    rng.shuffle(groups)
    half = len(groups) // 2
    lone = [(i, d[0]) for i, (_, d) in enumerate(filled) if len(d) == 1]
    strangers = _strangers([(i, s) for i, _, s in groups] + lone, half, rng)
    pairs = []
    for i, (own, first, second) in enumerate(groups):
        other, label = own, IS_NEXT
        if i < half:
            (other, second), label = strangers[i], NOT_NEXT
        first, second = truncate_pair(first, second, max_tokens, rng)
        numbers = filled[own][0], filled[other][0]
        pairs.append(Pair(first, second, label, numbers))
    rng.shuffle(pairs)
    return pairs


def _strangers(
    segments: Sequence[tuple[int, Sentence]], half: int, rng: random.Random
) -> list[tuple[int, Sentence]]:
    """Return, for each of the first `half` segments, the next longer or the
    next shorter one of another document, by chance."""
    order = sorted(range(len(segments)), key=lambda i: len(segments[i][1]))
    near: list[list[int]] = [[] for _ in range(half)]
    for way in (order, order[::-1]):
        other = None  # the last segment of another document
        for last, i in pairwise(way):
            if segments[last][0] != segments[i][0]:
                other = last
            if other is not None and i < half:
                near[i].append(other)
    return [segments[rng.choice(near[i])] for i in range(half)]


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
            first, second = list(chain(*group[:cut])), list(chain(*group[cut:]))
            splits.append((first, second))
            group, size = [], 0
    return splits


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
        first = list(chain(*document[start:cut]))
        if end - start == 1 or rng.random() < 0.5:
            other, text = filled[_ten_tries(filled, own, rng)]
            label = NOT_NEXT
            second = _stretch(text, target - len(first), rng)
            start = cut  # the rest of the chunk is put back
        else:
            label, other = IS_NEXT, number
            second = list(chain(*document[cut:end]))
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
    draws = (rng.randrange(len(filled)) for _ in range(10))
    return next((other for other in draws if other != own), own)


SAMPLERS: dict[str, Callable[..., list[Pair]]] = {
    "exact": sample_pairs,
    "original": original_pairs,
}


def next_sentence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log P(label), (9.3).

    Args:
        logits: (B, 2) floats: the scores of "follows" (0) and "does not" (1);
            (B, D, 2) where a row holds D pairs.
        labels: int64 (B,) or (B, D), 0 or 1; -100 does not count.

    Raises:
        TypeError: the labels are not int64.
        ValueError: a shape or a label is wrong.
    """
    if labels.dim() not in (1, 2) or logits.shape != (*labels.shape, 2):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}; expected (B, 2) and (B,), or (B, D, 2) "
            "and (B, D)"
        )
    return mean_cross_entropy(logits, labels, "labels")


@dataclass
class NextSentenceOutput:
    """What `BertForNextSentencePrediction` returns."""

    loss: Tensor | None
    logits: Tensor  # (B, 2)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None  # the loss under "labels"


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
            loss,
            logits,
            encoded.hidden_states,
            encoded.attentions,
            None if loss is None else {"labels": loss},
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


# %% A linter for pairs
@dataclass(frozen=True)
class PairReport:
    """What `lint_pairs` found: counts and shares; its `str` is a table.

    The two accuracies are those of a rule that looks at one thing only, both
    labels weighted alike: 0.5 is a coin. None where a figure cannot be told.
    """

    pairs: int
    not_next: float  # share of the label NOT_NEXT
    cross_document: float | None  # share of pairs from two documents
    same_document_strangers: int | None  # NOT_NEXT, and yet one document
    two_document_followers: int | None  # IS_NEXT, and yet two documents
    length_accuracy: float | None  # best threshold on a length, (9.8)
    document_accuracy: float | None  # from the second segment's document
    duplicates: int
    empty: int  # pairs with an empty segment

    @property
    def warnings(self) -> dict[str, str]:
        """Each figure that chance does not explain: its name, and why."""
        n, share = self.pairs, self.not_next
        doubt = 1.95 / max(n * share * (1 - share), 1) ** 0.5  # (9.9)
        checks = {
            "not_next": abs(share - 0.5) > 1.65 / n**0.5,
            "same_document_strangers": self.same_document_strangers,
            "two_document_followers": self.two_document_followers,
            "length_accuracy": (self.length_accuracy or 0) > 0.51 + doubt / 2,
            "document_accuracy": (self.document_accuracy or 0) > 0.51 + doubt,
            "duplicates": self.duplicates > 0.01 * n,
            "empty": self.empty,
        }
        return {name: FAULTS[name] for name, bad in checks.items() if bad}

    def __str__(self) -> str:
        lines = []
        for name, value in vars(self).items():
            form = ".1%" if isinstance(value, float) else ","
            text = "not known" if value is None else format(value, form)
            lines.append(f"{name:24}{text:>10}")
        lines += [f"WARNING {k}: {why}" for k, why in self.warnings.items()]
        return "\n".join(lines)


FAULTS = {
    "not_next": "the labels are not equally frequent",
    "same_document_strangers": "NOT_NEXT, but both from one document",
    "two_document_followers": "IS_NEXT, but from two documents",
    "length_accuracy": "the length of the segments tells the label",
    "document_accuracy": "the second segment's document tells the label",
    "duplicates": "more than one pair in a hundred is a copy",
    "empty": "a segment without tokens",
}


def lint_pairs(pairs: Sequence[Pair]) -> PairReport:
    """Look for the known faults of pairs for next sentence prediction.

    Pairs that do not say their `documents` are judged by the rest.

    Raises:
        ValueError: there is no pair, or a label is neither 0 nor 1.
    """
    labels = Counter(p.label for p in pairs)
    if not pairs or not labels.keys() <= {IS_NEXT, NOT_NEXT}:
        raise ValueError(
            f"pairs has {len(pairs)} with the labels {sorted(labels)}: "
            "expected at least 1, and only 0 and 1"
        )
    weights = {y: (-1) ** y / n for y, n in labels.items()}
    places = [(weights[p.label], p.documents) for p in pairs if p.documents]
    known, both = len(places) == len(pairs), len(labels) == 2
    cases = Counter((p.label, len({*(p.documents or ())})) for p in pairs)
    seconds = [(weight, second) for weight, (_, second) in places]
    return PairReport(
        len(pairs),
        labels[NOT_NEXT] / len(pairs),
        sum(a != b for _, (a, b) in places) / len(pairs) if known else None,
        cases[NOT_NEXT, 1] if known else None,
        cases[IS_NEXT, 2] if known else None,
        _length_accuracy(pairs, weights) if both else None,
        _document_accuracy(seconds) if both and known else None,
        len(pairs) - len({(*p.first, None, *p.second) for p in pairs}),
        sum(not (p.first and p.second) for p in pairs),
    )


def _length_accuracy(
    pairs: Sequence[Pair], weights: Mapping[int, float]
) -> float:
    """Return (1 + D) / 2 for the length that has the largest D, (9.8)."""
    gaps = []
    for a, b in ((1, 0), (0, 1), (1, 1)):  # first, second, both together
        steps: dict[int, float] = defaultdict(float)
        for p in pairs:
            steps[a * len(p.first) + b * len(p.second)] += weights[p.label]
        gaps += [abs(d) for d in accumulate(steps[k] for k in sorted(steps))]
    return (1 + max(gaps)) / 2


def _document_accuracy(cases: Sequence[tuple[float, int]]) -> float:
    """Learn from half of the (weight, document) which label each document has
    more often, and return how much of the other half that gets right."""
    shuffled = random.Random(0).sample(cases, len(cases))
    votes: dict[int, float] = defaultdict(float)
    for weight, document in shuffled[::2]:
        votes[document] += weight
    test = [(weight, votes[document]) for weight, document in shuffled[1::2]]
    right = sum(abs(w) * (1 + (v * w > 0) - (v * w < 0)) / 2 for w, v in test)
    return right / sum(abs(w) for w, _ in test)
