"""Fine-tuning a classifier.

Written by tools/extract.py from notebooks/17_classification.md: edit that notebook, not this file.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import mean_cross_entropy

__all__ = [
    "classification_loss",
    "class_weights",
    "ClassifierOutput",
    "BertClassifier",
    "BertForSequenceClassification",
]


# %% The code
def classification_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the mean of -log P(label), (17.2); with one column, squared error.

    Args:
        logits: (B, C) floats.
        labels: int64 (B,), 0 to C - 1, or -100 for rows that do not count;
            floats (B,) or (B, 1) if C is 1.
        weights: floats (C,), what the terms of each class are multiplied by,
            (17.3), without a change of what they are divided by.

    Raises:
        TypeError: labels of classes are not int64.
        ValueError: a shape is wrong, or a label lies outside the classes.
    """
    if logits.shape[-1] > 1:
        return mean_cross_entropy(logits, labels, "labels", weights)
    if labels.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected "
            f"{tuple(logits.shape[:1])}, one number a row"
        )
    return F.mse_loss(logits.flatten().float(), labels.flatten().float())


def class_weights(
    labels: Sequence[int],
    names: Sequence[str],
    weights: str | Mapping[str, float] = "balanced",
) -> Tensor:
    """Return the weights of the classes, float32 (C,), of mean 1 over the
    labels, (17.4).

    Args:
        labels: the numbers of the training examples' classes, 0 to C - 1.
        names: of the C classes.
        weights: "balanced", (17.5), or each name's weight before scaling.

    Raises:
        ValueError: there is no label; names are missing or unknown; a weight
            is negative or not finite, or all that count are 0; or a class to
            be balanced has no example.
    """
    counts = torch.tensor(labels, dtype=torch.int64).bincount(
        minlength=len(names)
    )
    if weights == "balanced":
        if 0 in counts:
            raise ValueError(
                f"class_weights='balanced', but {names[int(counts.argmin())]!r}"
                " has no training example: leave it out of the labels"
            )
        wanted = 1 / counts.double()  # (17.5)
    elif isinstance(weights, str) or set(weights) != set(names):
        raise ValueError(
            f"class_weights={weights!r}; expected 'balanced' or one weight "
            f"for each of {', '.join(names)}"
        )
    else:
        wanted = torch.tensor([float(weights[name]) for name in names]).double()
    total = (counts * wanted).sum()
    if not (wanted.isfinite().all() and wanted.min() >= 0 and total > 0):
        raise ValueError(
            f"class_weights={weights!r}; expected finite weights >= 0, and "
            "one above 0 for a class with training examples"
        )
    return (counts.sum() * wanted / total).float()


@dataclass
class ClassifierOutput:
    """What a classifier returns: of a row (B, C), or of each token (B, L, C)."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None  # the loss under "labels"


class BertClassifier(PretrainedModel, ABC):
    """An encoder, dropout and a linear head that scores named classes.

    A subclass says what the head reads, `pooled`, and its `loss`.

    Args:
        config: the encoder's configuration.
        num_labels: C; None: 2.
        labels: the names of the classes, instead of their number.

    Raises:
        ValueError: `num_labels` and `labels` say different numbers.
    """

    pooled: bool  # the head reads the pooled [CLS]; False: every token
    class_weights: Tensor | None  # floats (C,), for the loss; never saved

    def __init__(
        self,
        config: BertConfig,
        num_labels: int | None = None,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        if labels and num_labels not in (None, len(labels)):
            raise ValueError(
                f"num_labels={num_labels}, but labels names {len(labels)}: give one of the two"
            )
        self.config = config
        self.label_names = labels or [
            f"LABEL_{i}" for i in range(num_labels or 2)
        ]
        self.num_labels = len(self.label_names)
        self.bert = BertModel(config, add_pooling_layer=self.pooled)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.register_buffer("class_weights", None, persistent=False)
        initialize(self.classifier, config.initializer_range)

    @classmethod
    def saved_head_arguments(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return what a `config.json` says of the classes.

        Raises:
            ValueError: its `problem_type` asks for another loss than ours.
        """
        names = saved.get("id2label")
        arguments: dict[str, Any] = {"num_labels": saved.get("num_labels")}
        if names:
            arguments = {"labels": [names[i] for i in sorted(names, key=int)]}
        count = len(names or ()) or arguments["num_labels"] or 2
        ours = "regression" if count == 1 else "single_label_classification"
        kind = saved.get("problem_type")
        if kind not in (None, ours):
            raise ValueError(
                f"problem_type={kind!r} with num_labels={count}: "
                f"only {ours!r} is supported, one class or number a row"
            )
        return arguments

    def extra_config(self) -> dict[str, Any]:
        """Return the label names as Hugging Face writes them."""
        return {
            "id2label": {
                str(i): name for i, name in enumerate(self.label_names)
            },
            "label2id": {name: i for i, name in enumerate(self.label_names)},
        }

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return how wrong the scores (..., C) are."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ClassifierOutput:
        """Score the classes; with `labels`, also the loss.

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
        vectors = (
            encoded.pooler_output if self.pooled else encoded.last_hidden_state
        )
        logits = self.classifier(self.dropout(vectors))
        loss = None if labels is None else self.loss(logits, labels)
        return ClassifierOutput(
            loss,
            logits,
            encoded.hidden_states,
            encoded.attentions,
            None if loss is None else {"labels": loss},
        )


class BertForSequenceClassification(BertClassifier):
    """BERT with a linear classifier on the pooled [CLS], (17.1).

    With `num_labels=1` it is a regression. `labels` of the call are int64
    (B,), with one label floats (B,).
    """

    pooled = True

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `classification_loss`, (17.2), with the `class_weights`."""
        return classification_loss(logits, labels, self.class_weights)
