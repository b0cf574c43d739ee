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

__all__ = [
    "IGNORE",
    "mask_tokens",
    "MaskedLMHead",
    "gather_positions",
    "masked_lm_loss",
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
    """Choose tokens of each row to predict, and hide them: 80 % [MASK], 10 % a random token, 10 % unchanged.

    A row of n tokens (padding not counted) gets exactly max(1, round(mlm_probability * n)) of them, (8.1), but never more
    than `max_predictions` or than it has ordinary tokens.

    Args:
        input_ids: int64 (B, L).
        special_tokens_mask: bool or 0/1 (B, L); True = never chosen ([CLS], [SEP], [PAD]).
        max_predictions: P; None: round(mlm_probability * L).
        generator: on the device of `input_ids`; the same state gives the same result.

    Returns:
        masked_ids (B, L); positions (B, P), ascending, filled with 0; targets (B, P), the original ids, filled with -100.

    Raises:
        ValueError: shapes differ, or `mlm_probability` lies outside (0, 1].
    """
    if special_tokens_mask.shape != input_ids.shape:
        raise ValueError(
            f"special_tokens_mask has shape {tuple(special_tokens_mask.shape)}; expected {tuple(input_ids.shape)} like input_ids"
        )
    if not 0 < mlm_probability <= 1:
        raise ValueError(
            f"mlm_probability={mlm_probability}: expected a number in (0, 1]"
        )
    batch, length = input_ids.shape
    device = input_ids.device
    if max_predictions is None:
        max_predictions = max(1, round(mlm_probability * length))
    slots = min(max_predictions, length)

    special = special_tokens_mask.bool()
    tokens = length - (special & (input_ids == pad_token_id)).sum(
        -1, keepdim=True
    )  # (B, 1)
    count = (
        (mlm_probability * tokens).round().clamp(1, max_predictions)
    )  # (8.1)
    lottery = torch.rand(
        batch, length, generator=generator, device=device
    ).masked_fill(special, -1)
    drawn, positions = lottery.topk(slots)  # (B, P)
    chosen = (torch.arange(slots, device=device) < count) & (drawn >= 0)
    positions = positions.masked_fill(~chosen, length).sort(dim=-1).values
    chosen = positions < length
    positions = positions.masked_fill(~chosen, 0)
    originals = input_ids.gather(1, positions)

    # one uniform number decides: < 0.8 [MASK], < 0.9 random, else unchanged
    u = torch.rand(batch, slots, generator=generator, device=device)
    noise = torch.randint(
        vocab_size, (batch, slots), generator=generator, device=device
    )
    shown = torch.where(
        u < 0.8, mask_token_id, torch.where(u < 0.9, noise, originals)
    )
    masked_ids = input_ids.clone()
    rows = torch.arange(batch, device=device)[:, None].expand(-1, slots)
    masked_ids[rows[chosen], positions[chosen]] = shown[chosen]
    return masked_ids, positions, originals.masked_fill(~chosen, IGNORE)


# %% The head and its loss
class MaskedLMHead(nn.Module):
    """Score every word of the vocabulary: dense, activation, LayerNorm, then the word embeddings again, (8.3)."""

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
    """Pick the states of some positions: (B, L, H) and int64 (B, P) -> (B, P, H)."""
    return hidden_states.gather(
        1, positions[..., None].expand(-1, -1, hidden_states.shape[-1])
    )


def masked_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log P(target) over the targets that are not -100, (8.4); 0 if there is none.

    Args:
        logits: (..., V) floats.
        targets: int64 (...), the hidden words, -100 where nothing was hidden.

    Raises:
        ValueError: shapes differ, or a target lies outside the vocabulary.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; expected {tuple(logits.shape[:-1])} like logits without V"
        )
    check_targets(targets, "targets", logits.shape[-1])
    total = F.cross_entropy(
        logits.flatten(0, -2).float(),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


def check_targets(targets: Tensor, name: str, size: int) -> None:
    """Raise ValueError for targets that are neither -100 nor 0..size-1."""
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

    optional = ("cls.predictions.",)

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
