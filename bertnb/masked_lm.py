"""The masked language model.

Written by tools/extract.py from notebooks/08_masked_lm.md: edit that notebook, not this file.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import ACTIVATIONS, initialize
from bertnb.positions import check_ids

__all__ = [
    "IGNORE",
    "mask_tokens",
    "draw_positions",
    "MaskedLMHead",
    "gather_positions",
    "masked_lm_loss",
    "mean_cross_entropy",
    "check_targets",
    "MaskedLMOutput",
    "BertForMaskedLM",
]


# %% Hiding words
IGNORE = -100  # a target that does not count


def mask_tokens(
    input_ids: Tensor,
    special_tokens_mask: Tensor,
    *,
    vocab_size: int,
    mask_token_id: int,
    mlm_probability: float = 0.15,
    max_predictions: int | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens of each row to predict, (8.3), and hide them, (8.4).

    A row of n tokens (padding not counted) gets exactly max(1, round(mlm_probability * n)) of them, but never more
    than `max_predictions` or than it has ordinary tokens.

    Args:
        input_ids: int64 (B, L).
        special_tokens_mask: bool or 0/1 (B, L); True = never chosen ([CLS], [SEP], [PAD]).
        max_predictions: P; None: round(mlm_probability * L), at least 1.
        generator: on the device of `input_ids`; the same state gives the same result.

    Returns:
        masked_ids (B, L); positions (B, P), ascending, filled with 0; targets (B, P), the original ids, filled with
        -100.

    Raises:
        ValueError: a shape does not fit, or a number lies outside its range.
    """
    if input_ids.dim() != 2 or special_tokens_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and special_tokens_mask "
            f"{tuple(special_tokens_mask.shape)}; expected (batch, length) for both"
        )
    if not 0 < mlm_probability <= 1:
        raise ValueError(f"mlm_probability={mlm_probability}; expected (0, 1]")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id={mask_token_id}; expected an id below vocab_size={vocab_size}"
        )
    length, device = input_ids.shape[1], input_ids.device
    if max_predictions is None:
        max_predictions = max(1, round(mlm_probability * length))
    if max_predictions < 1:
        raise ValueError(
            f"max_predictions={max_predictions}; expected 1 or more"
        )
    special = special_tokens_mask.bool()
    padding = special & (input_ids == pad_token_id)
    tokens = length - padding.sum(-1, keepdim=True)  # (B, 1), n in (8.3)
    # float64, as Python's own: a half is a half, and goes to the even side
    count = (mlm_probability * tokens.double()).round().clamp(min=1)
    positions = draw_positions(special, count, max_predictions, generator)

    # one uniform number decides, (8.4)
    row = F.pad(input_ids, (0, 1))  # (B, L + 1), one column for empty places
    originals = row.gather(1, positions)  # (B, P)
    u = torch.rand(positions.shape, generator=generator, device=device)
    noise = torch.randint(
        vocab_size,
        positions.shape,
        generator=generator,
        device=device,
        dtype=input_ids.dtype,
    )
    shown = torch.where(u < 0.9, noise, originals)
    shown = torch.where(u < 0.8, mask_token_id, shown)
    masked_ids = row.scatter(1, positions, shown)[:, :length].contiguous()
    empty = positions == length
    targets = originals.masked_fill(empty, IGNORE)
    return masked_ids, positions.masked_fill(empty, 0), targets


def draw_positions(
    special: Tensor,
    count: Tensor,
    slots: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw `count` (B, 1) positions a row that are not `special` (B, L).

    Returns:
        int64 (B, slots), ascending; empty places hold L.
    """
    length = special.shape[1]
    lottery = torch.rand(
        special.shape, generator=generator, device=special.device
    ).masked_fill(special, -1)
    spare = max(0, slots - length)
    drawn, positions = F.pad(lottery, (0, spare), value=-1).topk(slots)
    rank = torch.arange(slots, device=special.device)
    chosen = (rank < count) & (drawn >= 0)
    return positions.masked_fill(~chosen, length).sort(dim=-1).values


# %% The head and its loss
class MaskedLMHead(nn.Module):
    """Score every word of the vocabulary: dense, activation, LayerNorm, then the word embeddings again, (8.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(lambda module: initialize(module, config.initializer_range))

    def forward(self, hidden_states: Tensor, word_embeddings: Tensor) -> Tensor:
        """(B, P, H) and the tied table (V, H) -> logits (B, P, V)."""
        transformed = self.LayerNorm(self.act(self.dense(hidden_states)))
        return F.linear(transformed, word_embeddings, self.bias)


def gather_positions(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """Pick the states of some positions: (B, L, H) and int64 (B, P) -> (B, P, H).

    Raises:
        ValueError: `positions` is not (B, P), or one of them lies outside the row.
    """
    batch, length, size = hidden_states.shape
    if positions.dim() != 2 or len(positions) != batch:
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}; expected ({batch}, P)"
        )
    check_ids(positions, "positions", length, "length")
    return hidden_states.gather(1, positions[..., None].expand(-1, -1, size))


def masked_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log P(target) over the targets that are not -100, (8.5); 0 if there is none.

    Args:
        logits: (..., V) floats; 16-bit ones are summed in float32.
        targets: int64 (...), the hidden words, -100 where nothing was hidden.

    Raises:
        TypeError: the targets are not int64.
        ValueError: shapes differ, or a target lies outside the vocabulary.
    """
    return mean_cross_entropy(logits, targets, "targets")


def mean_cross_entropy(logits: Tensor, targets: Tensor, name: str) -> Tensor:
    """Return (8.5) for any classes, not only words; `name` is what an error calls the targets.

    Args:
        logits: (..., C) floats, the scores of C classes.
        targets: int64 (...), 0 to C - 1, or -100 for what does not count.

    Raises:
        TypeError: the targets are not int64.
        ValueError: shapes differ, or a target lies outside the classes.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name} has shape {tuple(targets.shape)}; expected {tuple(logits.shape[:-1])}, one for each row of scores"
        )
    check_targets(targets, name, logits.shape[-1])
    if logits.dtype != torch.float64:
        logits = logits.float()
    total = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


def check_targets(targets: Tensor, name: str, size: int) -> None:
    """Raise a readable error for targets that are neither -100 nor 0..size-1.

    Raises:
        TypeError: they are not int64.
        ValueError: one of them lies outside.
    """
    if targets.dtype != torch.int64:
        raise TypeError(
            f"{name} has dtype {targets.dtype}; expected torch.int64 (use .long())"
        )
    if torch.compiler.is_compiling() or targets.numel() == 0:
        return
    wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= size))]
    if len(wrong):
        raise ValueError(
            f"{name} holds {int(wrong[0])}; expected 0 to {size - 1}, or {IGNORE} for what does not count"
        )


# %% The model
@dataclass
class MaskedLMOutput:
    """What `BertForMaskedLM` returns."""

    loss: Tensor | None
    logits: Tensor  # (B, L, V), or (B, P, V) with masked_positions
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BertForMaskedLM(PretrainedModel):
    """BERT with the masked-word head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False)
        self.masked_lm = MaskedLMHead(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MaskedLMOutput:
        """Score the vocabulary at each position, or only at `masked_positions` (B, P): the fast path.

        `labels` are (B, L), or (B, P) with `masked_positions`; -100 does not count. Other arguments as in `BertModel`.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            output_hidden_states,
            output_attentions,
        )
        hidden = encoded.last_hidden_state
        if masked_positions is not None:
            hidden = gather_positions(hidden, masked_positions)
        logits = self.masked_lm(
            hidden, self.bert.embeddings.word_embeddings.weight
        )
        loss = None if labels is None else masked_lm_loss(logits, labels)
        return MaskedLMOutput(
            loss, logits, encoded.hidden_states, encoded.attentions
        )
