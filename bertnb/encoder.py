"""The encoder.

Written by tools/extract.py from notebooks/06_encoder.md: edit that notebook, not this file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.embeddings import BertEmbeddings
from bertnb.folders import PretrainedModel
from bertnb.layers import FeedForward, LayerNorm, initialize
from bertnb.multihead import MultiHeadAttention
from bertnb.positions import check_ids

__all__ = [
    "BertLayer",
    "BertOutput",
    "BertEncoder",
    "gather_positions",
    "check_positions",
    "BertPooler",
    "expand_mask",
    "BertModel",
    "parameter_count",
]


# %% The layer in PyTorch
class BertLayer(nn.Module):
    """Attention, then feed-forward, each followed by a post-norm, (6.1).

    It computes the new states of all places, or of some, (6.8).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention = MultiHeadAttention(config)
        self.attention_norm = LayerNorm(size, eps=eps)
        self.feed_forward = FeedForward(config)
        self.output_norm = LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new states (B, L, H) and, on request, the weights.

        Args:
            hidden_states: (B, L, H).
            mask: bool, (B or 1, A or 1, L or 1, L); True = may attend.
            output_attentions: also return the weights (B, A, L, L).
            positions: int64 (B, K) within 0..L-1: compute the new states of
                these places only, (B, K, H); None: of all.
        """
        x = hidden_states
        if positions is not None:
            x = x.take_along_dim(positions[..., None], 1)  # (B, K, H)
            if mask is not None and mask.shape[2] > 1:  # a row a query
                mask = mask.take_along_dim(positions[:, None, :, None], 2)
        attended, weights = self.attention(
            hidden_states, mask, output_attentions, x
        )
        y = self.attention_norm(x + self.dropout(attended))
        return self.output_norm(y + self.dropout(self.feed_forward(y))), weights


# %% The stack and the pooler
@dataclass
class BertOutput:
    """What `BertModel` returns; the fields have Hugging Face's names."""

    last_hidden_state: Tensor  # (B, L, H); with masked_positions (B, P, H)
    pooler_output: Tensor | None = None  # (B, H); with cls_positions (B, D, H)
    hidden_states: tuple[Tensor, ...] | None = None  # N + 1 of (B, L, H)
    attentions: tuple[Tensor, ...] | None = None  # N of (B, A, L, L)


class BertEncoder(nn.Module):
    """N layers, one on the other, (6.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(config) for _ in range(config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        positions: Tensor | None = None,
    ) -> BertOutput:
        """Return the last states; on request all of them, and the weights.

        With int64 `positions` (B, K) within 0..L-1 the last states are those
        of these places, (B, K, H). If nothing else is requested, the last
        layer computes no others.
        """
        states, attentions = [hidden_states], []
        every = output_hidden_states or output_attentions
        for layer in self.layer:
            last = layer is self.layer[-1] and not every
            hidden_states, weights = layer(
                hidden_states,
                mask,
                output_attentions,
                positions if last else None,
            )
            states.append(hidden_states)
            attentions.append(weights)
        if positions is not None and every:
            hidden_states = gather_positions(hidden_states, positions)
        return BertOutput(
            hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def gather_positions(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """Pick the states of some places: (B, L, H) and int64 (B, K) -> (B, K, H).

    Raises:
        ValueError: `positions` is not (B, K), or one lies outside the row.
    """
    check_positions(positions, "positions", *hidden_states.shape[:2])
    return hidden_states.take_along_dim(positions[..., None], 1)


def check_positions(
    positions: Tensor, name: str, batch: int, length: int
) -> None:
    """Raise a readable error unless `positions` (B, K) lie within 0..L-1.

    Raises:
        TypeError: they are not integers.
        ValueError: the shape is another, or one lies outside the row.
    """
    if positions.dim() != 2 or len(positions) != batch:
        raise ValueError(
            f"{name} has shape {tuple(positions.shape)}; expected "
            f"({batch}, K): K places for each row"
        )
    check_ids(positions, name, length, "length")


class BertPooler(nn.Module):
    """One vector for the whole input, from [CLS], (6.3)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """Pool the states of [CLS]: (..., H) -> (..., H)."""
        return self.dense(first).tanh()


# %% The model
def expand_mask(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Turn 0 and 1 into bool that broadcasts to (B, A, L, L).

    Args:
        attention_mask: (B, L), or (B, L, L) for queries by keys.
        input_ids: (B, L).

    Raises:
        ValueError: the shape is neither.
    """
    batch, length = input_ids.shape
    if attention_mask.shape == (batch, length):
        return attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
    if attention_mask.shape == (batch, length, length):
        return attention_mask.bool()[:, None]  # (B, 1, L, L)
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}; expected "
        f"{(batch, length)} like input_ids, or {(batch, length, length)} for "
        "queries by keys"
    )


class BertModel(PretrainedModel):
    """Ids in; a vector for each token, and one for the whole, out: (6.4)."""

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(lambda module: initialize(module, config.initializer_range))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        masked_positions: Tensor | None = None,
        cls_positions: Tensor | None = None,
    ) -> BertOutput:
        """Encode int64 ids (B, L).

        Args:
            attention_mask: (B, L), 1 for tokens and 0 for padding, or
                (B, L, L) for queries by keys; None: no padding.
            token_type_ids: (B, L), the segment of each token; None: all 0.
            position_ids: (B, L) or (L,); None: 0..L-1.
            masked_positions: int64 (B, P): return the last states of these
                places only; None: of all.
            cls_positions: int64 (B, D): pool these places, a [CLS] each;
                None: place 0.

        Raises:
            ValueError: a shape does not fit, or an id lies outside its table.
        """
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected "
                "(batch, length)"
            )
        mask = None
        if attention_mask is not None:
            mask = expand_mask(attention_mask, input_ids)
        read = {
            "masked_positions": masked_positions,
            "cls_positions": cls_positions,
        }
        for name, places in read.items():
            if places is not None:
                check_positions(places, name, *input_ids.shape)
        positions = masked_positions
        if positions is not None and self.pooler is not None:
            first = cls_positions
            if first is None:  # [CLS] begins the row
                first = positions.new_zeros(len(positions), 1)
            positions = torch.cat((positions, first), 1)  # (B, P + D)
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        output = self.encoder(
            embedded, mask, output_hidden_states, output_attentions, positions
        )
        states = output.last_hidden_state
        if masked_positions is None:
            to_pool = states[:, :1]
            if cls_positions is not None:
                to_pool = gather_positions(states, cls_positions)
        else:
            slots = masked_positions.shape[1]
            output.last_hidden_state, to_pool = states.tensor_split([slots], 1)
        if self.pooler is not None:
            pooled = self.pooler(to_pool)  # (B, D, H)
            one = cls_positions is None
            output.pooler_output = pooled[:, 0] if one else pooled
        return output


# %% 109,482,240
def parameter_count(config: BertConfig) -> dict[str, int]:
    """Count the parameters of `BertModel` term by term, (6.5), and in total."""
    size, inner = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers
    terms = {
        "word_embeddings": config.vocab_size * size,
        "position_embeddings": config.max_position_embeddings * size,
        "token_type_embeddings": config.type_vocab_size * size,
        "embedding_norm": 2 * size,
        "attention": layers * 4 * (size * size + size),
        "feed_forward": layers * (2 * size * inner + inner + size),
        "layer_norms": layers * 4 * size,
        "pooler": size * size + size,
    }
    return {**terms, "total": sum(terms.values())}
