"""Speed.

Written by tools/extract.py from notebooks/13_speed.md: edit that notebook, not this file.
"""

from bertnb.configuration import BertConfig

__all__ = ["forward_flops", "training_flops", "model_flops_utilization"]


# %% Floating-point operations
def forward_flops(
    config: BertConfig,
    length: int,
    predictions: int,
    pairs: int = 1,
    last_queries: int | None = None,
) -> dict[str, int]:
    """Count the floating-point operations of one row's forward pass, (13.1).

    Only products of matrices count, and a multiplication with its addition
    counts as two.

    Args:
        length: L, the tokens of the row.
        predictions: P, the positions whose words are scored.
        pairs: D, the [CLS] that are pooled.
        last_queries: the positions that the last layer computes; None: all.
    """
    size, inner = config.hidden_size, config.intermediate_size
    last = length if last_queries is None else last_queries
    full = config.num_hidden_layers - 1
    queries = full * length + last  # Q, summed over the layers
    keys = config.num_hidden_layers * length
    return {
        "projections": 4 * (keys + queries) * size**2,
        "attention": 4 * queries * length * size,
        "feed_forward": 4 * queries * size * inner,
        "words": 2 * predictions * (size**2 + size * config.vocab_size),
        "order": 2 * pairs * (size**2 + 2 * size),
    }


def training_flops(
    config: BertConfig,
    length: int,
    predictions: int,
    pairs: int = 1,
    last_queries: int | None = None,
) -> int:
    """Count the operations of one row's forward and backward pass, (13.2);
    arguments as in `forward_flops`."""
    forward = forward_flops(config, length, predictions, pairs, last_queries)
    return 3 * sum(forward.values())


def model_flops_utilization(
    flops: float, seconds: float, peak_flops: float
) -> float:
    """Return the share of the peak rate that a step uses, (13.3).

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
