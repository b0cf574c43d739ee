"""The span that answers.

Written by tools/extract.py from notebooks/20_answer_spans.md: edit that notebook, not this file.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from string import punctuation

import torch
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import IGNORE, mean_cross_entropy
from bertnb.tokenization import is_chinese, is_punctuation

__all__ = [
    "span_losses",
    "QuestionAnsweringOutput",
    "BertForQuestionAnswering",
    "ARTICLES",
    "normalize_answer",
    "exact_match",
    "token_f1",
]


# %% The code
def span_losses(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
) -> dict[str, Tensor]:
    """Return the two terms of the loss (20.3), halved, by their positions' names.

    Args:
        start_logits, end_logits: (B, L) floats.
        start_positions, end_positions: int64 (B,), from 0. A position at or
            beyond L was cut off with the end of its row, and does not count;
            nor does -100.

    Raises:
        TypeError: the positions are not int64.
        ValueError: a shape is wrong, or a position is negative.
    """
    length = start_logits.shape[-1]
    terms = {
        "start_positions": (start_logits, start_positions),
        "end_positions": (end_logits, end_positions),
    }
    return {
        name: mean_cross_entropy(
            logits, positions.masked_fill(positions >= length, IGNORE), name
        )
        / 2
        for name, (logits, positions) in terms.items()
    }


@dataclass
class QuestionAnsweringOutput:
    """What `BertForQuestionAnswering` returns."""

    loss: Tensor | None
    start_logits: Tensor  # (B, L)
    end_logits: Tensor  # (B, L)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None  # by the name of their positions


class BertForQuestionAnswering(PretrainedModel):
    """BERT that scores each token as the start and end of the answer, (20.1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        initialize(self.qa_outputs, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> QuestionAnsweringOutput:
        """Score the tokens; with both positions, also the loss (20.3).

        Other arguments as in `BertModel`.

        Raises:
            ValueError: one of the two positions is given without the other.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            output_hidden_states,
            output_attentions,
        )
        scores = self.qa_outputs(encoded.last_hidden_state)  # (B, L, 2)
        start_logits, end_logits = scores.unbind(-1)
        loss = losses = None
        if start_positions is not None and end_positions is not None:
            losses = span_losses(
                start_logits, end_logits, start_positions, end_positions
            )
            loss = torch.stack([*losses.values()]).sum()
        elif start_positions is not None or end_positions is not None:
            lacking = "end" if end_positions is None else "start"
            raise ValueError(
                f"{lacking}_positions is missing: the loss needs both ends"
            )
        return QuestionAnsweringOutput(
            loss,
            start_logits,
            end_logits,
            encoded.hidden_states,
            encoded.attentions,
            losses,
        )


# %% When is an answer right?
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str, chinese: bool = False) -> str:
    """Return what SQuAD compares of an answer, n in (20.5).

    Lower case, without the punctuation of ASCII, without English articles,
    and with single spaces between words.

    Args:
        chinese: instead, without the punctuation of all of Unicode, with
            articles, and each Chinese character as a word of its own.
    """
    text = text.lower()
    if chinese:
        kept = (c for c in text if not is_punctuation(c))
        text = "".join(f" {c} " if is_chinese(c) else c for c in kept)
    else:
        text = "".join(c for c in text if c not in punctuation)
        text = ARTICLES.sub(" ", text)
    return " ".join(text.split())


def exact_match(
    prediction: str, answers: Sequence[str], chinese: bool = False
) -> float:
    """Return 1 if a prediction is one of the answers, (20.5), else 0.

    Args:
        prediction: "" says that there is no answer.
        answers: those that are right; none: there is no answer.
        chinese: see `normalize_answer`.

    Raises:
        TypeError: `answers` is one text.
    """
    found = normalize_answer(prediction, chinese)
    return float(found in _comparable(answers, chinese))


def token_f1(
    prediction: str, answers: Sequence[str], chinese: bool = False
) -> float:
    """Return how much of an answer a prediction has, 0 to 1, (20.6).

    Arguments and errors as in `exact_match`.
    """
    found = Counter(normalize_answer(prediction, chinese).split())
    golds = [Counter(g.split()) for g in _comparable(answers, chinese)]
    return max(_overlap(found, gold) for gold in golds)


def _comparable(answers: Sequence[str], chinese: bool) -> list[str]:
    """Return the normalised answers; those that become empty, only alone."""
    if isinstance(answers, str):
        raise TypeError(
            f"answers={answers!r} is one text: expected several, as in [{answers!r}]"
        )
    found = [normalize_answer(answer, chinese) for answer in answers]
    return [answer for answer in found if answer] or [""]


def _overlap(first: Counter[str], second: Counter[str]) -> float:
    if not first or not second:
        return float(first == second)
    return 2 * (first & second).total() / (first.total() + second.total())
