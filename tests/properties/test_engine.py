"""One call from texts to a model: what it writes, when it stops, how it goes on.

What it survives when it is killed stands in tests/faults/test_engine.py.
"""

import inspect
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers

import bertnb.engine as engine
from bertnb import (
    BertConfig,
    BertForPreTraining,
    BertnbError,
    Checkpoints,
    PretrainConfig,
    PretrainingRun,
    PretrainingScores,
    Step,
    WordPieceTokenizer,
    World,
    load_folder,
    pick_precision,
    prepare,
    pretrain,
)

SMALL = BertConfig(
    vocab_size=90,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twenty short documents, each about one animal."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        animal = ("cat", "dog", "owl", "fox")[number % 4]
        lines = [f"The {animal} saw {n} birds on a tree." for n in range(9)]
        (folder / f"{number:02}.txt").write_text(" ".join(lines))
    return folder


@pytest.fixture
def config(tmp_path, corpus):
    return PretrainConfig(
        str(tmp_path / "run"),
        SMALL,
        corpus=str(corpus),
        sequence_length=24,
        batch_size=4,
        total_steps=6,
        eval_every=3,
        eval_batches=1,
        mlm_probability=0.3,
        device="cpu",
        precision="float32",
    )


def run_of(config, **changes):
    return pretrain(replace(config, **changes), progress=False)


def same_weights(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def untimed(result):
    return [r | {"seconds": 0} for r in result.records]


# what it writes


def test_a_run_learns_and_writes_its_record(config, tmp_path):
    config = replace(config, total_steps=60, eval_every=30, learning_rate=1e-2)
    result = pretrain(config, progress=False)
    folder = tmp_path / "run"
    lines = (folder / "log.jsonl").read_text().splitlines()
    head, first, last = map(json.loads, lines)
    assert result.records == [first, last]
    assert result.stopped is None
    assert last["step"] == 60
    assert last["training_loss"] < first["training_loss"] < 5.2
    assert last["masked_lm_loss"] < first["masked_lm_loss"]
    assert last["learning_rate"] == config.learning_rate_at(59)
    assert last["skipped_steps"] == 0
    assert head["config"] == asdict(config)
    assert head["resumed_at"] == []
    assert not result.model.training
    loaded = BertForPreTraining.from_pretrained(folder)
    assert torch.equal(loaded.masked_lm.bias, result.model.masked_lm.bias)
    tokenizer = WordPieceTokenizer.from_pretrained(folder)
    assert tokenizer.vocabulary == result.tokenizer.vocabulary
    assert not list(folder.rglob("*.tmp"))


def test_transformers_loads_what_a_run_leaves(config, tmp_path):
    result = pretrain(config, progress=False)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    batch = tokenizer(["The owl saw 3 birds."], return_tensors="pt")
    with torch.no_grad():
        one = theirs.eval()(**batch).prediction_logits
        other = result.model(**batch).prediction_logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    ours = result.tokenizer(["The owl saw 3 birds."])["input_ids"]
    assert torch.equal(batch["input_ids"], ours)


def test_a_record_holds_the_mean_loss_since_the_last_one(config):
    run = PretrainingRun(replace(config, output_dir=f"{config.output_dir}-2"))
    losses = [float(report.loss) for report in run.steps()]
    records = pretrain(config, progress=False).records
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [r["training_loss"] for r in records] == pytest.approx(means)


def test_the_share_of_hidden_words_falls_in_the_batches(config):
    run = PretrainingRun(replace(config, final_mlm_probability=0.1))
    shapes, hidden = set(), []
    for step in range(6):
        batch = run.batch(step)
        shapes.add(batch["labels"].shape)
        words = (batch["input_ids"] != 0).sum(-1)
        share = run.config.mlm_probability_at(step)
        expected = (share * words.double()).round().clamp(min=1).sum()
        hidden.append(int((batch["labels"] != -100).sum()))
        assert hidden[-1] == expected
    assert len(shapes) == 1  # whatever the share
    assert hidden[0] > 2 * hidden[-1]


def test_held_out_scores_hide_15_percent_whatever_the_run_does(config):
    run = PretrainingRun(replace(config, mlm_probability=0.5))
    assert run.held_out.mlm_probability == 0.15
    assert run.training.mlm_probability == 0.5
    annealed = replace(config, mlm_probability=0.1, final_mlm_probability=0.4)
    assert PretrainingRun(annealed).training.mlm_probability == 0.4


def test_the_last_checkpoints_are_kept(config):
    run_of(config, save_every=1, keep=3)
    files = PretrainingRun(config).checkpoints.files()
    assert [int(path.name[5:14]) for path in files] == [4, 5, 6]


def test_a_tensorboard_file_appears_if_asked_for(config, tmp_path):
    pytest.importorskip("tensorboard")
    run_of(config, tensorboard=True)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"masked_lm_loss" in file.read_bytes()


def test_a_missing_tensorboard_is_told_before_the_run(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BertnbError, match="pip install tensorboard"):
        run_of(config, tensorboard=True)


def test_the_recipe_reaches_every_part(config, monkeypatch):
    given = {}

    def watch(name):
        original = getattr(engine, name)

        def call(*arguments, **more):
            bound = inspect.signature(original).bind(*arguments, **more)
            given.setdefault(name, bound.arguments)
            return original(*arguments, **more)

        monkeypatch.setattr(engine, name, call)

    for name in ("PretrainingData", "adamw", "train", "evaluate_pretraining"):
        watch(name)
    changed = replace(
        config,
        sampler="original",
        pack=2,
        parts=2,
        max_grad_norm=0.5,
        weight_decay=0.1,
        bias_correction=False,
        seed=3,
        on_nonfinite="skip",
        eval_batches=7,
        precision="bfloat16",
    )
    pretrain(changed, progress=False)
    data = given["PretrainingData"]  # the first: that for training
    assert (data["length"], data["batch_size"]) == (24, 4)
    assert (data["sampler"], data["pack"], data["seed"]) == ("original", 2, 3)
    assert (data["rank"], data["ranks"]) == (0, 1)
    assert given["adamw"]["weight_decay"] == 0.1
    assert given["adamw"]["bias_correction"] is False
    steps = given["train"]
    assert steps["schedule"](2) == config.learning_rate_at(2)
    assert (steps["first_step"], steps["max_grad_norm"]) == (0, 0.5)
    assert (steps["parts"], steps["on_nonfinite"]) == (2, "skip")
    assert steps["precision"] == torch.bfloat16
    assert steps["scaler"] is None
    assert given["evaluate_pretraining"]["max_batches"] == 7


def test_precision_auto_is_what_the_device_does_faster(config):
    run = PretrainingRun(replace(config, precision="auto"))
    assert run.precision == pick_precision(torch.device("cpu"))


@pytest.mark.parametrize("parts", [1, 2])
def test_compiling_is_tried_with_the_shape_of_a_part(
    config, monkeypatch, parts
):
    tried = []

    def probe(model, batch, device, precision):
        tried.append((batch["input_ids"].shape, device.type, precision))
        return model

    monkeypatch.setattr(engine, "probe_compile", probe)
    run_of(config, compile=True, parts=parts)
    assert tried == [((4 // parts, 24), "cpu", torch.float32)]


# the same result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"final_mlm_probability": 0.1},
        {"precision": "float16"},
        {"pack": 2, "parts": 2},
        {"schedule": "original", "bias_correction": False},
    ],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    config, monkeypatch, changes
):
    config = replace(config, **changes)
    whole = run_of(config, output_dir=f"{config.output_dir}-whole")
    save = PretrainingRun.save

    def save_and_die(run):
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingRun, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, progress=False)
    torch.manual_seed(999)  # nothing may depend on where the generator stands
    again = pretrain(config, progress=False)
    assert [r["step"] for r in again.records] == [3, 6]
    assert same_weights(again, whole)
    assert untimed(again) == untimed(whole)
    assert again.tokenizer.vocabulary == whole.tokenizer.vocabulary
    log = (PretrainingRun(config).folder / "log.jsonl").read_text()
    assert json.loads(log.splitlines()[0])["resumed_at"] == [3]


def test_the_scale_of_the_loss_is_part_of_the_state(config):
    run = PretrainingRun(replace(config, precision="float16"))
    run.scaler.scale(torch.ones(()))  # it is made when it is first used
    run.scaler.update(512.0)
    run.save()
    other = PretrainingRun(replace(config, precision="float16"))
    other.resume()
    assert other.scaler.get_scale() == 512.0


def test_parts_do_not_change_the_result(config):
    base = replace(
        SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    whole = run_of(config, model=base, output_dir=f"{config.output_dir}-1")
    parts = run_of(config, model=base, parts=4)
    theirs = whole.model.state_dict()
    for name, tensor in parts.model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0)


def test_shards_give_the_run_of_the_texts(config, tmp_path, corpus):
    texts = run_of(config)
    texts.tokenizer.save_pretrained(tmp_path / "shards")
    prepare(load_folder(corpus), texts.tokenizer, tmp_path / "shards")
    shards = run_of(
        config,
        corpus=str(tmp_path / "shards"),
        output_dir=f"{config.output_dir}-2",
    )
    assert same_weights(texts, shards)
    assert untimed(texts) == untimed(shards)


def test_budgets_only_interrupt(config):
    whole = run_of(config, output_dir=f"{config.output_dir}-whole")
    places = config.places(1)
    first = run_of(config, max_tokens=2 * places)
    assert (first.stopped, first.records) == ("max_tokens", [])
    exported = BertForPreTraining.from_pretrained(config.output_dir)
    assert torch.equal(exported.masked_lm.bias, first.model.masked_lm.bias)
    same = run_of(config, max_tokens=2 * places)
    assert same.stopped == "max_tokens"
    assert same_weights(first, same)  # not a step further
    second = run_of(config, max_seconds=1e-9)  # one step a call, at least
    assert second.stopped == "max_seconds"
    assert not same_weights(first, second)
    (newest, *_) = reversed(PretrainingRun(config).checkpoints.files())
    assert newest.name.startswith("step-000000003-")
    last = run_of(config)
    assert last.stopped is None
    assert same_weights(last, whole)
    assert untimed(last) == untimed(whole)


def test_a_finished_run_is_not_trained_further(config):
    one, other = run_of(config), run_of(config)
    assert same_weights(one, other)
    assert one.records == other.records


def test_another_configuration_is_refused_and_the_difference_named(config):
    run_of(config)
    with pytest.raises(BertnbError) as caught:
        run_of(
            config,
            seed=1,
            learning_rate=0.1,
            model=replace(SMALL, hidden_act="relu"),
        )
    message = str(caught.value)
    assert "holds a run of another configuration" in message
    assert "seed was 0 and is 1" in message
    assert "learning_rate was 0.003 and is 0.1" in message
    assert "model.hidden_act was 'gelu' and is 'relu'" in message
    assert "batch_size" not in message
    with pytest.raises(BertnbError, match="another configuration"):
        pretrain(replace(config, total_steps=7), progress=False)


def test_other_texts_are_refused(config, tmp_path, corpus):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in corpus.iterdir():
        (copy / file.name).write_text(file.read_text())
    run_of(config, max_tokens=1)
    again = run_of(config, corpus=str(copy), keep=5)  # free to move, and so on
    assert again.stopped is None
    (copy / "00.txt").write_text("The end.")
    with pytest.raises(BertnbError, match="digest of the text was"):
        run_of(config, corpus=str(copy))


def test_another_number_of_processes_is_told(config):
    run = PretrainingRun(config)
    with pytest.warns(UserWarning, match="2 processes, now there are 1"):
        run._take_random([{"cpu": torch.get_rng_state()}] * 2)


def test_a_batch_goes_into_the_processes_and_parts(config):
    with pytest.raises(ValueError, match="choose a multiple of 6"):
        PretrainingRun(
            replace(config, parts=2), World(0, 3, torch.device("cpu"))
        )


def test_processes_begin_with_the_same_weights_and_other_dropout(config):
    runs, states = [], []
    for rank in range(2):
        world = World(rank, 2, torch.device("cpu"))
        runs.append(PretrainingRun(config, world))
        states.append(torch.get_rng_state())
    assert same_weights(*runs)
    assert not torch.equal(*states)
    assert runs[0].training.batch_size == config.batch_size // 2
    ours, theirs = (run.batch(0)["input_ids"] for run in runs)
    assert not torch.equal(ours, theirs)


# the end


@pytest.fixture
def scripted(monkeypatch):
    """Make the held-out losses those of a list; note the weights then."""
    losses, weights = [], []

    def score(model, data, batches):
        weights.append({k: t.clone() for k, t in model.state_dict().items()})
        return PretrainingScores(losses[len(weights) - 1], 0.0, 1, 0.0, 1)

    monkeypatch.setattr(engine, "evaluate_pretraining", score)
    return losses, weights


def is_model_of(result, weights):
    ours = result.model.state_dict()
    return all(torch.equal(ours[name], weights[name]) for name in weights)


def test_patience_ends_a_run_with_its_best_model(config, scripted):
    losses, weights = scripted
    losses += [3.0, 2.0, 2.5, 2.0, 2.1]
    result = run_of(config, eval_every=1, patience=2)
    assert result.stopped == "patience"
    assert [r["step"] for r in result.records] == [1, 2, 3, 4]
    assert is_model_of(result, weights[1])
    again = run_of(config, eval_every=1, patience=2)
    assert (again.stopped, len(weights)) == ("patience", 4)
    assert same_weights(again, result)
    longer = run_of(config, eval_every=1, patience=3)  # it may be changed
    assert [r["step"] for r in longer.records] == [1, 2, 3, 4, 5]
    assert longer.stopped == "patience"


def test_without_patience_the_last_model_is_the_result(config, scripted):
    losses, weights = scripted
    losses += [1.0, 2.0]
    result = run_of(config)
    assert is_model_of(result, weights[1])
    exported = BertForPreTraining.from_pretrained(config.output_dir)
    assert torch.equal(exported.masked_lm.bias, weights[1]["masked_lm.bias"])


def test_divergence_stops_and_keeps_what_was_good(config, scripted):
    losses, weights = scripted
    losses += [5.0, 2.0, 3.4, 4.0, 4.0, 4.0]
    result = run_of(config, eval_every=1, divergence=1.5)
    assert result.stopped == "divergence"
    assert [r["step"] for r in result.records] == [1, 2, 3, 4]
    assert is_model_of(result, weights[1])
    newest = PretrainingRun(config).checkpoints.files()[-1]
    assert newest.name.startswith("step-000000003-")  # not the fourth


@pytest.fixture
def poisoned(monkeypatch):
    """Multiply the loss of the fourth training step by NaN."""
    forward, steps = BertForPreTraining.forward, []

    def spoil(model, *arguments, **more):
        output = forward(model, *arguments, **more)
        if model.training:
            steps.append(1)
            if len(steps) == 4:
                output.losses["labels"] = output.losses["labels"] * float("nan")
        return output

    monkeypatch.setattr(BertForPreTraining, "forward", spoil)


@pytest.mark.usefixtures("poisoned")
def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        run_of(config, eval_every=2)
    kept = PretrainingRun(config).checkpoints.files()
    assert [path.name[:14] for path in kept] == ["step-000000002"]
    assert "nan at step 3" in str(caught.value)
    assert kept[0].name in str(caught.value)
    assert str(tmp_path / "run" / "checkpoints") in str(caught.value)


@pytest.mark.usefixtures("poisoned")
def test_a_loss_that_is_not_finite_can_be_skipped_and_is_counted(config):
    result = run_of(config, on_nonfinite="skip")
    assert [r["skipped_steps"] for r in result.records] == [0, 1]
    assert all(r["training_loss"] < 6 for r in result.records)
    assert all(t.isfinite().all() for t in result.model.state_dict().values())


@pytest.mark.parametrize("fails_at", [2, 3, 5])
def test_a_step_that_failed_is_never_saved(config, monkeypatch, fails_at):
    """On a GPU the loop raises some steps after the bad one; in between
    nothing changes, and no checkpoint may say that it did."""

    def late(*_):
        zero, no = torch.zeros(()), torch.tensor(False)
        for step in range(6):
            bad = torch.tensor(step >= fails_at)
            skipped = torch.tensor(max(0, step - fails_at + 1))
            yield Step(step, zero, 0.1, zero, skipped, bad | no)
        raise FloatingPointError(f"at step {fails_at}")

    monkeypatch.setattr(engine, "train", late)
    with pytest.raises(FloatingPointError, match=f"at step {fails_at}"):
        run_of(config, eval_every=2, save_every=1, keep=9)
    state = Checkpoints(f"{config.output_dir}/checkpoints").load()
    assert state["done"] == fails_at
    records = json.loads(state["log"])[1:]
    assert [r["step"] for r in records] == [2, 4][: fails_at // 2]
    assert all(r["skipped_steps"] == 0 for r in records)
    log = Path(config.output_dir, "log.jsonl").read_text().splitlines()
    assert list(map(json.loads, log[1:])) == records


def test_a_batch_that_does_not_fit_gives_advice(config, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BertForPreTraining, "forward", refuse)
    with pytest.raises(BertnbError) as caught:
        pretrain(replace(config, batch_size=12, parts=2), progress=False)
    message = str(caught.value)
    assert "6 rows of sequence_length=24" in message
    assert "parts=3 takes 4 rows at a time" in message


def test_the_bar_is_shown_on_request(config, capsys):
    run_of(config, max_tokens=config.places(2))
    pretrain(config, progress=True)
    bar = capsys.readouterr().err
    assert "2/6" in bar  # where it goes on
    assert "6/6" in bar
    pretrain(replace(config, output_dir=f"{config.output_dir}-2"), False)
    assert capsys.readouterr().err == ""
