"""Speed.

Written by tools/extract.py from notebooks/13_speed.md: edit that notebook, not this file.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bertnb.configuration import BertConfig

__all__ = [
    "Product",
    "forward_products",
    "training_flops",
    "model_flops_utilization",
    "elementwise_numbers",
    "roofline",
    "step_floor",
]


# %% The code
@dataclass(frozen=True)
class Product:
    """A product of an (m, k) and a (k, n) matrix, made `count` times."""

    part: str
    count: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Floating-point operations, (13.1)."""
        return 2 * self.count * self.m * self.k * self.n

    @property
    def numbers(self) -> int:
        """Numbers that are read and written, (13.2)."""
        m, k, n = self.m, self.k, self.n
        return self.count * (m * k + k * n + m * n)


def forward_products(
    config: BertConfig,
    length: int,
    predictions: int,
    pairs: int = 1,
    last_queries: int | None = None,
    rows: int = 1,
) -> list[Product]:
    """Return the products of matrices in a forward pass, (13.3).

    Args:
        length: L, the tokens of a row.
        predictions: P, the positions of a row whose words are scored.
        pairs: D, the [CLS] of a row that are pooled.
        last_queries: K, the places that the last layer computes; None: all.
        rows: B.
    """
    size, inner = config.hidden_size, config.intermediate_size
    heads, d = config.num_attention_heads, config.head_size
    last = length if last_queries is None else last_queries
    found = []
    for layers, queries in ((config.num_hidden_layers - 1, length), (1, last)):
        all_heads = layers * rows * heads
        found += [
            Product("projections", 2 * layers, rows * length, size, size),
            Product("projections", 2 * layers, rows * queries, size, size),
            Product("attention", all_heads, queries, d, length),  # scores
            Product("attention", all_heads, queries, length, d),  # means
            Product("feed-forward", layers, rows * queries, size, inner),
            Product("feed-forward", layers, rows * queries, inner, size),
        ]
    return [
        *found,
        Product("words", 1, rows * predictions, size, size),
        Product("words", 1, rows * predictions, size, config.vocab_size),
        Product("order", 1, rows * pairs, size, size),
        Product("order", 1, rows * pairs, size, 2),
    ]


def training_flops(
    config: BertConfig,
    length: int,
    predictions: int,
    pairs: int = 1,
    last_queries: int | None = None,
    rows: int = 1,
) -> int:
    """Count the operations of a forward and a backward pass, (13.4); arguments
    as in `forward_products`."""
    forward = forward_products(
        config, length, predictions, pairs, last_queries, rows
    )
    return 3 * sum(product.flops for product in forward)


# %% Useful work
def model_flops_utilization(
    flops: float, seconds: float, peak_flops: float
) -> float:
    """Return the share of the peak rate that a step uses, (13.5).

    Args:
        flops: the useful operations of the step: no padding, no recomputation,
            no word scored that is not predicted.
        seconds: what the step takes.
        peak_flops: operations a second.

    Raises:
        ValueError: `seconds` or `peak_flops` is not positive.
    """
    if seconds <= 0 or peak_flops <= 0:
        raise ValueError(
            f"seconds={seconds}, peak_flops={peak_flops}: expected positive "
            "numbers"
        )
    return flops / (seconds * peak_flops)


# %% Bytes
def elementwise_numbers(
    config: BertConfig,
    length: int,
    predictions: int,
    parameters: int,
    rows: int = 1,
) -> dict[str, int]:
    """Count the numbers that a training step reads and writes beside its
    products of matrices: (13.6) for each layer and token, and (13.7).

    Without dropout, each operation by itself, as it is without compilation;
    vectors, such as biases and the statistics of LayerNorm, are not counted.
    Arguments as in `forward_products`; `parameters` is their number.
    """
    size, inner = config.hidden_size, config.intermediate_size
    places = config.num_hidden_layers * rows * length
    return {
        "attention": places * 12 * size,
        "norms": places * 10 * size,
        "sums": places * 18 * size,
        "activation": places * 5 * inner,
        "biases": places * (5 * size + inner),
        "loss": 7 * rows * predictions * config.vocab_size,
        "table": 4 * config.vocab_size * size,
        "optimiser": 10 * parameters,
    }


# %% The roofline
def roofline(
    intensity: float, peak_flops: float, bytes_per_second: float
) -> float:
    """Return the most operations a second that work of this intensity
    (operations a byte) can reach, (13.8).

    Raises:
        ValueError: a number is not positive.
    """
    if min(intensity, peak_flops, bytes_per_second) <= 0:
        raise ValueError(
            f"intensity={intensity}, peak_flops={peak_flops}, bytes_per_second"
            f"={bytes_per_second}: expected positive numbers"
        )
    return min(peak_flops, bytes_per_second * intensity)


def step_floor(
    products: Iterable[Product],
    numbers: dict[str, int],
    peak_flops: float,
    bytes_per_second: float,
    width: int = 4,
) -> dict[str, float]:
    """Return the least seconds of each part of a training step, (13.9).

    Args:
        products: those of the forward pass, from `forward_products`.
        numbers: what the rest moves, from `elementwise_numbers`.
        peak_flops: operations a second in products.
        bytes_per_second: between memory and chip.
        width: bytes a number.

    Raises:
        ValueError: a rate is not positive.
    """
    seconds: dict[str, float] = {}
    for product in products:
        moved = width * product.numbers
        rate = peak_flops
        if product.part != "attention":  # its numbers are in `numbers`
            intensity = product.flops / moved
            rate = roofline(intensity, peak_flops, bytes_per_second)
        took = 3 * product.flops / rate
        seconds[product.part] = seconds.get(product.part, 0.0) + took
    for part, count in numbers.items():
        took = width * count / bytes_per_second
        seconds[part] = seconds.get(part, 0.0) + took
    return seconds
