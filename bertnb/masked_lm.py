"""The masked language model.

Written by tools/extract.py from notebooks/08_masked_lm.md: edit that notebook, not this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import ACTIVATIONS, LayerNorm, initialize
from bertnb.positions import check_ids, may_look

__all__ = [
    "IGNORE",
    "mask_tokens",
    "replace_tokens",
    "draw_positions",
    "check_same_shape",
    "continuation_table",
    "draw_words",
    "MaskedLMHead",
    "masked_lm_loss",
    "mean_cross_entropy",
    "check_targets",
    "MaskedLMOutput",
    "BertForMaskedLM",
    "pseudo_log_likelihood",
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
    continuation_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens of each row to predict, (8.3), and hide them, (8.4).

    A row of n tokens (padding not counted) gets exactly max(1, round(mlm_probability * n)) of them, but never more
    than `max_predictions` or than it has ordinary tokens. With `continuation_mask` whole words are chosen, and there
    may be fewer: see `draw_words`. With `document_ids` each document of a row gets what it would get as a row.

    Args:
        input_ids: int64 (B, L).
        special_tokens_mask: bool or 0/1 (B, L); True = never chosen ([CLS], [SEP], [PAD]).
        max_predictions: P; None: round(mlm_probability * L), at least 1. Several documents in a row may need more: P
            must be given with `document_ids`.
        generator: on the device of `input_ids`; the same state gives the same result.
        continuation_mask: bool or 0/1 (B, L); True = the token continues the word before it; None: choose tokens.
        document_ids: int64 (B, L), 0 to L - 1, the number of each token's document in its row; None: a row is one
            document. Whole words cannot be chosen with it.

    Returns:
        masked_ids (B, L); positions (B, P), ascending, filled with 0; targets (B, P), the original ids, filled with
        -100.

    Raises:
        ValueError: a shape does not fit, or a number lies outside its range.
    """
    check_same_shape(
        input_ids,
        special_tokens_mask=special_tokens_mask,
        continuation_mask=continuation_mask,
        document_ids=document_ids,
    )
    if document_ids is not None and (
        max_predictions is None or continuation_mask is not None
    ):
        raise ValueError(
            "document_ids needs max_predictions, and no continuation_mask: the counts of several documents are "
            "rounded one by one, and whole words are drawn for one document a row"
        )
    if not 0 < mlm_probability <= 1:
        raise ValueError(f"mlm_probability={mlm_probability}; expected (0, 1]")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id={mask_token_id}; expected an id below vocab_size={vocab_size}"
        )
    length = input_ids.shape[1]
    if max_predictions is None:
        max_predictions = max(1, round(mlm_probability * length))
    if max_predictions < 1:
        raise ValueError(
            f"max_predictions={max_predictions}; expected 1 or more"
        )
    special = special_tokens_mask.bool()
    padding = special & (input_ids == pad_token_id)
    tokens = _sizes(~padding, document_ids)  # n in (8.3)
    # float64, as Python's own: a half is a half, and goes to the even side
    count = (mlm_probability * tokens.double()).round().clamp(min=1)
    if continuation_mask is None:
        positions = draw_positions(
            special, count, max_predictions, generator, document_ids
        )
    else:
        continues = continuation_mask.bool()
        positions = draw_words(
            special, continues, count, max_predictions, generator
        )
    row = F.pad(input_ids, (0, 1))  # (B, L + 1), one column for empty places
    originals = row.gather(1, positions)  # (B, P)
    shown = replace_tokens(originals, vocab_size, mask_token_id, generator)
    masked_ids = row.scatter(1, positions, shown)[:, :length].contiguous()
    empty = positions == length
    targets = originals.masked_fill(empty, IGNORE)
    return masked_ids, positions.masked_fill(empty, 0), targets


def _sizes(tokens: Tensor, document_ids: Tensor | None) -> Tensor:
    """Count each row's tokens, (B, 1), or those of each token's document, (B, L)."""
    if document_ids is None:
        return tokens.sum(-1, keepdim=True)
    sizes = torch.zeros_like(document_ids)  # (B, L), by number
    sizes.scatter_add_(1, document_ids, tokens.long())
    return sizes.gather(1, document_ids)


def replace_tokens(
    ids: Tensor,
    vocab_size: int,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return what is shown instead of chosen tokens: one uniform number decides for each, (8.4)."""
    u = torch.rand(ids.shape, generator=generator, device=ids.device)
    noise = torch.randint(
        vocab_size,
        ids.shape,
        generator=generator,
        device=ids.device,
        dtype=ids.dtype,
    )
    shown = torch.where(u < 0.9, noise, ids)
    return torch.where(u < 0.8, mask_token_id, shown)


def draw_positions(
    special: Tensor,
    count: Tensor,
    slots: int,
    generator: torch.Generator | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Draw `count` (B, 1) positions a row that are not `special` (B, L).

    With `document_ids` (B, L) the count is (B, L), one for each token, and that many are drawn of its document.

    Returns:
        int64 (B, slots), ascending; empty places hold L.
    """
    length = special.shape[1]
    lottery = torch.rand(
        special.shape, generator=generator, device=special.device
    ).masked_fill(special, -1)
    if document_ids is not None:
        lost = _ranks(lottery, document_ids) >= count
        lottery = lottery.masked_fill(lost, -1)
        count = count.new_full((), slots)
    spare = max(0, slots - length)
    drawn, positions = F.pad(lottery, (0, spare), value=-1).topk(slots)
    rank = torch.arange(slots, device=special.device)
    chosen = (rank < count) & (drawn >= 0)
    return positions.masked_fill(~chosen, length).sort(dim=-1).values


def _ranks(lottery: Tensor, document_ids: Tensor) -> Tensor:
    """Return each token's rank in its document, (B, L): 0 = the largest number."""
    order = lottery.argsort(-1, descending=True)
    homes = document_ids.gather(1, order)
    homes, by_home = homes.sort(dim=-1, stable=True)  # document by document
    first = torch.searchsorted(homes, homes)  # where its document begins
    ranks = torch.arange(homes.shape[1], device=homes.device) - first
    return torch.empty_like(ranks).scatter(1, order.gather(1, by_home), ranks)


def check_same_shape(input_ids: Tensor, **masks: Tensor | None) -> None:
    """Raise ValueError unless `input_ids` is (B, L), and each of the masks, called by its name, too (or None)."""
    for name, mask in masks.items():
        if mask is None:
            continue
        if input_ids.dim() != 2 or mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and {name} "
                f"{tuple(mask.shape)}; expected (batch, length) for both"
            )


# %% Whole words
def continuation_table(vocabulary: Mapping[str, int]) -> Tensor:
    """Return bool (V,): True for the ids of pieces that continue a word, `##...`.

    `continuation_table(tokenizer.vocabulary)[input_ids]` is what `mask_tokens` takes as `continuation_mask`.
    """
    continues = [False] * (1 + max(vocabulary.values()))
    for piece, i in vocabulary.items():
        continues[i] = piece.startswith("##")
    return torch.tensor(continues)


def draw_words(
    special: Tensor,
    continues: Tensor,
    count: Tensor,
    slots: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw whole words with together at most `count` (B, 1) tokens, by the rule of the original.

    A token where `continues` (B, L) is True belongs to the word of the token before it that is not `special` (B, L).
    Words come in random order, and one that would exceed the count is passed over; so the count is reached if a word
    of one token is left over, and nothing is drawn where every word is longer than the count.

    Returns:
        int64 (B, slots), ascending; empty places hold L.
    """
    length, device = special.shape[1], special.device
    ordinary = ~special
    word = (ordinary & ~continues).cumsum(-1)  # (B, L), each token's word
    sizes = torch.zeros(len(special), length + 1, device=device).long()
    sizes.scatter_add_(1, word, ordinary.long())  # (B, L + 1), most are 0
    order = torch.rand(sizes.shape, generator=generator, device=device)
    taken = torch.zeros_like(sizes, dtype=torch.bool)
    left = count.long().clamp(max=slots)
    for column in order.argsort(-1).split(1, dim=-1):  # a word of each row
        size = sizes.gather(1, column)
        taken.scatter_(1, column, size <= left)
        left = left - size * (size <= left)
        if not left.any():
            break
    chosen = taken.gather(1, word) & ordinary
    places = torch.arange(length, device=device).where(chosen, length)
    return F.pad(places, (0, slots), value=length).sort(-1).values[:, :slots]


# %% The head and its loss
class MaskedLMHead(nn.Module):
    """Score every word of the vocabulary: dense, activation, LayerNorm, then the word embeddings again, (8.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(lambda module: initialize(module, config.initializer_range))

    def forward(self, hidden_states: Tensor, word_embeddings: Tensor) -> Tensor:
        """(B, P, H) and the tied table (V, H) -> logits (B, P, V)."""
        transformed = self.LayerNorm(self.act(self.dense(hidden_states)))
        return F.linear(transformed, word_embeddings, self.bias)


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


def mean_cross_entropy(
    logits: Tensor, targets: Tensor, name: str, weights: Tensor | None = None
) -> Tensor:
    """Return (8.5) for any classes, not only words; `name` is what an error calls the targets.

    Args:
        logits: (..., C) floats, the scores of C classes.
        targets: int64 (...), 0 to C - 1, or -100 for what does not count.
        weights: (C) floats, what each term is multiplied by, by its class; the number of the terms is what it was.

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
        None if weights is None else weights.to(logits.dtype),
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
    if not may_look(targets):
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
    losses: dict[str, Tensor] | None = None  # the loss under "labels"


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
            masked_positions,
        )
        logits = self.masked_lm(
            encoded.last_hidden_state,
            self.bert.embeddings.word_embeddings.weight,
        )
        loss = None if labels is None else masked_lm_loss(logits, labels)
        return MaskedLMOutput(
            loss,
            logits,
            encoded.hidden_states,
            encoded.attentions,
            None if loss is None else {"labels": loss},
        )


# %% How likely is a sentence?
@torch.no_grad()
def pseudo_log_likelihood(
    model: BertForMaskedLM,
    input_ids: Tensor,
    special_tokens_mask: Tensor,
    *,
    mask_token_id: int,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Return the pseudo-log-likelihood of each row, float32 (B,), (8.9).

    Each ordinary token is hidden in a copy of its row and scored there; `batch_size` copies at a time. The model is
    in `eval` mode meanwhile.

    Args:
        input_ids: int64 (B, L), nothing hidden.
        special_tokens_mask: bool or 0/1 (B, L); True = not scored ([CLS], [SEP], [PAD]).
        attention_mask, token_type_ids: (B, L), as in `BertModel`.

    Raises:
        ValueError: shapes differ, or an id lies outside the vocabulary.
    """
    check_same_shape(input_ids, special_tokens_mask=special_tokens_mask)
    check_ids(input_ids, "input_ids", model.config.vocab_size, "vocab_size")
    total = torch.zeros(len(input_ids), device=input_ids.device)
    training = model.training
    model.eval()
    where = (~special_tokens_mask.bool()).nonzero()  # (all tokens, 2)
    for rows, places in (pair.unbind(-1) for pair in where.split(batch_size)):
        words = input_ids[rows, places]
        hidden = input_ids[rows].scatter(1, places[:, None], mask_token_id)
        logits = model(
            hidden,
            None if attention_mask is None else attention_mask[rows],
            None if token_type_ids is None else token_type_ids[rows],
            masked_positions=places[:, None],
        ).logits[:, 0]
        log_p = logits.float().log_softmax(-1).gather(1, words[:, None])
        total.index_add_(0, rows, log_p[:, 0])
    model.train(training)
    return total
