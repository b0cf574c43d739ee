"""The model on paper: time, memory; what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertnb import (
    BertConfig,
    BertForPreTraining,
    Cluster,
    adamw,
    allreduce_seconds,
    memory_per_rank,
    shard_model,
    step_seconds,
)

rates = st.floats(1e-3, 1e12)
sizes = st.floats(0, 1e12)


def ring(vectors, latency, bandwidth, item_bytes):
    """Add up vectors on a ring, message by message; return the seconds."""
    n, clock = len(vectors), 0.0
    pieces = [np.array_split(vector, n) for vector in vectors]
    for turn in range(2 * (n - 1)):
        sent = [pieces[rank][(rank - turn) % n].copy() for rank in range(n)]
        for rank in range(n):
            mine = pieces[(rank + 1) % n]
            piece = (rank - turn) % n
            mine[piece] = sent[rank] + (mine[piece] if turn < n - 1 else 0)
        clock += latency + max(map(len, sent)) * item_bytes / bandwidth
    for rank in range(n):
        np.testing.assert_allclose(np.concatenate(pieces[rank]), sum(vectors))
    return clock


@pytest.mark.equation("14.3", "14.4")
@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_a_ring_of_messages_takes_the_time_of_the_equation(ranks, measured):
    vectors = np.random.default_rng(0).normal(size=(ranks, 4 * 3 * 7))
    seconds = ring(list(vectors), 0.0, 5.0, 4)
    cluster = Cluster(ranks, 1.0, bandwidth=5.0)
    measured(allreduce_seconds(cluster, 4 * 4 * 3 * 7) - seconds, 1e-9)
    # latency counts once a message: two ranks have no better tree
    pair = Cluster(2, 1.0, bandwidth=5.0, latency=0.25)
    seconds = ring(list(vectors[:2]), 0.25, 5.0, 4)
    measured(allreduce_seconds(pair, 4 * 4 * 3 * 7) - seconds, 1e-9)


@pytest.mark.equation("14.4")
def test_many_ranks_with_little_to_say_use_trees(measured):
    cluster = Cluster(1000, 1.0, bandwidth=1e9, latency=1e-5)
    seconds = 2 * (10 * 1e-5 + 1000 / 1e9)  # ten levels up, ten down
    measured(allreduce_seconds(cluster, 1000) / seconds - 1, 1e-12)


@given(st.integers(2, 5000), sizes, rates, st.floats(0, 1))
def test_an_all_reduce_is_between_its_bounds(ranks, size, bandwidth, latency):
    cluster = Cluster(ranks, 1.0, bandwidth, latency)
    least = 2 * (ranks - 1) * size / ranks / bandwidth
    seconds = allreduce_seconds(cluster, size)
    most = 2 * (math.ceil(math.log2(ranks)) * latency + size / bandwidth)
    assert least * (1 - 1e-9) <= seconds <= most * (1 + 1e-9)
    assert allreduce_seconds(Cluster(1, 1.0, bandwidth, latency), size) == 0


@pytest.mark.equation("14.5")
@given(st.integers(2, 2000), sizes, st.floats(0, 1), rates, rates)
def test_a_step_is_its_transcription(
    measured, ranks, size, share, flops, bandwidth
):
    cluster = Cluster(ranks, flops, bandwidth, 1e-5)
    late, operations = share * size, 7e9
    early = size - late
    buckets = max(1, math.ceil(early / (25 * 1024 * 1024)))
    expected = operations / 3 / flops
    expected += max(
        2 * operations / 3 / flops,
        buckets * allreduce_seconds(cluster, early / buckets),
    )
    expected += allreduce_seconds(cluster, late)
    seconds = step_seconds(cluster, operations, size, late)
    measured(seconds / expected - 1, 1e-9)


def test_alone_or_with_nothing_to_send_a_step_is_computing_only():
    alone = Cluster(1, flops=10.0, bandwidth=1.0, latency=1.0)
    assert step_seconds(alone, 30.0, 1e9, 1e8) == pytest.approx(3.0)
    silent = Cluster(8, flops=10.0, bandwidth=1.0)
    assert step_seconds(silent, 30.0, 0.0) == pytest.approx(3.0)


def test_what_hides_behind_the_backward_pass_is_free_and_the_rest_is_not():
    cluster = Cluster(2, flops=1.0, bandwidth=1.0)  # 2 (n-1) / n = 1
    hidden = step_seconds(cluster, 3.0, 2.0)
    assert hidden == pytest.approx(3.0)
    assert step_seconds(cluster, 3.0, 2.5) == pytest.approx(3.5)
    assert step_seconds(cluster, 3.0, 2.0, 0.5) == pytest.approx(3.5)


@pytest.mark.equation("14.7")
def test_a_rank_of_ddp_holds_what_the_model_and_its_optimiser_hold(measured):
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = BertForPreTraining(config)
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = {
        "weights": list(model.parameters()),
        "gradients": [p.grad for p in model.parameters()],
        "moments": [
            state[name]
            for state in optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ],
    }
    count = sum(p.numel() for p in model.parameters())
    paper = memory_per_rank(count)
    assert list(paper) == list(held)
    for name, tensors in held.items():
        found = sum(t.numel() * t.element_size() for t in tensors)
        measured(paper[name] - found, 0)


@pytest.mark.equation("14.7")
@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_each_stage_spreads_one_thing_more(ranks, measured):
    totals = [sum(memory_per_rank(1000, ranks, s).values()) for s in range(4)]
    expected = [
        16_000,
        8_000 + 8_000 / ranks,
        4_000 + 12_000 / ranks,
        16_000 / ranks,
    ]
    measured(np.subtract(totals, expected), 1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Cluster(0, 1.0, 1.0), "ranks=0: expected 1 or more"),
        (lambda: Cluster(2, 0.0, 1.0), "flops=0.0"),
        (lambda: Cluster(2, 1.0, -1.0), "bandwidth=-1.0"),
        (lambda: Cluster(2, 1.0, 1.0, -1.0), "latency=-1.0"),
        (
            lambda: step_seconds(Cluster(2, 1.0, 1.0), 1.0, 1.0, 2.0),
            "late_bytes=2.0: expected 0 to gradient_bytes=1.0",
        ),
        (
            lambda: step_seconds(Cluster(2, 1.0, 1.0), 1.0, 1.0, -2.0),
            "late_bytes=-2.0",
        ),
        (lambda: memory_per_rank(1, 1, 4), "stage=4"),
        (lambda: memory_per_rank(1, 0), "ranks=0"),
    ],
)
def test_impossible_numbers_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_model_cannot_be_spread_over_processes_that_are_not_there():
    with pytest.raises(RuntimeError, match="torchrun"):
        shard_model(torch.nn.Linear(2, 2))
