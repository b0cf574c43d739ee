"""Fine-tuning a classifier.

Written by tools/extract.py from notebooks/17_classification.md: edit that notebook, not this file.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import check_targets

__all__ = [
    "classification_loss",
    "SequenceClassifierOutput",
    "BertForSequenceClassification",
]


# %% The code
def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log P(label), (17.2); with one column, squared error.

    Args:
        logits: (B, C) floats.
        labels: int64 (B,), 0 to C - 1; floats (B,) if C is 1.

    Raises:
        ValueError: a label lies outside the classes.
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1).float(), labels.float())
    check_targets(labels, "labels", logits.shape[-1])
    return F.cross_entropy(logits.float(), labels)


@dataclass
class SequenceClassifierOutput:
    """What `BertForSequenceClassification` returns."""

    loss: Tensor | None
    logits: Tensor  # (B, num_labels)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BertForSequenceClassification(PretrainedModel):
    """BERT with a linear classifier on the pooled [CLS], (17.1).

    Args:
        config: the encoder's configuration.
        num_labels: C; None: 2. With 1 it is a regression.
        labels: the names of the classes, instead of their number.

    Raises:
        ValueError: `num_labels` and `labels` say different numbers.
    """

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
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        initialize(self.classifier, config.initializer_range)

    @classmethod
    def saved_head_arguments(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return what a `config.json` says of the classes.

        Raises:
            ValueError: it asks for several labels a row at once.
        """
        if saved.get("problem_type") == "multi_label_classification":
            raise ValueError(
                "problem_type='multi_label_classification': only one class a "
                "row, or regression, is supported"
            )
        names = saved.get("id2label")
        if names:
            return {"labels": [names[key] for key in sorted(names, key=int)]}
        return {"num_labels": saved.get("num_labels")}

    def extra_config(self) -> dict[str, Any]:
        """Return the label names as Hugging Face writes them."""
        return {
            "id2label": {
                str(i): name for i, name in enumerate(self.label_names)
            },
            "label2id": {name: i for i, name in enumerate(self.label_names)},
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> SequenceClassifierOutput:
        """Score the classes, (17.1).

        `labels` are int64 (B,), and the loss is (17.2); with one label they
        are floats (B,), and it is the mean squared error. Other arguments as
        in `BertModel`.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            output_hidden_states,
            output_attentions,
        )
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else classification_loss(logits, labels)
        return SequenceClassifierOutput(
            loss, logits, encoded.hidden_states, encoded.attentions
        )
