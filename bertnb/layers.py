"""Layers.

Written by tools/extract.py from notebooks/04_layers.md: edit that notebook, not this file.
"""

from collections.abc import Callable
from functools import partial
from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertnb.configuration import BertConfig

__all__ = [
    "layer_norm",
    "LayerNorm",
    "gelu",
    "ACTIVATIONS",
    "FeedForward",
    "initialize",
]


# %% Layer normalisation in PyTorch
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12
) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1, (4.1), then scale
    and shift it, (4.2).

    Args:
        x: (..., H) floats.
        weight, bias: (H,).
        eps: added to the variance, inside the root.
    """
    mean = x.mean(dim=-1, keepdim=True)
    variance = x.var(dim=-1, keepdim=True, correction=0)  # over H, not H - 1
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


# %% Float32 inside, 16 bits at both ends
class LayerNorm(nn.LayerNorm):
    """The fused kernel of (4.1) and (4.2), for the model.

    Under autocast the result has autocast's 16-bit dtype, so that the residual
    stream is 16-bit from the embeddings on; the statistics stay float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(device, enabled=False):  # it would give float32
            y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y.to(torch.get_autocast_dtype(device))


# %% GELU in PyTorch
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return x times P(X <= x) for a standard normal X, (4.6); "tanh" gives
    the approximation (4.7).

    Raises:
        ValueError: `approximate` is neither "none" nor "tanh".
    """
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / sqrt(2)))
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    raise ValueError(f'approximate={approximate!r}: expected "none" or "tanh"')


# Hugging Face's names -> the fused kernels
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


# %% The feed-forward network in PyTorch
class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between them, the same for each
    position, (4.8)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(
            config.hidden_size, config.intermediate_size
        )
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, F) -> (B, L, H)."""
        return self.output(self.act(self.intermediate(hidden_states)))


# %% Initialisation: a normal distribution cut at two sigma
def initialize(module: nn.Module, std: float) -> None:
    """Set one module's parameters as the original does; `model.apply` runs it
    on every submodule.

    Kernels and embeddings: normal with deviation `std`, cut at two deviations,
    (4.11); biases 0; LayerNorm weights 1.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        nn.init.zeros_(bias)
