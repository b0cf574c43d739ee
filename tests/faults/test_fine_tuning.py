"""Fine-tuning that is killed, stopped or damaged: the same weights at the end.

With dropout on, so that the random numbers must go on, too.
"""

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config_for, tokenizer_of

import bertnb.fine_tuning
from bertnb import (
    BertForSequenceClassification,
    BertnbError,
    Checkpoints,
    FineTuneConfig,
    FineTuningRun,
    SequenceClassification,
    SequenceRegression,
    Shuffled,
    TextExample,
    fine_tune,
    fine_tune_seeds,
    freezing,
    load_for_task,
    locked,
)

WORDS = "good bad fine film was the".split()
TOKENIZER = tokenizer_of(" ".join([*WORDS, "##s"]))
TINY = config_for(TOKENIZER)
EXAMPLES = [
    TextExample(
        " ".join([*WORDS, "##s"][i % 6 :][: 1 + i % 4]), i * 7 % 13 / 10
    )
    for i in range(28)
]
TASK = SequenceRegression(EXAMPLES[:20], EXAMPLES[20:])


@pytest.fixture
def config(tmp_path):
    return FineTuneConfig(
        output_dir=str(tmp_path / "run"),
        epochs=1,
        batch_size=8,
        learning_rate=1e-2,
        max_length=10,
        min_steps=20,
        eval_every=4,
        frozen_layers=0,
        layer_decay=0.9,
        device="cpu",
        precision="float32",
    )


def new(config=TINY):
    torch.manual_seed(0)
    return BertForSequenceClassification(config, num_labels=1)


def tune(config, task=TASK, model=None):
    model = new() if model is None else model
    return fine_tune(task, model, TOKENIZER, config, progress=False)


def whole(config):
    """Return a run that nothing has stopped."""
    return tune(replace(config, output_dir=None))


def same(first, second):
    one, two = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


def scores(result):
    """Return the records without the time they took."""
    return [
        {k: v for k, v in record.items() if k != "seconds"}
        for record in result.records
    ]


def at(monkeypatch, step, act):
    """Act when the loop has taken this step and begins the next; once."""
    train = bertnb.fine_tuning.train

    def until(*arguments):
        for report in train(*arguments):
            yield report
            if report.step == step:
                monkeypatch.setattr(bertnb.fine_tuning, "train", train)
                act()

    monkeypatch.setattr(bertnb.fine_tuning, "train", until)


def fail():
    raise OSError("the power failed")


def checkpoint(config):
    (file,) = Path(config.output_dir, "checkpoints").glob("step-*.pt")
    return file


@pytest.mark.parametrize(
    ("average", "r_drop"), [(0.0, 0.0), (0.7, 0.5)]
)  # the mean from step 6 on
@pytest.mark.parametrize("step", [1, 5, 7, 18])
def test_killed_and_continued_is_the_whole_run(
    config, monkeypatch, step, average, r_drop
):
    config = replace(config, average=average, r_drop=r_drop)
    expected = whole(config)
    at(monkeypatch, step, fail)
    with pytest.raises(OSError, match="the power failed"):
        tune(config)
    torch.manual_seed(77)  # another process has other random numbers
    result = tune(config)
    assert same(result.model, expected.model)
    assert scores(result) == scores(expected)
    assert result.best["step"] == expected.best["step"]
    log = Path(config.output_dir, "log.jsonl").read_text("utf-8").splitlines()
    facts, *records = map(json.loads, log)
    assert facts["resumed_at"] == ([] if step < 4 else [(step + 1) // 4 * 4])
    assert records == result.records


def test_killed_twice(config, monkeypatch):
    for step in (6, 13):
        at(monkeypatch, step, fail)
        with pytest.raises(OSError, match="the power failed"):
            tune(config)
    assert same(tune(config).model, whole(config).model)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("step", [0, 6, 7, 17])
def test_a_signal_stops_between_two_steps(config, monkeypatch, name, step):
    at(monkeypatch, step, lambda: signal.raise_signal(getattr(signal, name)))
    stopped = tune(config)
    assert stopped.stopped == name
    assert f"step-{step + 2:09}-" in checkpoint(config).name
    result, expected = tune(config), whole(config)
    assert result.stopped is None
    assert same(result.model, expected.model)
    assert scores(result) == scores(expected)


def test_a_signal_at_the_last_step_changes_nothing(config, monkeypatch):
    expected = whole(config)
    evaluate = bertnb.fine_tuning.FineTuningRun.evaluate

    def last(run, seconds):
        evaluate(run, seconds)
        if run.done == run.total:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(bertnb.fine_tuning.FineTuningRun, "evaluate", last)
    result = tune(config)
    assert result.stopped is None
    assert same(result.model, expected.model)


def test_a_signal_ends_a_report_over_seeds(config, monkeypatch, tmp_path):
    new().bert.save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    at(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="SIGTERM with seed 3"):
        fine_tune_seeds(TASK, tmp_path / "start", config, (3, 4), False)
    assert not Path(config.output_dir, "seed-4").exists()
    report = fine_tune_seeds(TASK, tmp_path / "start", config, (3, 4), False)
    free = replace(config, output_dir=None)
    assert report == fine_tune_seeds(
        TASK, tmp_path / "start", free, (3, 4), False
    )


def test_a_finished_run_is_not_done_again(config, monkeypatch):
    first = tune(config)
    monkeypatch.setattr(Shuffled, "batch", lambda *_: fail())
    again = tune(config)
    assert same(first.model, again.model)
    assert scores(first) == scores(again)


def test_patience_may_change_when_a_run_goes_on(config):
    expected = whole(config)
    first = tune(replace(config, patience=1, learning_rate=1e-2))
    assert first.stopped == "patience"
    assert len(first.records) < len(expected.records)
    again = tune(replace(config, patience=1))
    assert (again.stopped, scores(again)) == ("patience", scores(first))
    assert same(first.model, again.model)
    assert same(tune(config).model, expected.model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 2e-2),
        ("min_steps", 30),
        ("seed", 1),
        ("frozen_layers", None),
        ("layer_decay", 1.0),
        ("dropout", 0.0),
        ("average", 0.5),
        ("r_drop", 0.5),
        ("group", 1),
    ],
)
def test_another_configuration_is_refused(config, name, value):
    tune(config)
    before = checkpoint(config).read_bytes()
    was = getattr(config, name)
    with pytest.raises(BertnbError) as caught:
        tune(replace(config, **{name: value}))
    message = str(caught.value)
    assert f"{name} was {was!r} and is {value!r}" in message
    assert config.output_dir in message
    assert "Choose another output_dir, or delete it" in message
    assert checkpoint(config).read_bytes() == before


def test_other_rows_metrics_and_models_are_refused(config):
    tune(config)
    changed = [TextExample("good", 0.5), *EXAMPLES[1:20]]
    for task, what in (
        (replace(TASK, training=changed), "digest of training was"),
        (replace(TASK, validation=EXAMPLES[:20]), "digest of validation was"),
        (replace(TASK, metric="pearson"), "metric was 'spearman' and is"),
    ):
        with pytest.raises(BertnbError, match=what):
            tune(config, task)
    wider = new(replace(TINY, hidden_size=12))
    with pytest.raises(BertnbError, match=r"model was .*'hidden_size': 8"):
        tune(config, model=wider)


def test_a_damaged_checkpoint_is_not_taken(config):
    tune(config)
    path = checkpoint(config)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(BertnbError, match=r"every checkpoint .* is damaged"),
    ):
        tune(config)
    assert path.with_suffix(".damaged").read_bytes() == content


def test_a_folder_has_one_writer(config):
    with (
        locked(config.output_dir),
        pytest.raises(BertnbError, match="another process is writing to"),
    ):
        tune(config)
    model = BertForSequenceClassification(TINY, num_labels=2)
    elsewhere = replace(config, output_dir=config.output_dir + "-new")
    with pytest.raises(ValueError, match="num_labels=2"):
        tune(elsewhere, model=model)
    assert not Path(elsewhere.output_dir).exists()  # nothing began


def test_a_loss_that_is_not_a_number_harms_no_weights(config, monkeypatch):
    """The model has the weights before that step, the folder the best."""
    expected = whole(config)
    batch = Shuffled.batch

    def poisoned(rows, step):
        made = batch(rows, step)
        if step == 10:
            made["labels"][0] = float("nan")
        return made

    monkeypatch.setattr(Shuffled, "batch", poisoned)
    model = new()
    with pytest.raises(FloatingPointError, match="loss is nan at step 10"):
        tune(config, model=model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    monkeypatch.undo()
    log = Path(config.output_dir, "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log[1:]] == [4, 8]
    stored, _ = load_for_task(TASK, config.output_dir)
    assert all(p.isfinite().all() for p in stored.parameters())
    at(monkeypatch, 8, lambda: signal.raise_signal(signal.SIGTERM))
    ten = tune(replace(config, output_dir=None))  # stops behind ten steps
    assert ten.stopped == "SIGTERM"
    assert same(model, ten.model)
    result = tune(config)  # the batches are whole again
    assert same(result.model, expected.model)


@pytest.mark.parametrize("bad", [2, 3, 19])
def test_a_device_that_is_asked_late_loses_nothing(config, monkeypatch, bad):
    """On a GPU a step that failed is seen later: never by an evaluation."""
    monkeypatch.setattr("bertnb.optimization._patience", lambda device: 16)
    batch, model = Shuffled.batch, new()

    def spoilt(self, step):
        found = batch(self, step)
        if step == bad:
            found["labels"] = found["labels"] * torch.nan
        return found

    monkeypatch.setattr(Shuffled, "batch", spoilt)
    with pytest.raises(FloatingPointError, match=f"at step {bad}"):
        fine_tune(TASK, model, TOKENIZER, config, progress=False)
    log = Path(config.output_dir) / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else ["facts"]
    assert len(lines) - 1 == bad // config.eval_every  # those before it
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_goes_on_only_from_its_own_weights(config, monkeypatch):
    """What it began with, what it has come to, and nothing else."""
    begun, expected = new(), whole(config)
    at(monkeypatch, 9, fail)
    with pytest.raises(OSError, match="the power failed"):
        tune(config, model=begun)
    torch.manual_seed(1)
    other = BertForSequenceClassification(TINY, num_labels=1)
    with pytest.raises(BertnbError, match="began with other weights"):
        tune(config, model=other)
    state = torch.load(checkpoint(config))
    restored = new()
    restored.load_state_dict(state["model"])
    for name in ("model", "best"):
        model = new()
        model.load_state_dict(state[name])
        with freezing(model, config.frozen_layers):
            FineTuningRun(TASK, model, TOKENIZER, config).resume()
        assert same(model, restored)
    at(monkeypatch, 14, fail)
    with pytest.raises(OSError, match="the power failed"):
        tune(config, model=restored)
    assert same(tune(config).model, expected.model)
    # finished: the same call gives the same, another model is refused
    assert same(tune(config, model=expected.model).model, expected.model)
    with pytest.raises(BertnbError, match="began with other weights"):
        tune(config, model=other)


def test_a_run_goes_on_only_with_the_settings_of_its_task(config, monkeypatch):
    at(monkeypatch, 9, fail)
    with pytest.raises(OSError, match="the power failed"):
        tune(config)
    with pytest.raises(
        BertnbError, match=r"task\.metric was 'spearman' and is"
    ):
        tune(config, replace(TASK, metric="pearson"))


def test_class_weights_are_a_setting(config):
    known = [replace(e, label="+" if e.label > 0.5 else "-") for e in EXAMPLES]
    task = SequenceClassification(known[:20], known[20:])

    def fresh():
        torch.manual_seed(0)
        return BertForSequenceClassification(TINY, labels=["+", "-"])

    fine_tune(task, fresh(), TOKENIZER, config, progress=False)
    for weights in ("balanced", {"+": 1.0, "-": 9.0}):
        other = replace(task, class_weights=weights)
        with pytest.raises(BertnbError, match=r"task\.class_weights was None"):
            fine_tune(other, fresh(), TOKENIZER, config, progress=False)


def test_the_checkpoints_of_another_kind_of_run_are_refused(config):
    folder = Path(config.output_dir, "checkpoints")
    Checkpoints(folder, 1).save(3, {"model": new().state_dict()})
    with pytest.raises(
        BertnbError, match="another kind of run, or of an older"
    ):
        tune(config)


def test_a_better_model_without_its_checkpoint(config, monkeypatch, tmp_path):
    """Killed between the two, in the folder that the model came from."""
    folder = Path(config.output_dir)
    save = Checkpoints.save
    count = iter(range(9))

    def full(*arguments):
        if next(count) == 2:
            raise OSError("no space left on device")
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", full)
    bare = replace(TASK, validation=())  # every evaluation writes the model
    with pytest.raises(OSError, match="no space left"):
        tune(config, bare)
    monkeypatch.setattr(Checkpoints, "save", save)
    written, _ = load_for_task(bare, folder)
    assert not same(written, new())
    result = tune(config, bare, written)
    assert same(
        result.model, tune(replace(config, output_dir=None), bare).model
    )


@dataclass(frozen=True)
class Settled(SequenceRegression):
    """A task with settings of all kinds."""

    weights: Any = None
    extra: Any = ()


@pytest.mark.parametrize(
    ("before", "now", "differ"),
    [
        (MappingProxyType({"a": 1.0}), MappingProxyType({"a": 9.0}), True),
        (MappingProxyType({"a": 1.0}), {"a": 1.0}, False),
        ({(1, 2): 3}, {(1, 2): 4}, False),  # no JSON: not compared
        (len, max, False),
        (np.float32(0.5), 0.5, False),
        (np.float32(0.5), np.float32(0.25), True),
        (
            {str(i): i for i in range(900)},
            {str(i): i for i in range(899, -1, -1)},
            False,
        ),
        (["x"] * 90_000, ["x"] * 90_000, False),
        (["x"] * 90_000, ["x"] * 89_999 + ["y"], True),
    ],
)
def test_settings_of_all_kinds(config, before, now, differ):
    first = Settled(EXAMPLES[:20], EXAMPLES[20:], weights=before)
    tune(config, first)
    assert checkpoint(config).stat().st_size < 200_000
    if not differ:
        tune(config, replace(first, weights=now))
        return
    with pytest.raises(BertnbError, match=r"task\.weights was"):
        tune(config, replace(first, weights=now))


def test_a_model_that_no_run_has_written_is_kept(config):
    folder = Path(config.output_dir)
    torch.manual_seed(5)
    mine = BertForSequenceClassification(TINY, num_labels=1)
    mine.save_pretrained(folder)
    with pytest.raises(BertnbError, match="would be overwritten: choose"):
        tune(config)
    kept = BertForSequenceClassification.from_pretrained(folder)
    assert same(kept, mine)
    # not so after a run in it, with or without its file .lock
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    expected = tune(config)
    assert same(tune(config).model, expected.model)
    (folder / ".lock").unlink()
    assert same(tune(config).model, expected.model)


def test_a_setting_of_a_task_that_is_no_dataclass(config):
    class Plain(SequenceRegression):
        def __init__(self, smoothing):
            super().__init__(EXAMPLES[:20], EXAMPLES[20:])
            object.__setattr__(self, "smoothing", smoothing)
            object.__setattr__(self, "_seen", smoothing)  # its own affair

    tune(config, Plain(0.0))
    with pytest.raises(BertnbError) as caught:
        tune(config, Plain(0.5))
    assert "task.smoothing was 0.0 and is 0.5" in str(caught.value)
    assert "_seen" not in str(caught.value)


def test_numbers_of_numpy_are_settings(config):
    rates = [replace(config, learning_rate=np.float32(r)) for r in (1e-2, 1e-3)]
    tune(replace(rates[0], output_dir=None))
    tune(rates[0])
    with pytest.raises(BertnbError, match="learning_rate was"):
        tune(rates[1])


def test_other_weights_before_the_first_evaluation(config):
    """A run was stopped when it had a checkpoint and no model yet."""
    stop = replace(config, eval_every=19, frozen_layers=None)
    run = FineTuningRun(TASK, new(), TOKENIZER, stop)
    Path(config.output_dir).mkdir()
    next(run.steps())
    run.save()
    torch.manual_seed(1)
    other = BertForSequenceClassification(TINY, num_labels=1)
    with pytest.raises(BertnbError, match="began with other weights"):
        tune(stop, model=other)


def test_a_damaged_model_beside_a_whole_checkpoint(config, monkeypatch):
    expected = whole(config)
    at(monkeypatch, 9, fail)
    with pytest.raises(OSError, match="the power failed"):
        tune(config)
    file = Path(config.output_dir) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    torch.manual_seed(1)
    other = BertForSequenceClassification(TINY, num_labels=1)
    with pytest.raises(BertnbError, match="began with other weights"):
        tune(config, model=other)
    assert same(tune(config).model, expected.model)
