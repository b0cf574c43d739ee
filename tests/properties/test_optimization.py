"""What must hold of groups, schedule and loop, whatever the model."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bertnb.classification import BertForSequenceClassification
from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.masked_lm import BertForMaskedLM
from bertnb.next_sentence import BertForNextSentencePrediction
from bertnb.optimization import (
    Step,
    adamw,
    linear_warmup_decay,
    parameter_groups,
    pick_device,
    pick_precision,
    train,
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


@pytest.mark.equation("11.8")
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


@pytest.mark.parametrize(
    ("step", "warmup", "total"),
    [(-1, 0, 5), (0, -1, 5), (0, 6, 5), (0, 0, 0), (0, 0, -1)],
)
def test_an_impossible_schedule_is_an_error(step, warmup, total):
    message = f"step={step}, warmup_steps={warmup}, total_steps={total}: expec"
    with pytest.raises(ValueError, match=message):
        linear_warmup_decay(step, warmup, total)


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


@pytest.mark.equation("11.10")
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
