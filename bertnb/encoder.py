"""The encoder.

Written by tools/extract.py from notebooks/06_encoder.md: edit that notebook, not this file.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from bertnb.configuration import BertConfig
from bertnb.embeddings import BertEmbeddings
from bertnb.folders import PretrainedModel
from bertnb.layers import FeedForward, initialize
from bertnb.multihead import MultiHeadAttention

__all__ = [
    "BertLayer",
    "BertOutput",
    "BertEncoder",
    "BertPooler",
    "expand_mask",
    "BertModel",
]


# %% One layer
class BertLayer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and LayerNorm after the sum: post-norm, (6.1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.attention_norm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )
        self.feed_forward = FeedForward(config)
        self.output_norm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new states (B, L, H) and, on request, the attention weights (B, A, L, L)."""
        attended, weights = self.attention(
            hidden_states, mask, output_attentions
        )
        hidden_states = self.attention_norm(
            hidden_states + self.dropout(attended)
        )
        transformed = self.feed_forward(hidden_states)
        return self.output_norm(
            hidden_states + self.dropout(transformed)
        ), weights


# %% The stack
@dataclass
class BertOutput:
    """What `BertModel` returns; the fields have Hugging Face's names."""

    last_hidden_state: Tensor  # (B, L, H)
    pooler_output: Tensor | None = None  # (B, H)
    hidden_states: tuple[Tensor, ...] | None = (
        None  # N + 1 of (B, L, H), the embeddings first
    )
    attentions: tuple[Tensor, ...] | None = None  # N of (B, A, L, L)


class BertEncoder(nn.Module):
    """N layers, one after the other, (6.2)."""

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
    ) -> BertOutput:
        """Return the last states, and on request the states before and after each layer and its weights."""
        states, attentions = [hidden_states], []
        for layer in self.layer:
            hidden_states, weights = layer(
                hidden_states, mask, output_attentions
            )
            states.append(hidden_states)
            attentions.append(weights)
        return BertOutput(
            hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class BertPooler(nn.Module):
    """One vector for the whole input, from [CLS]: tanh(W h_0 + b), (6.3)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) -> (B, H)."""
        return self.dense(hidden_states[:, 0]).tanh()


def expand_mask(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Turn a mask of 0 and 1, (B, L) or (B, L, L), into bool that broadcasts to (B, A, L, L).

    Raises:
        ValueError: the shape does not fit `input_ids` (B, L).
    """
    batch, length = input_ids.shape
    if attention_mask.shape == (batch, length):
        return attention_mask.bool()[:, None, None, :]
    if attention_mask.shape == (batch, length, length):
        return attention_mask.bool()[:, None]
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}; expected {(batch, length)} like input_ids, "
        f"or {(batch, length, length)} for a mask of queries by keys"
    )


# %% The model
class BertModel(PretrainedModel):
    """The encoder: ids in, a vector for each token and one for the whole out, (6.4)."""

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
    ) -> BertOutput:
        """Encode int64 ids (B, L).

        Args:
            attention_mask: (B, L), 1 for tokens and 0 for padding, or (B, L, L) for queries by keys; None: no padding.
            token_type_ids: (B, L), the segment of each token; None: all 0.
            position_ids: (B, L) or (L,); None: 0..L-1.

        Raises:
            ValueError: a shape does not fit, or an id lies outside its table.
        """
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, length)"
            )
        mask = (
            None
            if attention_mask is None
            else expand_mask(attention_mask, input_ids)
        )
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        output = self.encoder(
            embedded, mask, output_hidden_states, output_attentions
        )
        if self.pooler is not None:
            output.pooler_output = self.pooler(output.last_hidden_state)
        return output
