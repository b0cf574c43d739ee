"""The counts of chapter 13 against what PyTorch counts and moves."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bertnb import (
    BertConfig,
    BertForPreTraining,
    PretrainingData,
    Product,
    WordPieceTokenizer,
    adamw,
    book_model,
    elementwise_numbers,
    forward_products,
    model_flops_utilization,
    roofline,
    step_floor,
    training_flops,
)

TOY = BertConfig(
    vocab_size=90,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=40,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def batch(
    config: BertConfig, rows: int, length: int, predictions: int, pairs: int
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    words = torch.randint(config.vocab_size, (rows, predictions))
    found = {
        "input_ids": torch.randint(config.vocab_size, (rows, length)),
        "masked_positions": torch.rand(rows, length).topk(predictions).indices,
        "labels": words,
        "next_sentence_label": torch.ones(rows).long(),
    }
    if pairs > 1:
        found["attention_mask"] = torch.ones(rows, length, length).bool()
        found["cls_positions"] = torch.arange(pairs).repeat(rows, 1)
        found["next_sentence_label"] = torch.ones(rows, pairs).long()
    return found


def counted(config: BertConfig, given: dict[str, Any]) -> tuple[int, int]:
    """Return the operations of the forward, and of the forward and backward
    pass, as PyTorch counts them."""
    model = BertForPreTraining(config)
    found = []
    for backward in (False, True):
        plain = sdpa_kernel(SDPBackend.MATH)
        with plain, FlopCounterMode(display=False) as counter:
            loss = model(**given).loss
            if backward:
                loss.backward()
        found.append(counter.get_total_flops())
    return found[0], found[1]


@pytest.mark.equation("13.1", "13.3", "13.4")
@pytest.mark.parametrize(
    ("rows", "length", "predictions", "pairs"),
    [(1, 20, 3, 1), (3, 16, 2, 1), (2, 32, 5, 3)],
)
def test_operations_are_those_of_pytorchs_counter(
    rows: int, length: int, predictions: int, pairs: int, measured: Any
) -> None:
    given = batch(TOY, rows, length, predictions, pairs)
    last = predictions + pairs
    for queries, asked in ((last, {}), (None, {"output_hidden_states": True})):
        shape = (length, predictions, pairs, queries, rows)
        forward, both = counted(TOY, given | asked)
        products = forward_products(TOY, *shape)
        measured(sum(p.flops for p in products) - forward, 0)
        measured(training_flops(TOY, *shape) - both, 0)


class Traffic(TorchDispatchMode):
    """Add up the numbers that each operation reads and writes, by its name:
    tensors of at least `least` numbers, and those of lists."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        in_place = func._schema.is_mutable
        before = [t.clone() for t in given] if in_place else []
        out = func(*args, **(kwargs or {}))
        written = [
            tensor
            for tensor, old in zip(given, before, strict=in_place)
            if not torch.equal(tensor, old)
        ]
        name = func._overloadpacket.__name__
        read = args
        if name == "nll_loss_backward":
            read = ()  # it looks at the shape only
        for tensor in tree_leaves((read, written or out)):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.moved[name] += tensor.numel() * (
                    tensor.numel() >= self.least
                )
        return out


KINDS = {
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "native_layer_norm": "norms",
    "add": "sums",
    "gelu": "activation",
    "sum": "biases",
}


@pytest.mark.equation("13.6")
@pytest.mark.parametrize(("rows", "length"), [(2, 16), (3, 11)])
def test_a_layer_moves_what_is_watched(
    rows: int, length: int, measured: Any
) -> None:
    config = replace(TOY, hidden_size=64, intermediate_size=160)
    config = replace(config, num_attention_heads=4)

    def moved(layers: int) -> Counter[str]:
        here = replace(config, num_hidden_layers=layers)
        encoder = BertForPreTraining(here).bert.encoder
        states = torch.randn(rows, length, 64, requires_grad=True)
        with Traffic(states.numel()) as traffic:
            encoder(states).last_hidden_state.mean().backward()
        found: Counter[str] = Counter()
        for name, count in traffic.moved.items():
            name = name.removesuffix("_backward")
            if name in KINDS:
                found[KINDS[name]] += count
        return found

    one = elementwise_numbers(
        replace(config, num_hidden_layers=1), length, 0, 0, rows
    )
    watched = moved(3) - moved(2)
    assert set(watched) == set(KINDS.values())
    for kind, count in watched.items():
        measured(count - one[kind], 0)


@pytest.mark.equation("13.7")
def test_the_rest_of_a_step_moves_what_is_watched(measured: Any) -> None:
    rows, length, predictions = 2, 16, 3
    # so many words that their scores and their table stand out
    config = replace(TOY, vocab_size=5000)
    model = BertForPreTraining(config)
    number = sum(p.numel() for p in model.parameters())
    given = batch(config, rows, length, predictions, 1)
    scores, table = rows * predictions * 5000, 5000 * config.hidden_size
    expected = elementwise_numbers(config, length, predictions, number, rows)

    with Traffic(scores) as traffic:
        model(**given).loss.backward()
    moved = traffic.moved
    loss = (
        moved["_log_softmax"]
        + moved["nll_loss_backward"]
        + moved["_log_softmax_backward_data"]
        + moved["sum"]
    )
    measured(loss - expected["loss"], 0)
    # the gradient that is written; the sum of both
    measured(moved["embedding_dense_backward"] - table, 0)
    measured(moved["add"] - 3 * table, 0)
    measured(expected["table"] - 4 * table, 0)

    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()  # its means are there
    with Traffic(0) as traffic:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tensors = len(list(model.parameters()))
    found = (
        traffic.moved["_foreach_norm"]
        - tensors  # the norms
        + traffic.moved["_foreach_mul_"]
        - 1  # the factor
        + traffic.moved["_fused_adamw_"]
        - tensors  # the steps
    )
    measured(found - expected["optimiser"], 0)


@pytest.mark.equation("13.2")
def test_a_product_reads_both_and_writes_one(measured: Any) -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 11)
    with Traffic(0) as traffic:
        torch.mm(a, b)
    measured(Product("", 1, 5, 7, 11).numbers - traffic.moved["mm"], 0)
    assert Product("", 3, 5, 7, 11).numbers == 3 * traffic.moved["mm"]


@pytest.mark.equation("13.5")
def test_utilization_is_the_share_of_the_peak(measured: Any) -> None:
    flops = training_flops(BertConfig(), 128, 19, rows=512)
    share = model_flops_utilization(flops, 0.1, 7e14)
    measured(share - flops / 0.1 / 7e14, 1e-12)
    assert model_flops_utilization(7e14, 2.0, 7e14) == 0.5
    for seconds, peak in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="expected positive"):
            model_flops_utilization(1.0, seconds, peak)


@pytest.mark.equation("13.8")
@given(st.floats(1e-3, 1e3), st.floats(1e9, 1e15), st.floats(1e8, 1e13))
@settings(deadline=None)
def test_the_roof_is_the_lower_of_two_lines(
    intensity: float, peak: float, beta: float
) -> None:
    roof = roofline(intensity, peak, beta)
    assert roof <= peak
    assert roof <= beta * intensity * (1 + 1e-12)
    assert roof == peak or roof == beta * intensity
    corner = peak / beta
    assert roofline(2 * corner, peak, beta) == peak
    assert roofline(corner / 2, peak, beta) < peak


def test_a_roof_of_nothing_is_refused() -> None:
    for numbers in ((0, 1, 1), (1, 0, 1), (1, 1, -1)):
        with pytest.raises(ValueError, match="expected positive"):
            roofline(*numbers)


@pytest.mark.equation("13.9")
def test_the_floor_is_the_sum_of_its_parts(measured: Any) -> None:
    """With loops, part by part; each product is limited on its own."""
    config, rows, length, predictions = BertConfig(), 4, 128, 19
    products = forward_products(config, length, predictions, 1, 20, rows)
    numbers = elementwise_numbers(config, length, predictions, 1000, rows)
    for peak, beta, width in ((1e11, 1e10, 4), (8e14, 3e12, 2), (1e20, 1e9, 4)):
        expected = 0.0
        for p in products:
            computing = 2 * p.count * p.m * p.k * p.n / peak
            moving = p.count * (p.m * p.k + p.k * p.n + p.m * p.n) * width
            if p.part == "attention":
                moving = 0
            expected += 3 * max(computing, moving / beta)
        for count in numbers.values():
            expected += count * width / beta
        floor = step_floor(products, numbers, peak, beta, width)
        measured(sum(floor.values()) / expected - 1, 1e-12)
        assert set(floor) == {p.part for p in products} | set(numbers)


@pytest.mark.parametrize("pack", [1, 3])
def test_batches_of_any_step_and_share_share_one_graph(pack: int) -> None:
    """Their shapes never change, so nothing is compiled a second time."""
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    rng = random.Random(0)
    documents = [
        [
            rng.choices(range(5, 80), k=rng.randint(1, 12))
            for _ in range(rng.randint(2, 20))
        ]
        for _ in range(12)
    ]
    data = PretrainingData(
        documents,
        tokenizer,
        length=32,
        batch_size=4,
        mlm_probability=0.4,
        short_seq_prob=0.5,
        pack=pack,
    )
    config = replace(TOY, vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    model = BertForPreTraining(config)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        model, backend=counter, fullgraph=True, dynamic=False
    )
    epochs = 2 * data.batches_per_epoch
    for step in range(0, epochs, epochs // 6):
        share = 0.15 + 0.25 * step / epochs
        assert compiled(**data.batch(step, mlm_probability=share)).loss > 0
    assert counter.frame_count == 1


def test_the_sums_of_the_formulas() -> None:
    """(13.3), (13.6) and (13.7) as written, in numbers of base."""
    c, length, words = BertConfig(), 128, 19
    h, f, n, v = 768, 3072, 12, 30522
    forward = n * (8 * length * h**2 + 4 * length**2 * h + 4 * length * h * f)
    heads = 2 * words * (h**2 + h * v) + 2 * (h**2 + 2 * h)
    assert training_flops(c, length, words) == 3 * (forward + heads)
    numbers = elementwise_numbers(c, length, words, 110_000_000, rows=3)
    layers = 3 * length * n * (45 * h + 6 * f)
    rest = 7 * 3 * words * v + 4 * v * h + 10 * 110_000_000
    assert sum(numbers.values()) == layers + rest
