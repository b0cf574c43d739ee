"""What must hold of batches, answers and runs, whatever the task."""

import json
import random
import shutil
import warnings
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import config_for, tokenizer_of

import bertnb.fine_tuning
from bertnb import (
    Answer,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    FineTuneConfig,
    FineTuningRun,
    PretrainedModel,
    QuestionAnswering,
    QuestionExample,
    Row,
    SequenceClassification,
    SequenceRegression,
    Shuffled,
    TextExample,
    TokenClassification,
    TokenExample,
    evaluate,
    fine_tune,
    fine_tune_seeds,
    load_for_task,
    pad_rows,
    predict,
)

WORDS = "good bad fine film was the".split()
TOKENIZER = tokenizer_of(" ".join([*WORDS, "##s"]))
TINY = config_for(TOKENIZER, num_hidden_layers=2)
STILL = replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def texts(count, seed=0):
    chance = random.Random(seed)
    lengths = [chance.randint(1, 8) for _ in range(count)]
    words = WORDS
    return [" ".join(chance.choices(words, k=length)) for length in lengths]


EXAMPLES = [TextExample(t, "+" if "good" in t else "-") for t in texts(30)]
TASK = SequenceClassification(EXAMPLES[:20], EXAMPLES[20:])
CONFIG = FineTuneConfig(
    epochs=1,
    batch_size=8,
    learning_rate=1e-2,
    max_length=12,
    min_steps=12,
    eval_every=3,
    device="cpu",
    precision="float32",
)


def new(task=TASK, config=TINY, seed=0):
    torch.manual_seed(seed)
    return task.model_class(config, **task.head_arguments())


def tune(task=TASK, config=CONFIG, model=None):
    model = new(task) if model is None else model
    return fine_tune(task, model, TOKENIZER, config, progress=False)


def same(first, second):
    """Have two models the same weights, bit for bit?"""
    one, two = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------- batches


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    size=st.integers(1, 9),
    group=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_each_row_once_an_epoch_in_an_order_of_seed_and_step(
    lengths, size, group, seed
):
    rows = [Row(i, [7 + i] * n, [0] * n) for i, n in enumerate(lengths)]
    first = Shuffled(rows, size, 0, seed, group)
    again = Shuffled(rows, size, 0, seed, group)
    steps = list(range(2 * first.per_epoch))
    forward = [first.batch(step) for step in steps]
    for step in random.Random(seed).sample(steps, len(steps)):
        batch = again.batch(step)  # in any order of asking
        assert batch.keys() == forward[step].keys()
        assert all(torch.equal(batch[k], forward[step][k]) for k in batch)
    for epoch in (forward[: first.per_epoch], forward[first.per_epoch :]):
        seen = [i - 7 for b in epoch for i in b["input_ids"][:, 0].tolist()]
        assert sorted(seen) == list(range(len(rows)))
        sizes = sorted(len(b["input_ids"]) for b in epoch)
        assert sizes[1:] == [size] * (len(sizes) - 1)  # one may be smaller


def test_seeds_and_epochs_have_their_own_order():
    rows = [Row(i, [7 + i], [0]) for i in range(40)]

    def order(seed, steps):
        batches = Shuffled(rows, 8, 0, seed)
        return [batches.batch(s)["input_ids"].tolist() for s in steps]

    orders = [order(seed, range(k, k + 5)) for seed in (0, 1) for k in (0, 5)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_a_group_of_batches_is_sorted_and_its_batches_are_shuffled():
    chance = random.Random(3)
    lengths = [chance.randint(1, 60) for _ in range(64)]
    rows = [Row(i, [1] * n, [0] * n) for i, n in enumerate(lengths)]

    def widths(group):
        batches = Shuffled(rows, 8, 0, group=group)
        return [batches.batch(s)["input_ids"].shape[1] for s in range(8)]

    assert sum(widths(8)) < sum(widths(1)) * 0.7  # less padding
    assert sum(widths(8)) == sum(sorted(lengths)[7::8])
    assert widths(8) != sorted(widths(8), reverse=True)


def test_an_epoch_has_at_least_four_groups():
    def group(rows, size):
        return Shuffled([Row(0, [7], [0])] * rows, size, 0).group

    # what `transformers` does by length, too: a set's quarter, at most 50
    assert group(1315, 16) == 20
    assert group(1316 * 16, 16) == 50
    assert group(3, 16) == group(127, 16) == 1
    assert group(128, 16) == 2


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_the_mask_is_left_out_only_where_nothing_is_padded(lengths):
    rows = [
        Row(i, [7] * n, [1] * n, {"labels": [2] * n, "start_positions": i})
        for i, n in enumerate(lengths)
    ]
    batch = pad_rows(rows, 3)
    width = max(lengths)
    padded = [[k >= n for k in range(width)] for n in lengths]
    assert ("attention_mask" in batch) == (len(set(lengths)) > 1)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    assert (~mask.bool()).tolist() == padded
    for name, inside, outside in (
        ("input_ids", 7, 3),
        ("token_type_ids", 1, 0),
        ("labels", 2, -100),
    ):
        assert batch[name].tolist() == [
            [outside if p else inside for p in row] for row in padded
        ]
    assert batch["start_positions"].tolist() == list(range(len(rows)))
    assert set(pad_rows(rows, 3, targets=False)) <= {
        "input_ids",
        "token_type_ids",
        "attention_mask",
    }


# ---------------------------------------------------------------- answers

WORDED = [TokenExample(tuple(e.text.split())) for e in EXAMPLES]
ASKED = [QuestionExample("was good", e.text) for e in EXAMPLES]
TASKS = [
    (TASK, EXAMPLES),
    (SequenceRegression(), EXAMPLES),
    (TokenClassification(labels=["O", "B-x", "I-x"]), WORDED),
    (QuestionAnswering(stride=2, null_threshold=0.0), ASKED),
]


def numbers(answer):
    """Return all numbers in an answer, in their order."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, list):
        return [n for part in answer for n in numbers(part)]
    return [answer] if isinstance(answer, float) else []


@pytest.mark.parametrize(
    ("task", "examples"), TASKS, ids=lambda x: type(x).__name__
)
def test_the_batch_changes_no_answer(task, examples):
    examples = (
        [replace(e, label=None) for e in examples]
        if hasattr(examples[0], "label")
        else examples
    )
    model = new(task).train()
    alone, together = (
        predict(task, model, TOKENIZER, examples, 12, batch_size=size)
        for size in (1, 64)
    )
    assert model.training  # and no dropout in between
    assert len(alone) == len(together) == len(examples)
    assert str(alone[0]) != str(alone[1])
    for one, other in zip(alone, together, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)
    assert predict(task, model, TOKENIZER, examples[::-1], 12)[::-1] == together


def test_evaluate_takes_validation_or_what_it_is_given():
    model = new()
    answers = predict(TASK, model, TOKENIZER, TASK.validation, 12)
    expected = TASK.score(TASK.validation, answers)
    assert evaluate(TASK, model, TOKENIZER, max_length=12) == expected
    given_ = evaluate(TASK, model, TOKENIZER, TASK.validation[:1], 12)
    assert given_ == TASK.score(TASK.validation[:1], answers[:1])
    with pytest.raises(ValueError, match=r"no example to score.*`examples`"):
        evaluate(replace(TASK, validation=()), model, TOKENIZER)


# ------------------------------------------------------------ what learns


def depth(name):
    """Return the depth of a parameter of `TINY`, by its name's parts."""
    for part, number in ((".layer.0.", 1), (".layer.1.", 2)):
        if part in name:
            return number
    return 0 if "embeddings" in name else 3


@pytest.mark.parametrize("count", [None, 0, 1, 2])
def test_frozen_layers_stay_and_learn_again_later(count):
    model = new()
    model.bert.pooler.dense.bias.requires_grad_(False)  # the caller's wish
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tune(config=replace(CONFIG, frozen_layers=count), model=model)
    for name, parameter in model.named_parameters():
        held = depth(name) <= (-1 if count is None else count)
        mine = name == "bert.pooler.dense.bias"
        assert parameter.requires_grad is not mine
        assert torch.equal(parameter, before[name]) == (held or mine), name


def test_frozen_layers_learn_again_after_an_error(monkeypatch):
    def broken(*_):
        raise RuntimeError("the power failed")
        yield

    monkeypatch.setattr(bertnb.fine_tuning, "train", broken)
    model = new()
    with pytest.raises(RuntimeError, match="the power failed"):
        tune(config=replace(CONFIG, frozen_layers=1), model=model)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    with pytest.raises(ValueError, match=r"frozen_layers=3.*layers=2"):
        tune(config=replace(CONFIG, frozen_layers=3), model=model)
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_another_for_training_only(monkeypatch):
    model, seen = new(config=TINY), []
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    forward = BertForSequenceClassification.forward

    def spy(self, *args, **kwargs):
        if self.training:
            twice = [forward(self, ids).logits for _ in range(2)]
            seen.append(torch.equal(*twice))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    for share, still in ((None, False), (0.0, True), (0.5, False)):
        seen.clear()
        tune(config=replace(CONFIG, dropout=share, min_steps=1), model=model)
        assert set(seen) == {still}
        model.train()
        first, second = (forward(model, ids).logits for _ in range(2))
        assert not torch.equal(first, second)  # as before
    assert model.config.hidden_dropout_prob == 0.1


@pytest.mark.equation("16.13")
def test_the_lower_the_slower(measured):
    """Adam's first step is the learning rate long, where eps is little."""
    model, xi = new(config=STILL), 0.5
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = replace(
        CONFIG,
        layer_decay=xi,
        weight_decay=0.0,
        warmup_ratio=0.0,
        min_steps=1,
        batch_size=20,
    )
    tune(replace(TASK, validation=()), config, model)
    moved = dict.fromkeys(range(4), 0.0)
    for name, parameter in model.named_parameters():
        step = (parameter - before[name]).abs().max().item()
        moved[depth(name)] = max(moved[depth(name)], step / 1e-2)
    for level, found in moved.items():
        measured(found - xi ** (2 + 1 - level), 1e-3)


@pytest.mark.equation("16.14")
@pytest.mark.parametrize("average", [0.0, 0.25, 1.0])
def test_the_result_is_the_mean_of_the_last_weights(measured, average):
    config = replace(CONFIG, average=average)  # 12 steps
    run = FineTuningRun(TASK, new(), TOKENIZER, config)
    states = []
    for _ in run.steps():
        states.append(
            [t.detach().clone().double() for t in run.model.parameters()]
        )
    last = states[-max(1, round(12 * average)) :]
    result = tune(replace(TASK, validation=()), config).model
    for parameter, *values in zip(result.parameters(), *last, strict=True):
        measured((parameter - sum(values) / len(values)).abs().max(), 1e-6)


def test_what_is_scored_and_saved_is_the_mean(tmp_path):
    config = replace(CONFIG, average=0.5, output_dir=str(tmp_path))
    result = tune(config=config)
    saved, _ = load_for_task(TASK, tmp_path)
    assert same(saved, result.model)
    scores = {r["step"]: r["accuracy"] for r in result.records}
    assert scores[result.best["step"]] == max(scores.values())
    found = evaluate(TASK, result.model, TOKENIZER, max_length=12)
    assert found["accuracy"] == result.best["accuracy"]


def test_batches_by_chance_or_of_like_lengths():
    def group(value):
        config = replace(CONFIG, group=value)
        return FineTuningRun(TASK, new(), TOKENIZER, config).batches.group

    few = Shuffled([Row(0, [7], [0])] * 20, 8, 0).group
    assert (group(None), group(1), group(3)) == (few, 1, 3)


def test_the_bias_correction_and_the_recipe_reach_the_optimiser():
    config = replace(CONFIG, weight_decay=0.3, bias_correction=False)
    run = FineTuningRun(TASK, new(), TOKENIZER, config)
    assert {g["weight_decay"] for g in run.optimizer.param_groups} == {0.0, 0.3}
    steps = {float(s["step"]) for s in run.optimizer.state.values()}
    assert steps == {2.0**23}
    run = FineTuningRun(TASK, new(), TOKENIZER, CONFIG)
    assert not run.optimizer.state  # begins at 0
    rates = [
        FineTuningRun(
            TASK, new(), TOKENIZER, replace(CONFIG, schedule=name)
        ).rate(6)
        for name in ("hugging_face", "original", "constant")
    ]
    assert rates == pytest.approx([1e-2 * 6 / 11, 1e-2 * 6 / 12, 1e-2])


def test_parts_of_a_batch_are_the_batch():
    ends = []
    for parts in (1, 3, 8):  # the last batch has four rows
        model, sizes = new(config=STILL), []

        def note(head, args, sizes=sizes):
            if head.training:
                sizes.append(len(args[0]))

        model.classifier.register_forward_pre_hook(note)
        result = tune(config=replace(CONFIG, parts=parts), model=model)
        losses = [record["training_loss"] for record in result.records]
        ends.append(torch.tensor(losses))
        assert max(sizes) == -(-8 // parts)
        assert sum(sizes) == 4 * len(EXAMPLES[:20])
    assert torch.allclose(ends[0], ends[1], atol=1e-5)
    assert torch.allclose(ends[0], ends[2], atol=1e-5)


def test_class_weights_are_those_of_the_training():
    task = replace(TASK, class_weights={"+": 3.0, "-": 0.5})
    assert task.labels == ("+", "-")
    model = tune(task).model
    plus, minus = model.class_weights.tolist()
    assert plus / minus == pytest.approx(6.0)
    plain, weighted = (
        tune(t, CONFIG, new(config=STILL)).records[0]["training_loss"]
        for t in (TASK, task)
    )
    assert plain != pytest.approx(weighted, rel=1e-2)


# ------------------------------------------------------ the best, the end


@dataclass(frozen=True)
class Told(SequenceClassification):
    """A task whose scores are told beforehand."""

    told: list = field(default_factory=list)

    def score(self, examples, answers):
        return {"accuracy": self.told.pop(0)}


def told(*scores):
    return Told(TASK.training, TASK.validation, told=list(scores))


def after(steps, config=CONFIG):
    """Return a model that has taken so many steps of the run."""
    model = new()
    run = FineTuningRun(TASK, model, TOKENIZER, config)
    for _ in islice(run.steps(), steps):
        pass
    return model


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((0.9, 0.5, 0.4, 0.3), 3),
        ((0.1, 0.7, 0.7, 0.2), 9),  # the last of equal ones
        ((0.1, 0.2, 0.3, 0.4), 12),
    ],
)
def test_the_best_weights_are_kept(scores, best, tmp_path):
    config = replace(CONFIG, output_dir=str(tmp_path))
    result = tune(told(*scores), config)
    assert [r["step"] for r in result.records] == [3, 6, 9, 12]
    assert result.best["step"] == best
    assert result.best["accuracy"] == max(scores)
    assert result.stopped is None
    assert same(result.model, after(best))
    stored, _ = load_for_task(TASK, tmp_path)
    assert same(result.model, stored)
    assert stored.label_names == ["+", "-"]


def test_without_validation_the_last_weights_are_the_result():
    result = tune(replace(TASK, validation=()))
    assert same(result.model, after(12))
    assert result.best["step"] == 12
    assert "accuracy" not in result.best


def test_patience_ends_a_run_that_gets_no_better():
    scores = (0.5, 0.6, 0.6, 0.6, 0.7)
    config = replace(CONFIG, patience=2, min_steps=15)
    result = tune(told(*scores), config)
    assert result.stopped == "patience"
    assert [r["step"] for r in result.records] == [3, 6, 9, 12]
    assert same(result.model, after(12, config))  # the last of equal ones
    result = tune(told(*scores), replace(config, patience=3))
    assert (result.stopped, result.best["step"]) == (None, 15)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"min_steps": 7, "eval_every": None}, [3, 6, 7]),  # an epoch is longer
        ({"min_steps": 40, "eval_every": None}, list(range(4, 41, 4))),
        ({"min_steps": 1, "epochs": 2, "eval_every": None}, [3, 6]),
        ({"min_steps": 5, "eval_every": 2}, [2, 4, 5]),
    ],
)
def test_the_length_of_a_run_and_its_evaluations(changes, steps):
    result = tune(config=replace(CONFIG, **changes))
    assert [record["step"] for record in result.records] == steps
    assert result.records[-1]["epoch"] == pytest.approx(steps[-1] / 3, abs=1e-3)


# ------------------------------------------------------------------ seeds


def test_a_run_is_its_seed():
    first, again, other = (
        tune(config=replace(CONFIG, seed=seed)) for seed in (4, 4, 5)
    )
    torch.manual_seed(99)
    assert same(first.model, again.model)  # dropout is on
    assert not same(first.model, other.model)
    assert not first.model.training
    assert (
        first.records[0]["training_loss"] != other.records[0]["training_loss"]
    )


def test_the_report_over_seeds(tmp_path):
    new().bert.save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    config = replace(CONFIG, output_dir=str(tmp_path / "runs"), min_steps=3)
    report = fine_tune_seeds(TASK, tmp_path / "start", config, (0, 1, 7), False)
    again = fine_tune_seeds(
        TASK,
        tmp_path / "start",
        replace(config, output_dir=None),
        (7, 1),
        False,
    )
    values = list(report.scores.values())
    assert list(report.scores) == [0, 1, 7]
    assert report.mean == pytest.approx(fmean(values))
    assert report.deviation == pytest.approx(stdev(values))
    assert again.scores == {7: report.scores[7], 1: report.scores[1]}
    models = [
        load_for_task(TASK, tmp_path / "runs" / f"seed-{seed}")[0]
        for seed in report.scores
    ]
    assert not same(models[0], models[1])
    assert not same(models[1], models[2])
    one = fine_tune_seeds(TASK, tmp_path / "start", config, (7,), False)
    assert (one.mean, one.deviation) == (report.scores[7], 0.0)
    for seeds, some in (((), TASK), ((1,), replace(TASK, validation=()))):
        with pytest.raises(ValueError, match="needs both"):
            fine_tune_seeds(some, tmp_path / "start", config, seeds)


def test_the_head_begins_as_the_seed_says(tmp_path):
    new().bert.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    heads = [
        load_for_task(TASK, tmp_path, seed)[0].classifier.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# ----------------------------------------------------------------- errors


def test_what_does_not_fit_is_named():
    model = new()
    wrong = BertForTokenClassification(TINY, num_labels=2)
    with pytest.raises(
        TypeError,
        match="BertForTokenClassification: SequenceClassification needs "
        r"BertForSequenceClassification\.from_pretrained",
    ):
        tune(model=wrong)
    with pytest.raises(TypeError, match="model is of type Linear"):
        tune(model=torch.nn.Linear(2, 2))
    turned = BertForSequenceClassification(TINY, labels=["-", "+"])
    with pytest.raises(ValueError, match=r"labels \['-', '\+'\], the task"):
        tune(model=turned)
    with pytest.raises(
        ValueError, match="num_labels=2, the task needs 1: load"
    ):
        predict(SequenceRegression(), model, TOKENIZER, EXAMPLES, 12)
    for length in (2, 17):
        with pytest.raises(ValueError, match=f"max_length={length}: .*3 to 16"):
            predict(TASK, model, TOKENIZER, EXAMPLES, max_length=length)
    larger = tokenizer_of(" ".join([*WORDS, "##s", "more"]))
    with pytest.raises(
        ValueError, match=r"13 pieces.*vocab_size=12: load both from the same"
    ):
        predict(TASK, model, larger, EXAMPLES, 12)
    with pytest.raises(ValueError, match="batch_size=0"):
        predict(TASK, model, TOKENIZER, EXAMPLES, 12, batch_size=0)


def test_training_needs_examples_and_their_labels():
    empty = SequenceClassification(labels=["+", "-"])
    with pytest.raises(ValueError, match="no training examples: give"):
        tune(empty)
    bare = [*TASK.training[:3], TextExample("good"), TextExample("bad")]
    with pytest.raises(ValueError, match="training example 3 has no label, 2 "):
        tune(replace(TASK, training=bare))


def test_a_bad_validation_example_is_found_before_training(monkeypatch):
    def train(*_):
        raise AssertionError("it began")

    monkeypatch.setattr(bertnb.fine_tuning, "train", train)
    bare = [*TASK.validation, TextExample("good")]
    with pytest.raises(ValueError, match="validation example 10 has no label"):
        tune(replace(TASK, validation=bare))
    unknown = [*TASK.validation, TextExample("good", "?")]
    with pytest.raises(ValueError, match=r"10 has the label '\?'"):
        tune(replace(TASK, validation=unknown))
    asked = QuestionExample("was good", "film good", (Answer("good", 5),))
    task = QuestionAnswering([asked], [replace(asked, answers=None)])
    with pytest.raises(ValueError, match="validation example 0 has no label"):
        tune(task)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (n, v)
            for n in (
                "epochs",
                "batch_size",
                "parts",
                "max_length",
                "min_steps",
            )
            for v in (0, 1.5, None)
        ),
        *(
            (n, v)
            for n in ("eval_every", "patience", "group")
            for v in (0, 2.0)
        ),
        ("frozen_layers", -1),
        ("frozen_layers", 0.5),
        ("seed", -1),
        ("seed", None),
        *(
            (n, v)
            for n in ("learning_rate", "max_grad_norm")
            for v in (0.0, -1.0, float("nan"), float("inf"))
        ),
        ("warmup_ratio", -0.1),
        ("warmup_ratio", 1.1),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("average", -0.1),
        ("average", 1.1),
        *(
            (n, v)
            for n in ("weight_decay", "r_drop")
            for v in (-0.1, float("nan"))
        ),
        ("schedule", "cosine"),
        ("precision", "int8"),
    ],
)
def test_a_setting_out_of_its_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value!r}: expected "):
        replace(CONFIG, **{name: value})


def test_the_ends_of_the_ranges_are_in():
    for changes in (
        {"patience": None, "eval_every": None, "frozen_layers": None},
        {"patience": 1, "eval_every": 1, "frozen_layers": 0, "epochs": 1},
        {"warmup_ratio": 0.0, "layer_decay": 1.0, "weight_decay": 0.0},
        {"warmup_ratio": 1.0, "layer_decay": 1e-3, "seed": 0, "parts": 1},
        {"dropout": 0.0, "average": 1.0, "group": 1, "r_drop": 0.0},
    ):
        replace(CONFIG, **changes)


# ----------------------------------------------------- a head that is there


def saved_with(labels, folder, form=BertForSequenceClassification):
    torch.manual_seed(3)
    model = form(TINY, labels=labels).eval()
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model


@pytest.mark.parametrize("form", [SequenceClassification, TokenClassification])
def test_a_trained_head_is_found_by_its_names(form, tmp_path):
    labels = ["B-x", "O", "I-x"]
    model = saved_with(labels, tmp_path, form.model_class)
    words = form is TokenClassification
    kind = (lambda t: TokenExample(tuple(t.split()))) if words else TextExample
    bare = [kind(text) for text in texts(9)]
    told = predict(form(labels=labels), model, TOKENIZER, bare, 12)
    for order in (["I-x", "O", "B-x"], ["O", "B-x", "I-x"], labels):
        task = form(labels=order)
        turned, _ = load_for_task(task, tmp_path)
        assert turned.label_names == order
        found = predict(task, turned, TOKENIZER, bare, 12)
        for one, other in zip(told, found, strict=True):
            for name in ("label", "tags"):
                assert one.get(name) == other.get(name)
            for name, score in one.get("scores", {}).items():
                assert score == pytest.approx(other["scores"][name], abs=1e-6)


def test_a_head_for_other_classes_is_left_out_and_said_so(tmp_path):
    model = saved_with(["sad", "glad"], tmp_path)
    for labels in (["+", "-"], ["a", "b", "c"], ["sad", "glad", "mad"]):
        task = SequenceClassification(labels=labels)
        with pytest.warns(UserWarning, match="a head for other classes"):
            new, _ = load_for_task(task, tmp_path)
        assert new.label_names == labels
        rows = new.classifier.weight[:2]
        assert not torch.equal(rows, model.classifier.weight)
        assert same(new.bert, model.bert)  # what it has learnt stays
    with pytest.warns(UserWarning, match="a head for other classes"):
        assert load_for_task(SequenceRegression(), tmp_path)[0].num_labels == 1


def test_a_head_without_names_takes_those_of_the_task(tmp_path):
    model = saved_with(["LABEL_0", "LABEL_1"], tmp_path)
    found, _ = load_for_task(TASK, tmp_path)
    assert found.label_names == ["+", "-"]
    assert same(found, model)
    saved_with(["similarity"], tmp_path)
    found, _ = load_for_task(SequenceRegression(), tmp_path)
    assert same(found, saved_with(["similarity"], tmp_path))


def test_a_head_of_another_kind_of_model_is_none(tmp_path):
    tagger = saved_with(["+", "-"], tmp_path, BertForTokenClassification)
    found, _ = load_for_task(TASK, tmp_path)
    assert not torch.equal(found.classifier.weight, tagger.classifier.weight)
    assert same(found.bert.encoder, tagger.bert.encoder)


def test_a_model_for_whatever_classes_it_has(tmp_path):
    model = saved_with(["x", "y", "z"], tmp_path)
    found = BertForSequenceClassification.for_classes(tmp_path)
    assert found.label_names == ["x", "y", "z"]
    assert same(found, model)
    found = BertForSequenceClassification.for_classes(
        tmp_path, labels=["z", "x", "y"]
    )
    assert found.label_names == ["z", "x", "y"]
    assert torch.equal(found.classifier.bias, model.classifier.bias[[2, 0, 1]])


def test_the_classes_of_a_revision_are_those_of_its_configuration(
    tmp_path, monkeypatch
):
    saved_with(["x", "y"], tmp_path / "main")
    model = saved_with(["y", "x"], tmp_path / "old")

    def download(name, file, revision, token):
        assert (name, token) == ("me/it", "t")
        path = tmp_path / (revision or "main") / file
        if not path.is_file():
            raise EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = BertForSequenceClassification.for_classes(
        "me/it", labels=["x", "y"], revision="old", token="t"
    )
    assert found.label_names == ["x", "y"]
    assert torch.equal(found.classifier.weight.flip(0), model.classifier.weight)


def test_a_body_that_does_not_say_what_it_is_warns_of_nothing(tmp_path):
    new().bert.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    edited(tmp_path, architectures=None)
    for labels in (["a", "b"], ["a", "b", "c"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, _ = load_for_task(
                SequenceClassification(labels=labels), tmp_path
            )
        assert found.label_names == labels


def test_a_head_that_is_not_of_named_classes(tmp_path):
    class Counter(PretrainedModel):
        def __init__(self, config, num_labels=2):
            super().__init__()
            self.config, self.num_labels = config, num_labels
            self.bert = BertModel(config)
            self.classifier = torch.nn.Linear(config.hidden_size, num_labels)

    model = saved_with(["a", "b", "c"], tmp_path)
    for count in (2, 3):
        with pytest.warns(UserWarning, match="classifier.*start untrained"):
            found = Counter.for_classes(tmp_path, num_labels=count)
        assert len(found.classifier.weight) == count
        assert not torch.equal(
            found.classifier.weight, model.classifier.weight[:count]
        )
    found.save_pretrained(tmp_path)
    assert same(Counter.for_classes(tmp_path, num_labels=3), found)


def test_a_head_may_take_only_a_number_and_more_be_left_out(tmp_path):
    class Fewer(BertForSequenceClassification):
        def __init__(self, config, num_labels=2):
            super().__init__(config, num_labels)

    model = saved_with(["a", "b"], tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = Fewer.for_classes(tmp_path, num_labels=3)
    assert "a head for other classes" in str(told[0].message)
    assert found.num_labels == 3
    weights = load_file(tmp_path / "model.safetensors")
    more = weights | {"cls.extra": torch.ones(1)}
    save_file(more, tmp_path / "model.safetensors")
    for labels in (["b", "a"], ["x", "y"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = BertForSequenceClassification.for_classes(
                tmp_path, labels=labels, ignore=("cls.extra",)
            )
        assert found.label_names == labels
        assert same(found.bert, model.bert)


def test_a_task_that_does_not_score_its_metric():
    @dataclass(frozen=True)
    class Other(SequenceClassification):
        def score(self, examples, answers):
            return {"mse": 1.0}

    with pytest.raises(KeyError, match="accuracy"):
        tune(Other(TASK.training, TASK.validation))


def test_whole_numbers_of_numpy_are_whole():
    config = FineTuneConfig(batch_size=np.int64(8), seed=np.int64(1))
    assert (type(config.batch_size), config.batch_size) == (int, 8)
    assert type(config.seed) is int


def test_other_names_are_no_order():
    model = BertForSequenceClassification(TINY, labels=["a", "b"])
    with pytest.raises(ValueError, match=r"labels=\['a', 'c'\]: expected the"):
        model.order_labels(["a", "c"])
    with pytest.raises(ValueError, match="num_labels=0"):
        BertForSequenceClassification(TINY, num_labels=0)


def test_a_folder_may_be_a_path(tmp_path):
    folder = tmp_path / "run"
    result = tune(config=replace(CONFIG, output_dir=folder))
    assert (folder / "log.jsonl").read_text().count('"step"') == 4
    assert same(load_for_task(TASK, folder)[0], result.model)


def test_transformers_cuts_to_what_the_model_reads(tmp_path):
    tune(config=replace(CONFIG, output_dir=tmp_path))
    reader = transformers.pipeline("text-classification", model=str(tmp_path))
    (said,) = reader("good " * 300, truncation=True)
    limit = TINY.max_position_embeddings - 2
    (ours,) = predict(
        TASK,
        load_for_task(TASK, tmp_path)[0],
        TOKENIZER,
        [TextExample("good " * limit)],
        TINY.max_position_embeddings,
    )
    assert said["label"] == ours["label"]
    assert said["score"] == pytest.approx(ours["score"], abs=1e-5)


def test_where_an_example_is_bad_is_said():
    unknown = [*TASK.validation, TextExample("good", "?")]
    with pytest.raises(ValueError, match="validation: example 10 has the"):
        tune(replace(TASK, validation=unknown))


def test_the_head_of_a_save_that_was_killed(tmp_path):
    """The configuration that belongs to the weights counts, not the one left."""
    model = saved_with(["-", "+"], tmp_path)
    saved_with(["a", "b"], tmp_path / "old")
    (tmp_path / "config.json").rename(tmp_path / "config.json.tmp")
    for left in (False, True):
        if left:
            shutil.copy(tmp_path / "old" / "config.json", tmp_path)
        found, _ = load_for_task(TASK, tmp_path)
        assert found.label_names == ["+", "-"]
        turned = found.classifier.weight.flip(0)
        assert torch.equal(turned, model.classifier.weight)


def edited(folder, **changes):
    """Change the configuration of a saved model; None takes an entry out."""
    file = folder / "config.json"
    whole = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps({k: v for k, v in whole.items() if v is not None})
    )


def test_a_head_in_a_configuration_that_says_less(tmp_path):
    model = saved_with(["a", "b"], tmp_path)
    edited(tmp_path, architectures=None)
    with pytest.warns(UserWarning, match="a head for other classes"):
        load_for_task(TASK, tmp_path)
    edited(tmp_path, id2label=None)  # nothing is known of it
    assert same(load_for_task(TASK, tmp_path)[0], model)
    edited(tmp_path, id2label={"0": 0, "1": None})
    with pytest.warns(UserWarning, match="a head for other classes"):
        load_for_task(TASK, tmp_path)
    three = saved_with(["a", "b", "c"], tmp_path)
    edited(tmp_path, architectures=None, id2label=None)
    task = SequenceClassification(labels=["x", "y", "z"])
    assert same(load_for_task(task, tmp_path)[0], three)
    for other in (TASK, SequenceRegression()):  # its weights say how many
        with pytest.warns(UserWarning, match="a head for other classes"):
            load_for_task(other, tmp_path)
    saved_with(["x", "y", "x"], tmp_path)  # one of them twice
    with pytest.warns(UserWarning, match="a head for other classes"):
        load_for_task(SequenceClassification(labels=["x", "y"]), tmp_path)
    saved_with(["+", "-"], tmp_path)
    edited(tmp_path, problem_type="multi_label_classification")
    with pytest.warns(UserWarning, match="a head for other classes"):
        load_for_task(TASK, tmp_path)


def test_a_head_of_ones_own(tmp_path):
    class Deep(BertForSequenceClassification):
        def __init__(self, config, num_labels=None, labels=None, depth=1):
            super().__init__(config, num_labels, labels)
            self.depth = depth

    @dataclass(frozen=True)
    class Mine(SequenceClassification):
        model_class = Deep

        def head_arguments(self):
            return super().head_arguments() | {"depth": 3}

    model = saved_with(["-", "+"], tmp_path)  # of the class that it extends
    found, _ = load_for_task(Mine(labels=["+", "-"]), tmp_path)
    assert found.depth == 3
    assert torch.equal(found.classifier.weight.flip(0), model.classifier.weight)


def test_class_weights_go_with_their_classes():
    model = BertForSequenceClassification(TINY, labels=["a", "b"])
    model.class_weights = torch.tensor([1.0, 9.0])
    model.order_labels(["b", "a"])
    assert model.class_weights.tolist() == [9.0, 1.0]
