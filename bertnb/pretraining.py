"""Pretraining.

Written by tools/extract.py from notebooks/12_pretraining.md: edit that notebook, not this file.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import IGNORE, MaskedLMHead, masked_lm_loss
from bertnb.next_sentence import next_sentence_loss
from bertnb.rows import PretrainingData

__all__ = [
    "PreTrainingOutput",
    "BertForPreTraining",
    "book_model",
    "PretrainingScores",
    "evaluate_pretraining",
]


# %% The model with both heads
@dataclass
class PreTrainingOutput:
    """What `BertForPreTraining` returns."""

    loss: Tensor | None
    prediction_logits: Tensor  # (B, L, V), or (B, P, V) with masked_positions
    seq_relationship_logits: Tensor  # (B, 2), or (B, D, 2) with cls_positions
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None  # by the name of their labels


class BertForPreTraining(PretrainedModel):
    """BERT with both heads; the loss is their sum, (12.1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.masked_lm = MaskedLMHead(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        initialize(self.next_sentence, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        masked_positions: Tensor | None = None,
        cls_positions: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> PreTrainingOutput:
        """Score the hidden words and the order of the segments.

        Args:
            labels: int64 (B, L), the hidden words, -100 elsewhere.
            next_sentence_label: int64 (B,), 0 = segment B follows segment A.
            masked_positions: int64 (B, P): decode these positions only; then
                `labels` are (B, P).
            cls_positions: int64 (B, D), where the [CLS] of the D pairs of a
                row stand; then `next_sentence_label` is (B, D), -100 where
                a row has fewer.

        The loss is the sum over the labels that are given, None without any.
        Other arguments as in `BertModel`.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            output_hidden_states,
            output_attentions,
            masked_positions,
            cls_positions,
        )
        table = self.bert.embeddings.word_embeddings.weight
        words = self.masked_lm(encoded.last_hidden_state, table)
        order = self.next_sentence(encoded.pooler_output)
        losses = {}
        if labels is not None:
            losses["labels"] = masked_lm_loss(words, labels)
        if next_sentence_label is not None:
            name = "next_sentence_label"
            losses[name] = next_sentence_loss(order, next_sentence_label)
        return PreTrainingOutput(
            torch.stack([*losses.values()]).sum() if losses else None,  # (12.1)
            words,
            order,
            encoded.hidden_states,
            encoded.attentions,
            losses or None,
        )


# %% What a run must beat
def book_model() -> Path:
    """Return the folder of the small BERT that comes with the package.

    Pretrained on the State of the Union addresses as the chapter tells;
    Hugging Face's layout, with tokenizer, model card and records.
    """
    return Path(str(resources.files("bertnb") / "sotu"))


# %% Scoring a model
@dataclass(frozen=True)
class PretrainingScores:
    """Held-out results: nats and shares, and how many they are the mean of."""

    masked_lm_loss: float
    masked_lm_accuracy: float
    masked_tokens: int
    next_sentence_accuracy: float
    pairs: int


@torch.no_grad()
def evaluate_pretraining(
    model: BertForPreTraining,
    data: PretrainingData,
    max_batches: int | None = None,
) -> PretrainingScores:
    """Score a model on one epoch of data, or on its first `max_batches`.

    The words are hidden as on the CPU, on every device: scores of the same
    data can be compared. The model is left in the mode that it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = data.batches_per_epoch
    counts = []
    for step in range(min(max_batches or batches, batches)):
        batch = {k: t.to(device) for k, t in data.batch(step).items()}
        labels, order = batch.pop("labels"), batch.pop("next_sentence_label")
        output = model(**batch)
        words, pairs = labels != IGNORE, order != IGNORE
        guesses = output.prediction_logits.argmax(-1)
        orders = output.seq_relationship_logits.argmax(-1)
        row = [
            masked_lm_loss(output.prediction_logits, labels) * words.sum(),
            ((guesses == labels) & words).sum(),
            words.sum(),
            ((orders == order) & pairs).sum(),
            pairs.sum(),
        ]
        counts.append(torch.stack([count.float() for count in row]))
    model.train(was_training)
    sums = torch.stack(counts).cpu().double().sum(0).tolist()
    loss, right_words, n_words, right_pairs, n_pairs = sums
    return PretrainingScores(
        loss / n_words,
        right_words / n_words,
        int(n_words),
        right_pairs / n_pairs,
        int(n_pairs),
    )
