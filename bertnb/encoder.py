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
    "parameter_count",
]


# %% The layer in PyTorch
class BertLayer(nn.Module):
    """Attention, then feed-forward, each followed by a post-norm, (6.1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention = MultiHeadAttention(config)
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.feed_forward = FeedForward(config)
        self.output_norm = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new states (B, L, H) and, on request, the weights.

        `mask` is bool and broadcastable to (B, A, L, L), the weights' shape.
        """
        x = hidden_states
        attended, weights = self.attention(x, mask, output_attentions)
        y = self.attention_norm(x + self.dropout(attended))
        return self.output_norm(y + self.dropout(self.feed_forward(y))), weights


# %% The stack and the pooler
@dataclass
class BertOutput:
    """What `BertModel` returns; the fields have Hugging Face's names."""

    last_hidden_state: Tensor  # (B, L, H)
    pooler_output: Tensor | None = None  # (B, H)
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
    ) -> BertOutput:
        """Return the last states; on request all of them, and the weights."""
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
    """One vector for the whole input, from [CLS], (6.3)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) -> (B, H)."""
        return self.dense(hidden_states[:, 0]).tanh()


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
    ) -> BertOutput:
        """Encode int64 ids (B, L).

        Args:
            attention_mask: (B, L), 1 for tokens and 0 for padding, or
                (B, L, L) for queries by keys; None: no padding.
            token_type_ids: (B, L), the segment of each token; None: all 0.
            position_ids: (B, L) or (L,); None: 0..L-1.

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
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        output = self.encoder(
            embedded, mask, output_hidden_states, output_attentions
        )
        if self.pooler is not None:
            output.pooler_output = self.pooler(output.last_hidden_state)
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
