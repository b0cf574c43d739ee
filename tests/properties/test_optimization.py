"""What must hold of groups, schedule and loop, whatever the model."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import bertnb.optimization
from bertnb.answer_spans import BertForQuestionAnswering
from bertnb.classification import BertForSequenceClassification
from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.masked_lm import BertForMaskedLM
from bertnb.next_sentence import BertForNextSentencePrediction
from bertnb.optimization import (
    SCHEDULES,
    Step,
    accumulate_gradients,
    adamw,
    count_targets,
    linear_warmup_decay,
    original_warmup_decay,
    parameter_groups,
    pick_device,
    pick_precision,
    probe_compile,
    set_learning_rate,
    train,
    warmup_constant,
)
from bertnb.pretraining import BertForPreTraining

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
)
MODELS = [
    BertModel,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
]


class Line(nn.Module):
    """loss = (weight * x + bias)^2; counts its calls and their mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5]]))
        self.bias = nn.Parameter(torch.tensor([0.1]))
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        loss = (self.weight * x + self.bias).square().mean()
        return SimpleNamespace(loss=loss)


def ones(n):
    return [{"x": torch.ones(1, 1)}] * n


def constant(rate=0.1):
    return lambda step: rate


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# groups


@pytest.mark.parametrize("kind", MODELS)
def test_the_groups_hold_every_parameter_exactly_once(kind):
    model = kind(CONFIG)
    groups = parameter_groups(model)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_matrices_and_embeddings_decay_vectors_do_not(kind):
    decayed, plain = parameter_groups(kind(CONFIG), 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])


def test_embeddings_decay_and_norms_and_biases_do_not():
    model = BertForMaskedLM(CONFIG)
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = (
        {name_of[id(p)] for p in group["params"]}
        for group in parameter_groups(model)
    )
    for kind in ("word", "position", "token_type"):
        assert f"bert.embeddings.{kind}_embeddings.weight" in decayed
    assert "bert.encoder.layer.1.attention.query.weight" in decayed
    assert "masked_lm.dense.weight" in decayed
    assert "masked_lm.bias" in plain
    assert "bert.embeddings.LayerNorm.weight" in plain
    assert "bert.encoder.layer.0.attention_norm.weight" in plain
    assert "bert.encoder.layer.0.output_norm.bias" in plain
    assert "bert.encoder.layer.0.attention.query.bias" in plain


def test_decay_shrinks_matrices_and_leaves_biases_alone():
    layer = nn.Linear(3, 2)
    before = weights(layer)
    optimizer = adamw(layer, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(layer.weight, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before[1])


def test_one_percent_decays_unless_told_otherwise():
    assert parameter_groups(nn.Linear(1, 1))[0]["weight_decay"] == 0.01
    assert adamw(nn.Linear(1, 1), 0.2).param_groups[0]["weight_decay"] == 0.2


# schedule


@pytest.mark.equation("11.7")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_rate_rises_to_one_and_falls_to_zero(data):
    total = data.draw(st.integers(2, 50))
    warmup = data.draw(st.integers(0, total - 1))
    rates = [linear_warmup_decay(s, warmup, total) for s in range(total + 3)]
    assert rates[warmup] == 1
    assert rates[total:] == [0, 0, 0]
    assert rates[0] == (0 if warmup else 1)
    up = [b - a for a, b in itertools.pairwise(rates[: warmup + 1])]
    down = [a - b for a, b in itertools.pairwise(rates[warmup : total + 1])]
    assert up == pytest.approx([1 / warmup for _ in up])
    assert down == pytest.approx([1 / (total - warmup) for _ in down])


@pytest.mark.equation("11.10")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_originals_rate_falls_from_step_0_behind_the_warm_up(data):
    total = data.draw(st.integers(2, 50))
    warmup = data.draw(st.integers(0, total - 1))
    rates = [original_warmup_decay(s, warmup, total) for s in range(total + 3)]
    assert rates[:warmup] == [s / warmup for s in range(warmup)]
    assert rates[warmup] == pytest.approx(1 - warmup / total)  # the jump
    assert rates[total:] == [0, 0, 0]
    for s in range(warmup, total):  # below the other by (T - W) / T
        other = linear_warmup_decay(s, warmup, total)
        assert rates[s] == pytest.approx(other * (total - warmup) / total)


def test_the_constant_rate_stays_whatever_the_end():
    assert [warmup_constant(s, 4, 5) for s in (0, 1, 4, 5, 99)] == [
        0,
        0.25,
        1,
        1,
        1,
    ]
    assert warmup_constant(0, 0, 5) == 1


def test_the_schedules_have_names():
    assert SCHEDULES["hugging_face"] is linear_warmup_decay
    assert SCHEDULES["original"] is original_warmup_decay
    assert SCHEDULES["constant"] is warmup_constant
    assert len(SCHEDULES) == 3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("step", "warmup", "total"),
    [(-1, 0, 5), (0, -1, 5), (0, 6, 5), (0, 0, 0), (0, 0, -1)],
)
def test_an_impossible_schedule_is_an_error(name, step, warmup, total):
    message = f"step={step}, warmup_steps={warmup}, total_steps={total}: expec"
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name](step, warmup, total)


# a batch in parts


RAGGED = (5, 1, 3, 2, 0, 0, 6, 1)  # the targets of each row
ORDER = torch.tensor([0, 1, -100, -100, 1, 1, 0, -100])


def masked_rows(counts=RAGGED, seed=0):
    dice = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (len(counts), 6), generator=dice)
    labels = torch.full_like(ids, -100)
    for row, count in enumerate(counts):
        labels[row, :count] = ids[row, :count]
    return {"input_ids": ids, "labels": labels}


def masked_model(kind=BertForMaskedLM):
    torch.manual_seed(0)
    dropout = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    sizes = CONFIG.to_dict() | dict.fromkeys(dropout, 0.0)
    return kind(BertConfig(**sizes))


def joint_model():
    return masked_model(BertForPreTraining)


def answering_model():
    return masked_model(BertForQuestionAnswering)


def answers():
    return {
        "input_ids": masked_rows()["input_ids"],
        "start_positions": torch.tensor([0, 1, 9, 9, 2, 9, 3, 0]),  # 9: cut
        "end_positions": torch.tensor([0, 2, 9, 9, 9, 9, 3, 1]),
    }


class TwoTerms(nn.Module):
    """Two terms with their own targets; each is a mean, or 0 without any."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Linear(4, 7)
        self.order = nn.Linear(4, 2)

    def forward(self, x, labels, next_sentence_label):
        both = {
            "labels": self.mean(self.words(x), labels),
            "next_sentence_label": self.mean(
                self.order(x[:, 0]), next_sentence_label
            ),
        }
        return SimpleNamespace(loss=sum(both.values()), losses=both)

    @staticmethod
    def mean(scores, targets):
        total = nn.functional.cross_entropy(
            scores.flatten(0, -2), targets.flatten(), reduction="sum"
        )
        return total / (targets != -100).sum().clamp(min=1)


def pairs():
    batch = masked_rows()
    dice = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(8, 6, 4, generator=dice),
        "labels": batch["labels"].where(batch["labels"] < 0, 3),
        "next_sentence_label": ORDER,
    }


def loss_and_gradient(model, batch, **options):
    model.zero_grad()
    loss = accumulate_gradients(model, batch, **options)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.equation("11.11")
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (masked_model, masked_rows()),
        (joint_model, masked_rows() | {"next_sentence_label": ORDER}),
        (answering_model, answers()),
        (TwoTerms, pairs()),
    ],
)
def test_the_parts_add_up_to_the_batch(build, batch, parts, measured):
    """Ragged targets: parts of many, of one and of none."""
    model = build()
    whole = model(**batch).loss
    whole.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    loss, gradient = loss_and_gradient(model, batch, parts=parts)
    assert loss.shape == ()
    assert not loss.requires_grad
    measured(loss - whole, 1e-6)
    measured(gradient - expected, 1e-6)
    if parts == 1:
        assert torch.equal(loss, whole)
        assert torch.equal(gradient, expected)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_batch_in_any_parts_is_the_batch(data):
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7))
    parts = data.draw(st.integers(1, len(counts)))
    model, batch = masked_model().double(), masked_rows(counts)
    loss, gradient = loss_and_gradient(model, batch)
    again, same = loss_and_gradient(model, batch, parts=parts)
    assert torch.allclose(loss, again, atol=1e-12)
    assert torch.allclose(gradient, same, atol=1e-12)


def test_a_mean_of_means_is_another_loss():
    model, batch = masked_model(), masked_rows()
    halves = [{k: t[rows] for k, t in batch.items()} for rows in ([0, 1], [2])]
    means = [model(**half).loss for half in halves]
    both = {k: t[:3] for k, t in batch.items()}
    assert abs(sum(means) / 2 - model(**both).loss) > 1e-3


def test_a_batch_without_a_target_has_loss_0_and_no_gradient():
    loss, gradient = loss_and_gradient(
        masked_model(), masked_rows((0, 0, 0)), parts=2
    )
    assert loss == 0
    assert not gradient.any()


def test_numbers_as_targets_are_counted_by_the_row():
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG, num_labels=1).eval()
    ids = masked_rows()["input_ids"]
    batch = {"input_ids": ids, "labels": torch.randn(len(ids))}
    whole, expected = loss_and_gradient(model, batch)
    loss, gradient = loss_and_gradient(model, batch, parts=3)
    assert abs(loss - whole) < 1e-6
    assert (gradient - expected).abs().max() < 1e-6


def test_a_model_without_labels_is_weighted_by_rows():
    batch = {"x": torch.tensor([[1.0], [2.0], [4.0]])}
    whole, expected = loss_and_gradient(Line(), batch)
    loss, gradient = loss_and_gradient(Line(), batch, parts=2)
    assert abs(loss - whole) < 1e-6
    assert (gradient - expected).abs().max() < 1e-6


def test_gradients_are_added_to_those_that_are_there():
    model = Line()
    accumulate_gradients(model, ones(1)[0])
    once = [p.grad.clone() for p in model.parameters()]
    accumulate_gradients(model, ones(1)[0])
    for p, first in zip(model.parameters(), once, strict=True):
        assert torch.allclose(p.grad, 2 * first)


def test_a_number_of_minus_100_is_a_target():
    numbers = torch.tensor([-100.0, 1.0, -100.0])
    assert int(count_targets({"labels": numbers})["labels"]) == 3


def test_targets_are_counted_by_their_argument():
    counts = count_targets(
        {
            "input_ids": torch.tensor([[1, -100, 1, 1]]),
            "labels": torch.tensor([[1, -100, 0], [-100, -100, 7]]),
            "next_sentence_label": torch.tensor([-100]),
            "start_positions": torch.tensor([3, 0]),
            "end_positions": torch.tensor([4, -100, 3]),  # 4: cut off
        }
    )
    assert {name: int(count) for name, count in counts.items()} == {
        "labels": 3,
        "next_sentence_label": 0,
        "start_positions": 2,
        "end_positions": 1,
    }


@pytest.mark.parametrize("parts", [0, -1, 9])
def test_parts_need_rows(parts):
    with pytest.raises(ValueError, match=f"parts={parts}: expected 1 to 8"):
        accumulate_gradients(masked_model(), masked_rows(), parts)


def test_one_loss_of_two_arguments_cannot_be_split():
    class Sum(TwoTerms):
        def forward(self, **batch):
            return SimpleNamespace(loss=super().forward(**batch).loss)

    whole, expected = loss_and_gradient(TwoTerms(), pairs())
    loss, gradient = loss_and_gradient(Sum(), pairs())  # in one part it can
    assert torch.equal(loss, whole)
    assert torch.equal(gradient, expected)
    message = "one loss for labels and next_sentence_label.*parts=1.*`losses`"
    with pytest.raises(ValueError, match=message):
        accumulate_gradients(Sum(), pairs(), 2)


def test_the_loop_takes_the_same_steps_in_parts():
    ends = []
    for parts in (1, 4):
        model, sizes = TwoTerms(), []
        model.words.register_forward_pre_hook(
            lambda module, args, sizes=sizes: sizes.append(len(args[0]))
        )
        steps = list(
            train(model, adamw(model), [pairs()] * 5, constant(), parts=parts)
        )
        assert sizes == [8 // parts] * parts * 5
        ends.append(
            (steps[-1].loss, torch.cat([*map(torch.ravel, weights(model))]))
        )
    assert abs(ends[0][0] - ends[1][0]) < 1e-5
    assert (ends[0][1] - ends[1][1]).abs().max() < 1e-4


# several processes


def split_rows(batch, *sizes):
    pieces = {k: t.split(sizes) for k, t in batch.items()}
    return [{k: p[i] for k, p in pieces.items()} for i in range(len(sizes))]


@pytest.mark.equation("11.12")
@pytest.mark.parametrize("parts", [1, 2])
def test_the_mean_over_ranks_is_the_gradient_of_all(
    monkeypatch, parts, measured
):
    """Three ranks, one after the other; their counts are known beforehand."""
    model = TwoTerms()
    whole, expected = loss_and_gradient(model, pairs())
    ranks = split_rows(pairs(), 4, 2, 2)
    counts = [
        torch.tensor([*count_targets(rank).values(), len(rank["x"])])
        for rank in ranks
    ]
    sums, shares = sum(counts), []

    def all_reduce(tensor):
        if tensor.dtype == torch.int64:
            assert torch.equal(tensor, counts[len(shares)])
            tensor.copy_(sums)
        else:
            shares.append(tensor.clone())

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    gradients = [loss_and_gradient(model, r, parts=parts)[1] for r in ranks]
    measured(sum(shares) - whole, 1e-6)
    measured(sum(gradients) / 3 - expected, 1e-6)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [1, 4])
def test_under_data_parallel_gradients_are_exchanged_once(
    monkeypatch, one_process, parts
):
    whole, expected = loss_and_gradient(TwoTerms(), pairs())
    model = DistributedDataParallel(TwoTerms())
    held, exchanged = [], []
    no_sync = model.no_sync
    monkeypatch.setattr(
        model, "no_sync", lambda: held.append(1) or no_sync(), raising=False
    )

    def exchange(state, bucket):
        exchanged.append(1)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, exchange)
    loss, gradient = loss_and_gradient(model, pairs(), parts=parts)
    assert abs(loss - whole) < 1e-6
    assert (gradient - expected).abs().max() < 1e-6
    assert len(held) == parts - 1
    assert len(exchanged) == 1


def test_a_compiled_wrapper_passes_no_sync_on(one_process):
    model = DistributedDataParallel(TwoTerms())
    assert torch.compile(model).no_sync == model.no_sync


# loop


def test_the_loop_reports_each_step():
    model = Line()
    reports = list(
        train(model, adamw(model), ones(3), lambda s: 0.01 * s, first_step=4)
    )
    assert [r.step for r in reports] == [4, 5, 6]
    assert [r.learning_rate for r in reports] == [0.04, 0.05, 0.06]
    first = reports[0]
    assert float(first.loss) == pytest.approx(0.36)
    assert float(first.grad_norm) == pytest.approx(1.2 * 2**0.5)  # unclipped
    skipped, failed = torch.tensor(0), torch.tensor(False)
    assert first == Step(4, first.loss, 0.04, first.grad_norm, skipped, failed)
    for tensor in (first.loss, first.grad_norm):
        assert tensor.shape == ()
        assert not tensor.requires_grad
    with pytest.raises(AttributeError):
        reports[0].loss = 0.0


def test_the_first_step_has_number_0_unless_told_otherwise():
    model = Line()
    (report,) = train(model, adamw(model), ones(1), lambda s: 0.1 + s)
    assert (report.step, report.learning_rate) == (0, 0.1)


def test_the_rate_is_set_before_the_step_in_every_group():
    model = Line()
    before = weights(model)
    optimizer = adamw(model, weight_decay=0.0)
    (_,) = train(model, optimizer, ones(1), constant(0.25))
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(p, old - 0.25, atol=1e-5)  # Adam's first step
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]


def test_the_loop_takes_a_batch_only_when_asked():
    model, taken = Line(), []

    def batches():
        for i in range(5):
            taken.append(i)
            yield ones(1)[0]

    steps = train(model, adamw(model), batches(), constant())
    assert taken == []
    next(steps)
    assert taken == [0]
    after_one = weights(model)
    next(steps)
    assert taken == [0, 1]
    assert not any(map(torch.equal, after_one, weights(model)))


def test_the_model_trains_in_training_mode():
    model = Line().eval()
    list(train(model, adamw(model), ones(2), constant()))
    assert model.modes == [True, True]


def test_gradients_do_not_pile_up():
    """Neither over the steps, nor from a backward before the loop."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    model(torch.full((1, 1), 7.0)).loss.backward()
    norms = [
        float(r.grad_norm)
        for r in train(model, optimizer, ones(3), constant(0.0))
    ]
    assert norms == pytest.approx([1.2 * 2**0.5] * 3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.equation("11.8")
def test_the_step_is_shortened_to_the_bound_and_not_stretched(measured):
    def moved(bound):
        model = Line()
        before = torch.cat([p.flatten() for p in weights(model)])
        sgd = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
        (_,) = train(model, sgd, ones(1), constant(1.0), 0, bound)
        return torch.cat([p.flatten() for p in weights(model)]) - before

    full = 1.2 * 2**0.5
    measured(moved(0.5).norm() - 0.5, 1e-5)
    measured(moved(100.0).norm() - full, 1e-5)
    shortened = moved(0.5) / moved(0.5).norm()
    measured(shortened - moved(100.0) / full, 1e-5)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    config = BertConfig(**CONFIG.to_dict() | changes)
    return BertForNextSentencePrediction(config)


def examples(first, last):
    for step in range(first, last):
        dice = torch.Generator().manual_seed(step)
        ids = torch.randint(5, 20, (8, 6), generator=dice)
        yield {"input_ids": ids, "labels": (ids[:, 1] >= 12).long()}


def test_a_run_that_goes_on_equals_the_uninterrupted_one_bit_for_bit():
    def schedule(step):
        return 3e-3 * linear_warmup_decay(step + 1, 4, 9)

    whole = tiny()
    optimizer = adamw(whole)
    torch.manual_seed(7)  # of dropout
    uncut = list(train(whole, optimizer, examples(0, 8), schedule))

    half = tiny()
    first = adamw(half)
    torch.manual_seed(7)
    reports = list(train(half, first, examples(0, 5), schedule))
    dropout = torch.get_rng_state()
    rest = tiny(seed=3)
    second = adamw(rest)
    rest.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    torch.set_rng_state(dropout)
    reports += train(rest, second, examples(5, 8), schedule, first_step=5)
    assert reports == uncut
    for p, q in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("x", "what"), [(1e30, "loss is inf"), (float("nan"), "loss is nan")]
)
def test_a_loss_that_is_not_finite_stops_before_the_step(x, what):
    model = Line()
    optimizer = adamw(model)
    steps = train(
        model, optimizer, [*ones(1), {"x": torch.tensor([[x]])}], constant(), 3
    )
    next(steps)
    before = weights(model)
    state = {k: v.clone() for k, v in optimizer.state[model.bias].items()}
    with pytest.raises(
        FloatingPointError, match=rf"{what} at step 4: .*warm-up"
    ):
        next(steps)
    assert all(map(torch.equal, before, weights(model)))
    after = optimizer.state[model.bias]
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    class Edge(Line):
        def forward(self, x):  # finite, with an infinite slope at 0
            return SimpleNamespace(loss=(self.weight * x).abs().sqrt().sum())

    model = Edge()
    before = weights(model)
    steps = train(model, adamw(model), [{"x": torch.zeros(1, 1)}], constant())
    with pytest.raises(FloatingPointError, match="norm of the gradient is nan"):
        next(steps)
    assert all(map(torch.equal, before, weights(model)))


def bad_at(step, count, x=float("nan")):
    batches = ones(count)
    batches[step] = {"x": torch.tensor([[x]])}
    return batches


def state_of(optimizer):
    return [
        value.clone()
        for state in optimizer.state.values()
        for value in state.values()
    ]


@pytest.mark.parametrize("count", [8, 40])
def test_where_nobody_looks_nothing_moves_after_a_bad_step(monkeypatch, count):
    """As on a GPU: the error comes up to 16 steps later, or at the end."""
    monkeypatch.setattr(bertnb.optimization, "_patience", lambda device: 16)
    model = Line()
    optimizer = adamw(model)
    steps = train(model, optimizer, bad_at(3, count), constant(), 100)
    seen = [next(steps) for _ in range(3)]
    kept = [*weights(model), *state_of(optimizer)]
    with pytest.raises(FloatingPointError, match="loss is nan at step 103"):
        seen.extend(steps)
    assert len(seen) == min(count, 15)
    assert all(map(torch.equal, kept, [*weights(model), *state_of(optimizer)]))
    assert [bool(r.failed) for r in seen[:5]] == [False] * 3 + [True] * 2
    assert [int(r.skipped) for r in seen[:6]] == [0, 0, 0, 1, 2, 3]
    assert math.isfinite(seen[4].loss)  # the later ones are looked at, too


@pytest.mark.parametrize("corrected", [True, False])
def test_a_skipped_step_leaves_no_trace(corrected):
    ends = []
    for batches in (bad_at(2, 6), ones(5)):
        model = Line()
        optimizer = adamw(model, bias_correction=corrected)
        steps = list(
            train(model, optimizer, batches, constant(), on_nonfinite="skip")
        )
        ends.append([*weights(model), *state_of(optimizer)])
        if len(batches) == 6:
            assert [int(r.skipped) for r in steps] == [0, 0, 1, 1, 1, 1]
            assert not any(r.failed for r in steps)
            assert math.isnan(steps[2].loss)
    assert all(map(torch.equal, *ends))


def test_the_optimiser_is_left_without_the_flag():
    model = Line()
    optimizer = adamw(model)
    with pytest.raises(FloatingPointError):
        list(train(model, optimizer, bad_at(1, 2), constant()))
    assert not hasattr(optimizer, "found_inf")


class Reads(TorchDispatchMode):
    """Counts how often a number goes from a tensor to Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [False, True])
def test_the_loop_reads_one_flag_in_sixteen_steps(monkeypatch, half):
    """A read would wait for a GPU."""
    monkeypatch.setattr(bertnb.optimization, "_patience", lambda device: 16)
    model = TwoTerms()
    options = {}
    if half:
        options["precision"] = torch.float16
        options["scaler"] = torch.amp.GradScaler("cpu")
    steps = train(
        model, adamw(model), [pairs()] * 33, constant(), parts=2, **options
    )
    with Reads() as reads:
        for _ in range(32):
            next(steps)
    assert reads.count == 2
    with Reads() as reads:
        float(next(steps).loss)
    assert reads.count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_the_loop_does_not_wait_for_the_gpu(mode):
    model = TwoTerms().cuda()
    batch = {name: tensor.cuda() for name, tensor in pairs().items()}
    optimizer = adamw(model)
    steps = train(model, optimizer, [batch] * 14, constant(), on_nonfinite=mode)
    next(steps)  # whatever is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        reports = [next(steps) for _ in range(12)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reports[-1].loss < reports[0].loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_stops_where_a_cpu_stops():
    model = Line().cuda()
    optimizer = adamw(model)
    steps = train(model, optimizer, bad_at(3, 40), constant())
    for _ in range(3):
        next(steps)
    kept = [*weights(model), *state_of(optimizer)]
    with pytest.raises(FloatingPointError, match="loss is nan at step 3"):
        list(steps)
    assert all(map(torch.equal, kept, [*weights(model), *state_of(optimizer)]))


def test_an_optimiser_that_cannot_hold_back_a_step_is_an_error():
    model = Line()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match=r"optimizer is a SGD.*fused=True"):
        next(train(model, sgd, ones(1), constant()))


def test_there_are_two_ways_to_treat_a_bad_step():
    model = Line()
    steps = train(
        model, adamw(model), ones(1), constant(), on_nonfinite="ignore"
    )
    with pytest.raises(ValueError, match=r"on_nonfinite='ignore'.*'stop' or"):
        next(steps)


def test_the_rate_is_that_of_every_group():
    optimizer = adamw(Line())
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_the_originals_adam_goes_on_bit_for_bit():
    def run(model, optimizer, batches):
        return list(train(model, optimizer, batches, constant(1e-3)))

    whole = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    uncut = run(whole, adamw(whole, bias_correction=False), examples(0, 6))
    half = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    first = adamw(half, bias_correction=False)
    run(half, first, examples(0, 3))
    rest = tiny(3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    second = adamw(rest, bias_correction=False)
    rest.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    reports = run(rest, second, examples(3, 6))
    assert [r.loss for r in reports] == [r.loss for r in uncut[3:]]
    assert all(map(torch.equal, weights(whole), weights(rest)))


# float16


def half_steps(model, batches, scaler, **options):
    return train(
        model,
        adamw(model),
        batches,
        constant(1e-3),
        precision=torch.float16,
        scaler=scaler,
        **options,
    )


@pytest.mark.equation("11.13")
def test_what_float16_loses_the_factor_saves(measured):
    """The gradient of a small loss is 0 in float16, unless it is scaled."""

    class Faint(TwoTerms):
        def forward(self, **batch):
            both = super().forward(**batch).losses
            both = {name: 1e-8 * loss for name, loss in both.items()}
            return SimpleNamespace(loss=sum(both.values()), losses=both)

    model = Faint()
    plain, exact = loss_and_gradient(model, pairs())
    _, lost = loss_and_gradient(model, pairs(), precision=torch.float16)
    loss, scaled = loss_and_gradient(
        model,
        pairs(),
        parts=2,
        precision=torch.float16,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**20),
    )
    assert not lost.any()
    assert abs(loss - plain) < 1e-3 * plain  # the loss is not scaled
    measured((scaled / 2**20 - exact).norm() / exact.norm(), 2e-3)


def test_a_power_of_two_costs_no_digit():
    model = masked_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = loss_and_gradient(model, masked_rows())[1]
    scaled = loss_and_gradient(model, masked_rows(), scaler=scaler)[1]
    assert torch.equal(scaled / 2**10, plain)


@pytest.mark.equation("11.14")
def test_the_factor_halves_on_overflow_and_doubles_after_good_steps():
    model = masked_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=5)
    power, good, skipped = 30, 0, 0
    for report in half_steps(model, [masked_rows()] * 40, scaler):
        held = int(report.skipped) > skipped
        assert held == (not math.isfinite(report.grad_norm))
        skipped, good = int(report.skipped), 0 if held else good + 1
        power += -1 if held else good % 5 == 0
        assert scaler.get_scale() == 2.0**power
        assert not report.failed
    assert 5 < skipped < 20
    assert good or power < 30


def test_an_overflow_leaves_weights_and_averages_alone():
    model = masked_model()
    optimizer = adamw(model)
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    steps = train(
        model,
        optimizer,
        [masked_rows()] * 2,
        constant(),
        precision=torch.float16,
        scaler=scaler,
    )
    for _ in steps:
        assert all(map(torch.equal, before, weights(model)))
    assert not any(value.any() for value in state_of(optimizer))


def test_gradients_are_divided_before_they_are_clipped():
    norms = []
    for scale in (1.0, 2.0**10):
        model = masked_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        steps = train(
            model,
            adamw(model),
            [masked_rows()] * 3,
            constant(1e-3),
            max_grad_norm=0.7,
            scaler=scaler,
        )
        norms.append([float(report.grad_norm) for report in steps])
        norms[-1] += [p.detach().norm().item() for p in model.parameters()]
    assert norms[0] == norms[1]


def test_float16_trains_as_float32_does():
    losses = []
    for half in (False, True):
        model = masked_model()
        batches = [masked_rows()] * 30
        steps = (
            half_steps(model, batches, torch.amp.GradScaler("cpu"))
            if half
            else train(model, adamw(model), batches, constant(1e-3))
        )
        losses.append([float(report.loss) for report in steps])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0][-1] < losses[0][0] - 0.2
    assert losses[1] == pytest.approx(losses[0], abs=0.01)


def test_float16_without_a_scaler_is_an_error():
    model = Line()
    steps = train(
        model, adamw(model), ones(1), constant(), precision=torch.float16
    )
    with pytest.raises(ValueError, match=r"float16 without a scaler.*GradSc"):
        next(steps)


def test_a_loss_that_is_not_finite_is_no_overflow():
    steps = half_steps(Line(), bad_at(1, 3), torch.amp.GradScaler("cpu"))
    next(steps)
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        next(steps)


def test_a_gradient_that_no_factor_saves_stops_the_run():
    class Edge(Line):
        def forward(self, x):  # an infinite slope at 0
            return SimpleNamespace(loss=(self.weight * x).abs().sqrt().sum())

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    batches = [{"x": torch.zeros(1, 1)}] * 9
    seen = []
    with pytest.raises(FloatingPointError, match="gradient is nan at step 2"):
        seen.extend(half_steps(Edge(), batches, scaler))
    assert [report.step for report in seen] == [
        0,
        1,
    ]  # with the factors 4 and 2, then 1


# compiling


@pytest.fixture
def quick(monkeypatch):
    """Compile without the compiler: the graph alone."""
    whole = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", whole)
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_probe_compiles_and_leaves_no_trace(quick, precision):
    model = tiny().eval()
    (batch,) = examples(0, 1)
    before, dice = weights(model), torch.get_rng_state()
    cpu = torch.device("cpu")
    compiled = probe_compile(model, batch, cpu, precision)
    assert compiled is not model
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, before, weights(model)))
    assert torch.equal(dice, torch.get_rng_state())
    with torch._dynamo.config.patch(error_on_recompile=True):
        list(
            train(
                compiled,
                adamw(model),
                examples(0, 2),
                constant(1e-3),
                precision=precision,
            )
        )
    assert not any(map(torch.equal, before, weights(model)))


def test_a_compiled_model_trains_as_the_plain_one(quick):
    ends = []
    for compiling in (False, True):
        model = tiny()
        wrapped = model
        if compiling:
            (batch,) = examples(0, 1)
            wrapped = probe_compile(model, batch, torch.device("cpu"))
        torch.manual_seed(7)  # of dropout
        steps = train(wrapped, adamw(model), examples(0, 3), constant(1e-3))
        ends.append([float(report.loss) for report in steps])
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_what_does_not_compile_runs_as_it_is(quick):
    class Curious(Line):
        def forward(self, x):
            if x.sum() > 0:  # a graph does not know
                x = 2 * x
            return super().forward(x)

    model = Curious().eval()
    with pytest.warns(UserWarning, match="does not work here.*: Unsupported"):
        same = probe_compile(model, ones(1)[0], torch.device("cpu"))
    assert same is model
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_loss_is_an_error_that_lists_the_batch():
    model = tiny()
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    steps = train(model, adamw(model), batches, constant())
    with pytest.raises(
        ValueError, match=r"no loss: the batch has input_ids; expected targets"
    ):
        next(steps)


def test_the_gradients_of_a_table_used_twice_add():
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG).double().eval()
    table = model.bert.embeddings.word_embeddings.weight
    ids, labels = torch.randint(5, 20, (2, 3, 7))

    def gradient(hidden_free, table_free):
        hidden = model.bert(ids).last_hidden_state
        hidden = hidden if hidden_free else hidden.detach()
        used = table if table_free else table.detach()
        logits = model.masked_lm(hidden, used).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels.flatten())
        return torch.autograd.grad(loss, table)[0]

    as_input, as_output = gradient(True, False), gradient(False, True)
    assert as_input.any()
    assert as_output.any()
    model(ids, labels=labels).loss.backward()
    assert torch.allclose(table.grad, as_input + as_output, atol=1e-7)


# precision and device


def test_bfloat16_multiplies_only_and_weights_and_state_stay_float32():
    seen = []
    model = tiny()
    layer = model.bert.encoder.layer[0].feed_forward.intermediate
    layer.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    optimizer = adamw(model)
    (rough,) = train(
        model, optimizer, examples(0, 1), constant(), precision=torch.bfloat16
    )
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = (v for s in optimizer.state.values() for v in s.values())
    assert {v.dtype for v in state} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")

    seen.clear()
    exact_model = tiny()
    (exact,) = train(
        exact_model, adamw(exact_model), examples(0, 1), constant()
    )
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.02)


def test_float32_is_the_default_precision():
    model = tiny()
    seen = []
    model.next_sentence.register_forward_hook(
        lambda m, a, out: seen.append(out.dtype)
    )
    list(train(model, adamw(model), examples(0, 1), constant()))
    assert seen == [torch.float32]


def test_the_device_is_cuda_where_there_is_one_or_the_one_that_is_named():
    found = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device().type == found
    assert pick_device("cpu").type == "cpu"
    assert pick_device("meta").type == "meta"


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_the_device_follows_the_machine(monkeypatch, there, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device().type == name


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_bfloat16_on_cuda_begins_with_sm80(monkeypatch, capability, dtype):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability
    )
    assert pick_precision(torch.device("cuda")) == dtype


@pytest.mark.parametrize("avx", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_on_a_cpu_needs_its_instructions(monkeypatch, avx, amx):
    for name, there in (
        ("_is_avx512_bf16_supported", avx),
        ("_is_amx_tile_supported", amx),
    ):
        monkeypatch.setattr(torch.cpu, name, lambda t=there: t, raising=False)
    expected = torch.bfloat16 if avx or amx else torch.float32
    assert pick_precision(torch.device("cpu")) == expected
    assert pick_precision(torch.device("mps")) == torch.float32


def test_a_torch_without_the_probes_means_float32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert pick_precision(torch.device("cpu")) == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_batches_go_to_the_models_device():
    model = tiny().cuda()
    (report,) = train(model, adamw(model), examples(0, 1), constant())
    assert report.loss > 0
