"""Extractive question answering.

Written by tools/extract.py from notebooks/20_question_answering.md: edit that notebook, not this file.
"""

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bertnb.answer_spans import (
    BertForQuestionAnswering,
    exact_match,
    token_f1,
)
from bertnb.examples import QuestionExample
from bertnb.folders import PretrainedModel
from bertnb.tasks import Row, Task, predict
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "context_windows",
    "best_windows",
    "pieces_with_offsets",
    "span_candidates",
    "QuestionAnswering",
    "answer",
]


# %% The code: windows
def context_windows(tokens: int, room: int, stride: int) -> list[range]:
    """Return the places of a passage that each of its windows shows, (20.7).

    Args:
        tokens: N, of the passage; without any there is one empty window.
        room: n, how many a window can show.
        stride: how far apart two windows begin; `room`, if that is less.

    Raises:
        ValueError: `room` or `stride` is below 1.
    """
    if room < 1 or stride < 1:
        raise ValueError(f"room={room}, stride={stride}: expected 1 or more")
    step = min(stride, room)
    count = 1 + max(0, -(-(tokens - room) // step))
    starts = range(0, step * count, step)
    return [range(a, min(a + room, tokens)) for a in starts]


def best_windows(windows: Sequence[range]) -> list[int]:
    """Return for each token of the passage the window that shows most of what
    stands around it, (20.8); of equal ones the first."""
    best = [(-1.0, 0)] * windows[-1].stop
    for number, window in enumerate(windows):
        for place in window:
            nearer_end = min(place - window.start, window.stop - 1 - place)
            context = nearer_end + 0.01 * len(window)
            if context > best[place][0]:
                best[place] = (context, number)
    return [number for _, number in best]


def pieces_with_offsets(
    tokenizer: WordPieceTokenizer, texts: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return the ids of each text, and where each token begins and ends in it,
    in characters; no [CLS], no [SEP]."""
    rows = tokenizer(
        texts, padding=False, return_tensors=None, return_offsets=True
    )
    return [
        (ids[1:-1], offsets[1:-1])
        for ids, offsets in zip(
            rows["input_ids"], rows["offset_mapping"], strict=True
        )
    ]


# %% The code: the best spans
def span_candidates(
    scores: Tensor,
    origins: Sequence[tuple[int, int, bool] | None],
    max_answer_length: int = 30,
    n_best: int = 20,
) -> list[tuple[float, int, int]]:
    """Return the best spans of a row, (20.9), the best first: score, and the
    characters of the passage where the span begins and ends.

    Args:
        scores: (L, 2) floats, as first and as last token.
        origins: for each token of the row, None outside the passage; else its
            first character, the one behind its last, and whether this window
            is its best.
        max_answer_length: m, in tokens.
    """
    inside = torch.tensor([o is not None for o in origins])
    ours = torch.tensor([o is not None and o[2] for o in origins])
    first, last = scores.unbind(-1)
    first = first.masked_fill(~ours, -torch.inf)
    last = last.masked_fill(~inside, -torch.inf)
    width = min(max_answer_length, len(origins))
    last = F.pad(last, (0, width - 1), value=-torch.inf)
    sums = first[:, None] + last.unfold(0, width, 1)  # (L, m): i, j - i
    best = sums.flatten().topk(min(n_best, sums.numel()))
    found = []
    for score, place in zip(
        best.values.tolist(), best.indices.tolist(), strict=True
    ):
        i, more = divmod(place, width)
        begin, end = origins[i], origins[min(i + more, len(origins) - 1)]
        if begin is not None and end is not None and score > -math.inf:
            found.append((score, begin[0], end[1]))
    return found


# %% The code: the task
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Find the span of a passage that answers a question, or that none does.

    An answer is a dict: `answer`, the text, "" for none; `start` and `end`,
    its characters in the passage, from 0; `score`, its probability among the
    best, (20.11); and `null_margin`, how much better "no answer" scores than
    the best span, (20.10), inf where the passage has no token.

    Args:
        training, validation: examples. In training the first of the answers
            counts; `answers=()` is learnt as "not in the passage".
        stride: how many tokens lie between the beginnings of two windows;
            None: 128, or half of what a window can show, if that is less.
        max_query_length: longer questions lose their ends, with a warning.
        max_answer_length: of an answer, in tokens.
        n_best: how many spans share the probability.
        null_threshold: answer "" where `null_margin` is above; None: always
            give a span, as SQuAD 1.1 wants it.
        chinese: score with `normalize_answer(..., chinese=True)`; else by the
            official definition.
        metric: "f1" or "exact_match", the score that chooses the best model.

    Raises:
        ValueError: a number is below 1, or `metric` is neither.
    """

    training: Sequence[QuestionExample] = ()
    validation: Sequence[QuestionExample] = ()
    stride: int | None = None
    max_query_length: int = 64
    max_answer_length: int = 30
    n_best: int = 20
    null_threshold: float | None = None
    chinese: bool = False
    metric: str = "f1"

    model_class: ClassVar[type[PretrainedModel]] = BertForQuestionAnswering

    def __post_init__(self) -> None:
        names = "stride max_query_length max_answer_length n_best"
        for name in names.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        if self.metric not in ("f1", "exact_match"):
            raise ValueError(
                f"metric={self.metric!r}: expected 'f1' or 'exact_match'"
            )

    def rows(
        self,
        examples: Sequence[QuestionExample],
        tokenizer: WordPieceTokenizer,
        max_length: int,
    ) -> list[Row]:
        """Return a row for each window of each example's passage, (20.7).

        A window without the whole answer has its targets at [CLS]. A warning
        says how many answers are whole in no window.

        Raises:
            ValueError: a question has no token, or with `max_length` leaves
                no room for a passage; or an answer has no token.
        """
        if not examples:
            return []
        questions = self._questions(examples, tokenizer, max_length)
        contexts = list(dict.fromkeys(e.context for e in examples))
        found = pieces_with_offsets(tokenizer, contexts)
        pieces = dict(zip(contexts, found, strict=True))
        marks = {  # shared by all questions about a passage: is it the best?
            context: [[(*o, False), (*o, True)] for o in offsets]
            for context, (_, offsets) in pieces.items()
        }
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        rows = []
        for number, example in enumerate(examples):
            ids, offsets = pieces[example.context]
            truth = _truth(number, example, offsets)
            head = [cls, *questions[number], sep]
            room = max_length - len(head) - 1
            stride = self.stride or max(1, min(128, room // 2))
            windows = context_windows(len(ids), room, stride)
            best, mark = best_windows(windows), marks[example.context]
            for w, window in enumerate(windows):
                row = [*head, *ids[window.start : window.stop], sep]
                kinds = [0] * len(head) + [1] * (len(window) + 1)
                shown = [mark[t][best[t] == w] for t in window]
                origins = (*[None] * len(head), *shown, None)
                targets = _targets(truth, window, len(head))
                rows.append(Row(number, row, kinds, targets, origins))
        _warn_of_lost(examples, rows)
        return rows

    def _questions(
        self,
        examples: Sequence[QuestionExample],
        tokenizer: WordPieceTokenizer,
        max_length: int,
    ) -> list[list[int]]:
        """Return the ids of the questions, cut to `max_query_length`."""
        found = tokenizer.ids([example.question for example in examples])
        limit = self.max_query_length
        for number, ids in enumerate(found):
            if not ids:
                raise ValueError(
                    f"example {number}: the question "
                    f"{examples[number].question!r} has no token: ask something"
                )
            if max_length < (least := min(len(ids), limit) + 4):
                raise ValueError(
                    f"max_length={max_length}: example {number} has a question of "
                    f"{len(ids)} tokens, and a row must also hold a token of its "
                    f"passage: expected {least} or more, or a smaller "
                    "max_query_length"
                )
        if long := sum(len(ids) > limit for ids in found):
            warnings.warn(
                f"{long} of {len(found)} questions have more than "
                f"max_query_length={limit} tokens: their ends are not read",
                stacklevel=2,
            )
        return [ids[:limit] for ids in found]

    def logits(self, output: Any) -> Tensor:
        """Return the scores as first and as last token, (B, L, 2)."""
        return torch.stack([output.start_logits, output.end_logits], dim=-1)

    def decode(
        self,
        examples: Sequence[QuestionExample],
        rows: Sequence[Row],
        logits: Sequence[Tensor],
    ) -> list[dict[str, Any]]:
        """Return the best answer of each example over its windows.

        Raises:
            FloatingPointError: a score is not finite.
        """
        spans: list[list[tuple[float, int, int]]] = [[] for _ in examples]
        nulls = [math.inf] * len(examples)
        for row, scores in zip(rows, logits, strict=True):
            if not scores.isfinite().all():
                raise FloatingPointError(
                    f"the scores of example {row.example} are not finite: the "
                    "model's weights are broken, or its precision is too low"
                )
            spans[row.example] += span_candidates(
                scores, row.origins, self.max_answer_length, self.n_best
            )
            null = float(scores[0].sum())  # [CLS] as first and last, (20.10)
            nulls[row.example] = min(null, nulls[row.example])
        return [
            self._choose(example.context, found, null)
            for example, found, null in zip(examples, spans, nulls, strict=True)
        ]

    def _choose(
        self, context: str, spans: list[tuple[float, int, int]], null: float
    ) -> dict[str, Any]:
        """Return the answer by (20.10), with its probability by (20.11)."""
        best = sorted(spans, key=lambda span: (-span[0], *span[1:]))
        best = best[: self.n_best]
        margin = null - best[0][0] if best else math.inf
        threshold = math.inf if best else -math.inf
        if best and self.null_threshold is not None:
            threshold = self.null_threshold
        if self.null_threshold is not None or not best:
            best.append((null, 0, 0))
        scores = torch.tensor([s for s, _, _ in best], dtype=torch.float64)
        chosen = len(best) - 1 if margin > threshold else 0
        _, start, end = best[chosen]
        return {
            "answer": context[start:end],
            "score": float(scores.softmax(0)[chosen]),
            "start": start,
            "end": end,
            "null_margin": margin,
        }

    def score(
        self,
        examples: Sequence[QuestionExample],
        answers: Sequence[dict[str, Any]],
    ) -> dict[str, float]:
        """Return `exact_match` and `f1`, (20.5) and (20.6), means in percent.

        Raises:
            ValueError: of an example it is not known what is right.
        """
        exact, f1 = [], []
        for number, (example, found) in enumerate(
            zip(examples, answers, strict=True)
        ):
            if example.answers is None:
                raise ValueError(
                    f"example {number} ({example.question!r}) has answers=None: "
                    "to be scored it needs them, or () if there are none"
                )
            right = [answer.text for answer in example.answers]
            exact.append(exact_match(found["answer"], right, self.chinese))
            f1.append(token_f1(found["answer"], right, self.chinese))
        return {
            "exact_match": 100 * statistics.fmean(exact),
            "f1": 100 * statistics.fmean(f1),
        }


def _truth(
    number: int, example: QuestionExample, offsets: list[tuple[int, int]]
) -> tuple[int, int] | None:
    """Return the tokens of the passage where the first answer begins and ends;
    (-1, -1) for no answer, None for one that is not known."""
    if not example.answers:
        return None if example.answers is None else (-1, -1)
    answer = example.answers[0]
    start, end = answer.start, answer.start + len(answer.text)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
    if not inside:
        raise ValueError(
            f"example {number}: the answer {answer.text!r} has no token: take "
            "the answer out, or the example"
        )
    return inside[0], inside[-1]


def _warn_of_lost(
    examples: Sequence[QuestionExample], rows: Sequence[Row]
) -> None:
    answered = {n for n, example in enumerate(examples) if example.answers}
    whole = {r.example for r in rows if r.targets.get("start_positions")}
    if lost := answered - whole:
        warnings.warn(
            f"{len(lost)} of {len(answered)} answers are whole in no window, "
            f"the first is that of example {min(lost)}: they cannot be found, "
            "and are learnt as 'no answer'; a longer `max_length` helps, or, if "
            "they are shorter than a window, a smaller `stride`",
            stacklevel=3,
        )


def _targets(
    truth: tuple[int, int] | None, window: range, before: int
) -> dict[str, int]:
    """Return where in a row the answer is; [CLS] if not all of it is there."""
    if truth is None:
        return {}
    first, last = truth
    if first not in window or last not in window:
        return {"start_positions": 0, "end_positions": 0}
    shift = before - window.start
    return {"start_positions": first + shift, "end_positions": last + shift}


def answer(
    model: BertForQuestionAnswering,
    tokenizer: WordPieceTokenizer,
    question: str,
    context: str,
    max_length: int | None = None,
    stride: int | None = None,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
) -> dict[str, Any]:
    """Return the span of `context` that answers a question.

    Args:
        max_length: of a window with the question, in tokens; None: 384, or
            what the model reads if that is less.
        stride, max_answer_length, null_threshold: see `QuestionAnswering`.

    Returns:
        `answer`, a piece of the context, "" if there is none; `score`, its
        probability; `start` and `end`, its characters:
        `context[start:end] == answer`.

    Raises:
        TypeError: `model` has no head for this, or a text is no text.
        ValueError: the question has no token, or a number is out of range.
    """
    task = QuestionAnswering(
        stride=stride,
        max_answer_length=max_answer_length,
        null_threshold=null_threshold,
    )
    if max_length is None and isinstance(model, BertForQuestionAnswering):
        max_length = min(384, model.config.max_position_embeddings)
    example = QuestionExample(question, context)
    (found,) = predict(task, model, tokenizer, [example], max_length or 384, 8)
    return {name: found[name] for name in ("answer", "score", "start", "end")}
