"""Pairs of texts.

Written by tools/extract.py from notebooks/18_pairs.md: edit that notebook, not this file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bertnb.classification import (
    BertForSequenceClassification,
    check_finite,
    text_rows,
)
from bertnb.configuration import BertnbError
from bertnb.examples import TextExample
from bertnb.tasks import Row, Task
from bertnb.tokenization import WordPieceTokenizer

__all__ = ["correlations", "SequenceRegression"]


# %% How good are the numbers
def correlations(
    truth: Sequence[float], answers: Sequence[float]
) -> dict[str, float]:
    """Return the correlations "spearman" and "pearson", (18.5).

    Where one of the two lists is constant there is nothing to correlate:
    both are 0.

    Raises:
        BertnbError: scipy is not installed.
        ValueError: fewer than two numbers, not as many of each, or one that
            is not finite.
    """
    if len(truth) != len(answers) or len(truth) < 2:
        raise ValueError(
            f"{len(truth)} true numbers and {len(answers)} answers: a "
            "correlation needs as many of each, and two or more"
        )
    if not all(map(math.isfinite, (*truth, *answers))):
        raise ValueError("a true number or an answer is not finite")
    stats = _scipy_stats()
    if len(set(truth)) == 1 or len(set(answers)) == 1:
        return {"spearman": 0.0, "pearson": 0.0}
    return {
        "spearman": float(stats.spearmanr(truth, answers).statistic),
        "pearson": float(stats.pearsonr(truth, answers).statistic),
    }


def _scipy_stats() -> Any:
    try:
        import scipy.stats
    except ImportError as error:
        raise BertnbError(
            'correlations need scipy: pip install "bertnb[train]"'
        ) from error
    return scipy.stats


# %% The code
@dataclass(frozen=True)
class SequenceRegression(Task):
    """One number for each text or pair of texts, (18.2), learnt by (18.3).

    An answer is a float, on the scale of the training labels. Texts that are
    too long lose their end, with a warning.

    Args:
        training, validation: examples whose labels are finite numbers.
        metric: "spearman" or "pearson", (18.5).

    Raises:
        BertnbError: there is a validation, and scipy is not installed.
        ValueError: `metric` is unknown, or `validation` has one example.
    """

    training: Sequence[TextExample] = ()
    validation: Sequence[TextExample] = ()
    metric: str = "spearman"

    model_class = BertForSequenceClassification

    def __post_init__(self) -> None:
        if self.metric not in ("spearman", "pearson"):
            raise ValueError(
                f"metric={self.metric!r}: expected 'spearman' or 'pearson'"
            )
        if len(self.validation):
            _scipy_stats()  # else it is missed when an epoch is over
        if len(self.validation) == 1:
            raise ValueError(
                "validation has one example: a correlation needs two or more"
            )

    def head_arguments(self) -> dict[str, Any]:
        """Return that the head has one column."""
        return {"num_labels": 1}

    def _numbers(self, examples: Sequence[TextExample]) -> list[float | None]:
        """Return the label of each example, None where unknown."""
        for number, example in enumerate(examples):
            if isinstance(example.label, str):
                raise ValueError(
                    f"example {number} has the label {example.label!r}; "
                    "expected a number (read_texts(..., numbers=True); "
                    "SequenceClassification learns names)"
                )
        return [None if e.label is None else float(e.label) for e in examples]

    def rows(
        self,
        examples: Sequence[TextExample],
        tokenizer: WordPieceTokenizer,
        max_length: int,
    ) -> list[Row]:
        """Return a row for each example, see `text_rows`.

        Raises:
            ValueError: a label is no number, or only some examples have a
                `text_pair`.
        """
        numbers = self._numbers(examples)
        return text_rows(examples, numbers, tokenizer, max_length)

    def decode(
        self,
        examples: Sequence[TextExample],
        rows: Sequence[Row],
        logits: Sequence[Tensor],
    ) -> list[float]:
        """Return the number of each text or pair.

        Raises:
            ValueError: a number is not finite.
        """
        for row, score in zip(rows, logits, strict=True):
            check_finite(row, score)
        return [score.item() for score in logits]

    def score(
        self, examples: Sequence[TextExample], answers: Sequence[float]
    ) -> dict[str, float]:
        """Return both `correlations` of answers and labels.

        Raises:
            BertnbError: scipy is not installed.
            ValueError: an example has no label, or there are fewer than two.
        """
        truth = [n for n in self._numbers(examples) if n is not None]
        if len(truth) < len(examples):
            first = [e.label for e in examples].index(None)
            raise ValueError(
                f"example {first} has no label: nothing to compare its "
                "answer with"
            )
        return correlations(truth, answers)
