"""Named entities: a class for every token.

Written by tools/extract.py from notebooks/19_entities.md: edit that notebook, not this file.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from statistics import fmean
from typing import Any

from torch import Tensor

from bertnb.classification import BertClassifier, check_finite
from bertnb.examples import TokenExample, to_iob2
from bertnb.masked_lm import IGNORE, mean_cross_entropy
from bertnb.tasks import Row, Task
from bertnb.tokenization import WordPieceTokenizer, is_chinese

__all__ = [
    "spans",
    "entity_scores",
    "BertForTokenClassification",
    "piece_ids",
    "fitting_ranges",
    "inner_tag",
    "TokenClassification",
]


# %% Most words right, and no name found
def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return a sentence's entities: type, first word, and the word after the last.

    An I that does not go on with an entity of its type opens one, as in
    `conlleval` and `seqeval`.

    Raises:
        ValueError: a tag is no "O", "B-TYPE" or "I-TYPE".
    """
    found: list[tuple[str, int, int]] = []
    for i, tag in enumerate(to_iob2(tags)):
        if tag[0] == "B":
            found.append((tag[2:], i, i + 1))
        elif tag[0] == "I":
            kind, start, _ = found[-1]
            found[-1] = (kind, start, i + 1)
    return found


def entity_scores(
    gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return precision, recall and F1 of entities, (19.1), from 0 to 1.

    An entity is right if its type and both its ends are. All entities count
    alike; "f1.person" is the F1 of those of type "person", and so for each
    type of either side. A share of nothing is 0.

    Args:
        gold: the true tags of each sentence, as `spans` reads them.
        found: the predicted tags, one for each of `gold`.

    Raises:
        ValueError: the numbers of sentences or of tags differ, or a tag is
            none.
    """
    if len(gold) != len(found):
        raise ValueError(f"found has {len(found)} sentences, gold {len(gold)}")
    real, guessed, right = Counter[str](), Counter[str](), Counter[str]()
    for i, (tags, guesses) in enumerate(zip(gold, found, strict=True)):
        if len(tags) != len(guesses):
            raise ValueError(
                f"found[{i}] has {len(guesses)} tags, gold[{i}] has {len(tags)}"
            )
        true, claimed = set(spans(tags)), set(spans(guesses))
        real.update(kind for kind, _, _ in true)
        guessed.update(kind for kind, _, _ in claimed)
        right.update(kind for kind, _, _ in true & claimed)
    n, p, r = real.total(), guessed.total(), right.total()
    return {
        "precision": r / max(1, p),
        "recall": r / max(1, n),
        "f1": 2 * r / max(1, p + n),
    } | {
        f"f1.{kind}": 2 * right[kind] / (guessed[kind] + real[kind])
        for kind in sorted(real | guessed)
    }


# %% The head and its loss
class BertForTokenClassification(BertClassifier):
    """BERT with a linear classifier on each token's vector, (19.2).

    `labels` of the call are int64 (B, L), -100 for tokens without a class.
    """

    pooled = False

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the tokens that have a class, (19.3)."""
        return mean_cross_entropy(logits, labels, "labels", self.class_weights)


# %% Words have tags, pieces have vectors
def piece_ids(
    examples: Sequence[TokenExample], tokenizer: WordPieceTokenizer
) -> dict[str, list[int]]:
    """Return the ids of each word of the examples; a word is cut alone."""
    words = list(dict.fromkeys(w for e in examples for w in e.words))
    return dict(zip(words, tokenizer.ids(words), strict=True))


def fitting_ranges(counts: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Return ranges of words whose pieces fit into `room`, each as long as can
    be; `counts` are the pieces of each word, none above `room`."""
    borders, used = [0], 0
    for word, count in enumerate(counts):
        if used + count > room:
            borders.append(word)
            used = 0
        used += count
    return list(pairwise([*borders, len(counts)]))


_Token = tuple[int, int, int | None]  # id, class, and the word that it begins


def inner_tag(tag: str) -> str:
    """Return the tag of a word's later pieces: I for a B, else the same."""
    return "I" + tag[1:] if tag[0] == "B" else tag


@dataclass(frozen=True)
class TokenClassification(Task):
    """Tag words; a word is labelled and read at its first piece, (19.4).

    A sentence that is too long for a row is cut into several, between two
    words; a word that alone is too long keeps its first pieces. A word
    without a piece (an empty one, a control character) is not seen by the
    model: it is "O".

    An answer is {"tags": one for each word, "entities": [{"type", "start",
    "end", "text", "score"}]}: words from `start` to before `end`, and their
    mean probability, (19.5).

    Args:
        training, validation: sentences; their tags must be in `labels`.
        labels: the tags that the model knows; None: those of `training`, and
            an I for each B. For a trained model: `model.label_names`.
        label_all_pieces: in training, ask also at the later pieces of a word,
            for I where the word is B.

    Raises:
        ValueError: a label is no "O", "B-TYPE" or "I-TYPE", is named twice,
            or a B has no I where `label_all_pieces` needs it.
    """

    training: Sequence[TokenExample] = ()
    validation: Sequence[TokenExample] = ()
    labels: Sequence[str] | None = None
    label_all_pieces: bool = False

    metric: str = field(default="f1", init=False)
    model_class = BertForTokenClassification

    def __post_init__(self) -> None:
        names = self.labels
        if names is None:
            seen = {tag for e in self.training for tag in e.tags or ()}
            seen |= {inner_tag(tag) for tag in seen}
            names = ["O", *sorted(seen - {"O"})]
        object.__setattr__(self, "labels", tuple(names))
        if double := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(f"labels names {double[0]!r} twice")
        for name in names:
            to_iob2([name])  # says what a tag is
        needed = {inner_tag(name) for name in names}
        if self.label_all_pieces and (absent := sorted(needed - set(names))):
            raise ValueError(
                f"labels lacks {absent[0]!r}, the tag of later pieces: add it, "
                "or leave label_all_pieces out"
            )

    def head_arguments(self) -> dict[str, Any]:
        """Return the names of the classes."""
        return {"labels": list(self.labels or ())}

    def prepare(self, model: BertForTokenClassification) -> None:
        """Refuse a model with other classes.

        Raises:
            ValueError: its `label_names` are not `labels`, in this order.
        """
        if list(model.label_names) != list(self.labels or ()):
            raise ValueError(
                f"the model's label_names are {model.label_names}, the task's "
                f"labels {list(self.labels or ())}: load the model with "
                "load_for_task, or make the task with "
                "labels=model.label_names"
            )

    def rows(
        self,
        examples: Sequence[TokenExample],
        tokenizer: WordPieceTokenizer,
        max_length: int,
    ) -> list[Row]:
        """Return one row for each sentence, or several for a long one.

        Raises:
            ValueError: `max_length` is below 3, or a tag is not in `labels`.
        """
        room = max_length - 2  # for [CLS] and [SEP]
        if room < 1:
            raise ValueError(f"max_length={max_length}: expected 3 or more")
        pieces, rows = piece_ids(examples, tokenizer), []
        begin: _Token = (tokenizer.cls_token_id, IGNORE, None)
        end: _Token = (tokenizer.sep_token_id, IGNORE, None)
        for number, example in enumerate(examples):
            words = self._tokens(number, example, pieces, room)
            for i, j in fitting_ranges([len(word) for word in words], room):
                row = [begin, *chain.from_iterable(words[i:j]), end]
                ids, classes, origins = zip(*row, strict=True)
                targets = {"labels": list(classes)}
                rows.append(
                    Row(
                        number,
                        list(ids),
                        [0] * len(ids),
                        {} if example.tags is None else targets,
                        origins,
                    )
                )
        return rows

    def _tokens(
        self,
        number: int,
        example: TokenExample,
        pieces: dict[str, list[int]],
        room: int,
    ) -> list[list[_Token]]:
        """Return the tokens of each word, at most `room`, classes by (19.4)."""
        classes = {name: i for i, name in enumerate(self.labels or ())}
        found = []
        tags = example.tags or [None] * len(example.words)
        for word, (text, tag) in enumerate(
            zip(example.words, tags, strict=True)
        ):
            first = later = IGNORE
            if tag is not None:
                if tag not in classes:
                    raise ValueError(
                        f"example {number}, word {word} ({text!r}): tag {tag!r} "
                        f"is none of the labels, {', '.join(classes)}"
                    )
                first = classes[tag]
                if self.label_all_pieces:
                    later = classes[inner_tag(tag)]
            found.append(
                [
                    (i, later if k else first, None if k else word)
                    for k, i in enumerate(pieces[text][:room])
                ]
            )
        return found

    def decode(
        self,
        examples: Sequence[TokenExample],
        rows: Sequence[Row],
        logits: Sequence[Tensor],
    ) -> list[dict[str, Any]]:
        """Return tags and entities of each sentence, see the class.

        Raises:
            ValueError: a score is not finite.
        """
        names = list(self.labels or ())
        tags = [["O"] * len(example.words) for example in examples]
        sure = [[1.0] * len(example.words) for example in examples]
        for row, scores in zip(rows, logits, strict=True):
            check_finite(row, scores)
            p, best = scores.softmax(-1).max(-1)  # (L,): of the best class
            for word, k, chance in zip(
                row.origins, best.tolist(), p.tolist(), strict=True
            ):
                if word is not None:
                    tags[row.example][word] = names[k]
                    sure[row.example][word] = chance
        return [
            {"tags": t, "entities": _entities(example.words, t, p)}
            for example, t, p in zip(examples, tags, sure, strict=True)
        ]

    def score(
        self,
        examples: Sequence[TokenExample],
        answers: Sequence[dict[str, Any]],
    ) -> dict[str, float]:
        """Return `entity_scores`.

        Raises:
            ValueError: an example has no tags.
        """
        gold = []
        for number, example in enumerate(examples):
            if example.tags is None:
                raise ValueError(
                    f"example {number} has no tags to compare with"
                )
            gold.append(example.tags)
        return entity_scores(gold, [answer["tags"] for answer in answers])


def _entities(
    words: Sequence[str], tags: Sequence[str], probabilities: Sequence[float]
) -> list[dict[str, Any]]:
    characters = all(len(word) < 2 for word in words)

    def joined(part: Sequence[str]) -> str:
        chinese = all(is_chinese(c) for word in part for c in word)
        return ("" if characters or chinese else " ").join(part)

    return [
        {
            "type": kind,
            "start": start,
            "end": end,
            "text": joined(words[start:end]),
            "score": fmean(probabilities[start:end]),  # (19.5)
        }
        for kind, start, end in spans(tags)
    ]
