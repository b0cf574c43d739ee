"""finetune, evaluate, predict and answer, called in this process."""

import csv
import io
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from transformers import AutoTokenizer
from transformers import BertForSequenceClassification as Peer
from typer.testing import CliRunner, Result

import bertnb
from bertnb import cli, task_commands, terminal
from bertnb.fine_tuning import FineTuneResult
from bertnb.tasks import FineTuneConfig

TINY = bertnb.BertConfig(
    vocab_size=120,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)
GOOD = "a fine film", "we liked it", "so good", "great fun for us"
BAD = "a dull film", "we left it", "so bad", "no fun for us at all"
ROWS = [(t, "good") for t in GOOD] * 3 + [(t, "bad") for t in BAD] * 3
SPEED = "--device cpu --precision float32 --min-steps 1 --epochs 1".split()
QUICK = [*SPEED, "--learning-rate", "0.01", "--batch-size", "4"]
TAGS = "Ann B-PER\nsaw O\nBonn B-LOC\n\nBob I-PER\nleft O\n\n" * 6
CONTEXT = "Ann saw Bonn. Bob left it."


def run(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], input=input)


def told(*arguments: str | Path, input: str | None = None) -> Any:
    """Run a command with --json that must succeed; return what it says."""
    done = run(*arguments, "--json", input=input)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def write_rows(file: Path, rows: list[tuple[str, ...]], *names: str) -> Path:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([names, *rows])
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, and files for each kind of task."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [*GOOD, *BAD, CONTEXT, "Who saw Bonn? Who left it?"]
    tokenizer = bertnb.WordPieceTokenizer.train(texts, 120)
    torch.manual_seed(0)
    bertnb.BertModel(TINY).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    write_rows(folder / "reviews.csv", ROWS, "text", "label")
    pairs = [
        (a, b, str(1.5 * i))
        for i, (a, b) in enumerate(zip(GOOD, BAD, strict=True))
    ]
    write_rows(folder / "pairs.csv", pairs * 2, "first", "second", "score")
    (folder / "tags.conll").write_text(TAGS)
    asked = [
        {
            "id": f"q{i}",
            "question": "Who saw Bonn?",
            "answers": [{"text": "Ann", "answer_start": 0}],
        }
        for i in range(4)
    ]
    squad = [{"context": c, "qas": asked} for c in (CONTEXT, CONTEXT + " ")]
    whole = {"data": [{"paragraphs": squad}]}
    (folder / "squad.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="module")
def classifier(place: Path) -> Path:
    output = place / "classifier"
    base = "--model", place / "tiny", "--output", output, "--epochs=20"
    done = run("finetune", place / "reviews.csv", *QUICK, *base, "--held-out=0")
    assert done.exit_code == 0, done.stderr
    return output


# --- three commands


def test_a_table_becomes_a_classifier(place: Path, classifier: Path) -> None:
    facts = told("evaluate", classifier, place / "reviews.csv")
    assert facts == {
        "task": "classification",
        "examples": 24,
        "accuracy": 1.0,
    }
    done = run("predict", classifier, place / "reviews.csv")
    assert done.exit_code == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(r["text"], r["label"]) for r in rows] == ROWS
    model = bertnb.BertForSequenceClassification.from_pretrained(classifier)
    words = bertnb.WordPieceTokenizer.from_pretrained(classifier)
    task = bertnb.SequenceClassification(labels=model.label_names)
    (answer,) = bertnb.predict(
        task, model, words, [bertnb.TextExample("so good")], 32
    )
    assert float(rows[2]["score"]) == pytest.approx(answer["score"], abs=1e-6)


def test_transformers_loads_what_finetune_wrote(classifier: Path) -> None:
    theirs = Peer.from_pretrained(classifier).eval()
    encoded = AutoTokenizer.from_pretrained(classifier)(
        "we liked it", return_tensors="pt"
    )
    with torch.no_grad():
        p = theirs(**encoded).logits.softmax(-1)[0]
    (row,) = told("predict", classifier, "-", input="we liked it\n")["rows"]
    assert row["label"] == theirs.config.id2label[int(p.argmax())] == "good"
    assert row["score"] == pytest.approx(float(p.max()), abs=1e-5)


def test_what_finetune_reports(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [*QUICK, "--model", place / "tiny", "--output", "out"]
    facts = told("finetune", place / "reviews.csv", "--seed", "3", *asked)
    best = json.loads(Path("out/log.jsonl").read_text().splitlines()[1])
    assert facts == {
        "task": "classification",
        "examples": 21,
        "held_out": 3,
        "best_step": best["step"],
        "training_loss": best["training_loss"],
        "accuracy": best["accuracy"],
        "stopped": None,
        "output": "out",
        "next": "bertnb predict out FILE",
    }
    again = run("finetune", place / "reviews.csv", "--seed", "4", *asked)
    assert again.exit_code == 1
    assert "a run of another configuration" in again.stderr


# --- the other tasks


def test_numbers_are_learnt_as_numbers(place: Path, tmp_path: Path) -> None:
    columns = "--text", "first", "--pair", "second", "--label", "score"
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    held = "--validation", place / "pairs.csv"
    facts = told("finetune", place / "pairs.csv", *columns, *base, *held)
    assert (facts["task"], facts["held_out"]) == ("regression", 8)
    scores = told("evaluate", tmp_path / "m", place / "pairs.csv", *columns)
    assert scores["spearman"] == pytest.approx(facts["spearman"], abs=1e-3)
    file = tmp_path / "answers.jsonl"
    told(
        "predict",
        tmp_path / "m",
        place / "pairs.csv",
        *columns[:4],
        "--output",
        file,
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert list(rows[0]) == ["text", "text_pair", "number"]
    assert len(rows) == 8


def test_entities_are_found(place: Path, tmp_path: Path) -> None:
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    more = "--epochs", "25", "--held-out", "0"
    facts = told("finetune", place / "tags.conll", *base, *more)
    assert (facts["task"], facts["examples"]) == ("tokens", 12)
    scores = told("evaluate", tmp_path / "m", place / "tags.conll")
    assert scores["f1"] == 1.0
    words = tmp_path / "words.conll"
    words.write_text("Bob\nleft\n\nAnn\nleft\nBonn\n")
    rows = told("predict", tmp_path / "m", words)["rows"]
    found = [(r["sentence"], r["type"], r["text"], r["start"]) for r in rows]
    assert list(rows[0]) == "sentence type start end text score".split()
    assert (0, "PER", "Bob", 0) in found
    assert (1, "LOC", "Bonn", 2) in found


def test_a_table_without_rows_has_a_header() -> None:
    assert task_commands._table([], False) == (
        "sentence,type,start,end,text,score\n"
    )
    assert task_commands._table([], True) == ""
    one = [{"text": 'a "b"', "label": "x"}, {"text": "c", "label": "y"}]
    assert task_commands._table(one, False) == (
        'text,label\n"a ""b""",x\nc,y\n'
    )


def test_questions_are_answered(place: Path, tmp_path: Path) -> None:
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    more = "--epochs", "20", "--held-out", "0"
    facts = told("finetune", place / "squad.json", *base, *more)
    assert facts["next"].startswith("bertnb answer QUESTION --context FILE")
    scores = told("evaluate", tmp_path / "m", place / "squad.json")
    assert scores["exact_match"] == pytest.approx(100, abs=99.9)
    context = tmp_path / "text.txt"
    context.write_text(CONTEXT)
    call = "answer", "Who saw Bonn?", "--model", tmp_path / "m", "--context"
    found = told(*call, context)
    assert found["answer"] == CONTEXT[found["start"] : found["end"]] == "Ann"
    assert told(*call, "-", input=CONTEXT) == found
    none = run(*call, context, "--null-threshold", "-1000")
    assert none.stdout == "answer  (none in this text)\n"
    rows = told("predict", tmp_path / "m", place / "squad.json")["rows"]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3"] * 2


# --- what is read


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.csv", "text,label\na,x\n", "classification"),
        ("a.csv", "text,label\na,1\nb,0\n", "classification"),
        ("a.csv", "text,label\na,1.0\nb,0.0\n", "classification"),
        ("a.csv", "text,label\na,1\nb,0.5\n", "regression"),
        ("a.tsv", "text\tlabel\na\t-1.5\n", "regression"),
        ("a.jsonl", '{"text": "a", "label": 2.5}\n', "regression"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n', "classification"),
        ("a.jsonl", '{"text": "a", "label": {"T": {}}}\n', "tokens"),
        ("a.json", '{"text": "a", "label": {}}\n', "tokens"),
        ("a.json", '{\n"data": []}', "questions"),
        ("a.json", '{"data": []}', "questions"),
        ("a.conll", "a O\n", "tokens"),
        ("sst2", "", "classification"),
        ("stsb", "", "regression"),
        ("wnut17", "", "tokens"),
        ("xquad.zh", "", "questions"),
    ],
)
def test_what_a_file_is_for(
    name: str, content: str, kind: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(content)
    named = name if not content else str(file)
    assert bertnb.guess_kind(str(named)) == kind


def test_a_named_set_brings_its_own_validation(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERTNB_DATA", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    for part, count in (("train", 8), ("dev", 2)):
        lines = [f"{t}\t{int(y == 'good')}" for t, y in ROWS[::3][:count]]
        table = "\n".join(["sentence\tlabel", *lines])
        (tmp_path / f"sst2/{part}.tsv").write_text(table)
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    facts = told("finetune", "sst2", *base)
    assert (facts["examples"], facts["held_out"]) == (8, 2)
    assert told("evaluate", tmp_path / "m", "sst2")["examples"] == 2
    wrong = run("evaluate", tmp_path / "m", "wnut17")
    assert "wnut17 is for tokens, not for classification" in wrong.stderr


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_what_shares_its_text_stays_together(share: float) -> None:
    examples = [
        bertnb.TextExample(f"text {i // 3}", "x", f"pair {i // 3}")
        for i in range(60)
    ]
    learn, held = task_commands._hold_out(examples, share, 1)
    assert sorted(map(id, [*learn, *held])) == sorted(map(id, examples))
    assert share * 60 <= len(held) < share * 60 + 3
    assert not {e.text for e in learn} & {e.text for e in held}
    assert (learn, held) == task_commands._hold_out(examples, share, 1)
    other = task_commands._hold_out(examples, share, 2)
    assert (other == (learn, held)) == (not held and other == (learn, held))


def test_two_are_held_out_at_least() -> None:
    few = [bertnb.TextExample(f"text {i}", float(i)) for i in range(5)]
    assert len(task_commands._hold_out(few, 0.1, 0)[1]) == 2
    assert len(task_commands._hold_out(few[:2], 0.1, 0)[1]) == 1


def test_what_has_no_words_is_held_out_too() -> None:
    bare: list[Any] = [
        bertnb.TokenExample(()),
        bertnb.QuestionExample("q?", "", ()),
        bertnb.TextExample("", "x"),
        bertnb.TokenExample(("a",)),
    ]
    learn, held = task_commands._hold_out(bare, 0.5, 0)
    assert sorted(map(id, [*learn, *held])) == sorted(map(id, bare))


def test_where_some_questions_have_no_answer_none_is_an_answer() -> None:
    known = bertnb.QuestionExample("a?", "a b", (bertnb.Answer("a", 0),))
    none = bertnb.QuestionExample("c?", "a b", ())
    assert task_commands._task("questions", [known]).null_threshold is None
    assert task_commands._task("questions", [known, none]).null_threshold == 0


def test_of_one_example_nothing_is_held_out() -> None:
    one = [bertnb.TokenExample(("a",), ("O",))]
    assert task_commands._hold_out(one, 0.5, 0) == (one, [])


# --- the settings


def test_every_setting_is_an_option() -> None:
    types = {f.name: str(f.type) for f in fields(FineTuneConfig)}
    assert {*task_commands._SETTINGS} == {*types} - {"output_dir"}
    for name, (kind, help) in task_commands._SETTINGS.items():
        if not get_args(kind):
            assert types[name].removesuffix(" | None") == kind.__name__ or (
                f"'{kind.__name__}'" in types[name]
            )
        default = getattr(FineTuneConfig(), name)
        shown = "yes" if default is True else str(default)
        if default is not None and name not in (
            "device",
            "max_length",
            "learning_rate",
        ):
            assert f"[default: {shown}" in help, name


def test_every_option_arrives(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Any] = []

    def fine_tune(task: Any, model: Any, tokenizer: Any, config: Any) -> Any:
        caught.extend([task, config])
        return FineTuneResult(model, tokenizer, [], {}, None)

    monkeypatch.setattr("bertnb.fine_tuning.fine_tune", fine_tune)
    values: dict[str, Any] = {
        "epochs": 2,
        "min_steps": 3,
        "batch_size": 5,
        "group": 1,
        "max_length": 9,
        "learning_rate": 0.25,
        "warmup_ratio": 0.5,
        "schedule": "original",
        "weight_decay": 0.125,
        "bias_correction": False,
        "max_grad_norm": 2.0,
        "parts": 4,
        "frozen_layers": 0,
        "layer_decay": 0.75,
        "dropout": 0.25,
        "average": 0.5,
        "r_drop": 1.5,
        "eval_every": 7,
        "patience": 6,
        "seed": 8,
        "device": "cpu",
        "precision": "float32",
    }
    options = [f"--{k.replace('_', '-')}={v}" for k, v in values.items()]
    options.remove("--bias-correction=False")
    base = "--model", place / "tiny", "--output", tmp_path, "--balanced"
    call = "finetune", place / "reviews.csv", *base
    told(*call, *options, "--no-bias-correction")
    assert caught[1] == FineTuneConfig(output_dir=str(tmp_path), **values)
    assert caught[0].class_weights == "balanced"
    told(*call)  # by the width, and by what the model reads
    assert caught[3].learning_rate == 5e-5 * 768 / 16
    assert caught[3].max_length == 32


@pytest.mark.parametrize(
    ("stopped", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("patience", 0)]
)
def test_the_exit_code_says_how_a_run_ended(
    stopped: str,
    code: int,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fine_tune(task: Any, model: Any, tokenizer: Any, config: Any) -> Any:
        return FineTuneResult(model, tokenizer, [], {}, stopped)

    monkeypatch.setattr("bertnb.fine_tuning.fine_tune", fine_tune)
    base = "--model", place / "tiny", "--output", tmp_path, "--json"
    done = run("finetune", place / "reviews.csv", *base)
    assert done.exit_code == code
    facts = json.loads(done.stdout)
    assert facts["stopped"] == stopped
    assert (facts["next"] == "the same command goes on") == (code > 0)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("finetune nowhere.csv --output m", 1, "nowhere.csv"),
        ("finetune sst --output m", 1, "sets are sst2, "),
        ("finetune {p}/REVIEWS.CSV --output m --label a", 1, "no column 'a'"),
        (
            "finetune {p}/words.tsv --output m",
            1,
            "guessed: classification; --task",
        ),
        ("finetune - --output m", 1, "-: there is no such file"),
        ("finetune {p}/reviews.csv --validation - --output m", 1, "not -"),
        ("predict {c} {p}/tags.conll", 1, "trained for classification"),
        ("evaluate {c} {p}/many.csv", 1, "many.csv; "),
        ("predict {c} - --output no/a.csv", 2, "no is not writable"),
        ("predict {c} - --output {p}/many.csv/a.csv", 2, "is not writable"),
        (
            "finetune {p}/reviews.csv --task tokens --output m",
            1,
            "columns, the word first",
        ),
        ("predict {c} {p}/pairs.csv", 1, "that its finetune.json names"),
        ("finetune {p}/reviews.csv", 2, "--output"),
        ("finetune {p}/reviews.csv --output m --text a", 1, "no column 'a'"),
        ("finetune {p}/reviews.csv --output m --task tokens", 1, "csv:2: "),
        ("finetune {p}/reviews.csv --output m --task song", 2, "song"),
        ("finetune {p}/reviews.csv --output m --held-out 1", 2, "held-out"),
        (
            "finetune {p}/reviews.csv --output m --epochs 0 --model {p}/tiny",
            1,
            "epochs=0",
        ),
        ("finetune {p}/many.csv --output m", 1, "6 different labels in 6 rows"),
        ("finetune {p}/one.csv --output m", 1, "expected two classes"),
        ("evaluate {p}/tiny {p}/reviews.csv", 1, "bertnb finetune FILE"),
        ("evaluate {c} {p}/many.csv", 1, "expected one of bad, good"),
        ("evaluate {c} -", 1, "are read from a file, not -"),
        ("predict {p} -", 1, "config.json"),
        ("predict {c} {p}/pairs.csv", 1, "no column 'text'"),
        ("predict {c} - --output a.txt", 2, "expected .csv or .jsonl"),
        ("predict {c} - --batch-size 0", 1, "batch_size=0"),
        ("predict {c} - --max-length 0", 1, "max_length=0"),
        ("answer q --context - --model {c}", 1, "not for questions"),
        ("answer q --context -", 2, "--model"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_code(
    arguments: str,
    code: int,
    said: str,
    place: Path,
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [(f"text {i}", f"label {i}") for i in range(6)]
    write_rows(place / "many.csv", names, "text", "label")
    write_rows(place / "REVIEWS.CSV", ROWS, "text", "label")
    (place / "words.tsv").write_text(TAGS.replace(" ", "\t"))
    write_rows(place / "one.csv", [("a", "x"), ("b", "x")], "text", "label")
    call = arguments.format(p=place, c=classifier).split()
    done = run(*call, input="a line\n")
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.splitlines()[-1].startswith("error: ")


def test_evaluate_scores_no_answer_as_finetune_did(
    place: Path, tmp_path: Path
) -> None:
    whole = json.loads((place / "squad.json").read_text())
    asked = whole["data"][0]["paragraphs"][0]["qas"]
    asked.append({"id": "n", "question": "Who cares?", "answers": []})
    file = tmp_path / "some.json"
    file.write_text(json.dumps(whole))
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    learnt = told("finetune", file, *base, "--validation", file)
    call = "evaluate", tmp_path / "m", file, "--max-length", "32"
    names = "exact_match", "f1"
    zero = told(*call, "--null-threshold", "0")
    assert told(*call) == zero
    assert [zero[n] for n in names] == [learnt[n] for n in names]
    # never "no answer": what was answered with "" is wrong now
    never = told(*call, "--null-threshold", "1e9")
    base = "predict", tmp_path / "m", file
    kept, same = told(*base), told(*base, "--null-threshold", "0")
    assert kept == same  # it is kept beside the model
    (tmp_path / "m" / "finetune.json").unlink()
    assert told(*call) == zero  # seen in the file
    assert all(row["answer"] for row in told(*base)["rows"])
    assert never["exact_match"] <= zero["exact_match"]


def test_predict_does_not_look_at_labels(place: Path, tmp_path: Path) -> None:
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    told("finetune", place / "tags.conll", *base)
    other = tmp_path / "other.conll"
    other.write_text(TAGS.replace("PER", "CITY"))
    same = told("predict", tmp_path / "m", place / "tags.conll")
    assert told("predict", tmp_path / "m", other) == same


def test_predict_says_which_examples_it_was_at(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    told("finetune", place / "squad.json", *base)
    whole = json.loads((place / "squad.json").read_text())
    many = whole["data"][0]["paragraphs"][0]["qas"] * 600
    bad = {**many[0], "question": " "}
    whole["data"][0]["paragraphs"][0]["qas"] = [*many[:2050], bad]
    file = tmp_path / "many.json"
    file.write_text(json.dumps(whole))
    done = run("predict", tmp_path / "m", file)
    assert done.exit_code == 1
    assert ": example 2: the question" in done.stderr
    assert "(counted in the 7 examples from 2,048 on)" in done.stderr


def test_no_answer_in_the_scored_file_counts_too() -> None:
    known = bertnb.QuestionExample("a?", "a b", (bertnb.Answer("a", 0),))
    none = bertnb.QuestionExample("c?", "a b", ())
    task = task_commands._task("questions", [known], [none])
    assert task.null_threshold == 0


def test_a_model_remembers_its_columns(place: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "m", place / "pairs.csv"
    names = "--text", "first", "--pair", "second"
    told(
        "finetune",
        file,
        "--model",
        place / "tiny",
        "--output",
        folder,
        *names,
        "--label",
        "score",
        *QUICK,
    )
    rows = told("predict", folder, file)["rows"]
    assert rows == told("predict", folder, file, *names)["rows"]
    scores = told("evaluate", folder, file)
    assert scores == told("evaluate", folder, file, *names, "--label", "score")
    other = tmp_path / "other.csv"
    other.write_text(file.read_text().replace("first", "one"))
    assert told("predict", folder, other, "--text", "one")["rows"] == rows
    done = run("predict", folder, "-", input="a line\n")
    assert done.exit_code == 1
    assert "labels, pairs and questions are read from a file" in done.stderr


def test_a_tagger_reads_plain_lines(place: Path, tmp_path: Path) -> None:
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    told("finetune", place / "tags.conll", *base, "--epochs", "20")
    found = told("predict", tmp_path / "m", "-", input="Ann saw, Bonn.\n\n")
    file = tmp_path / "words.txt"
    file.write_text("Ann\nsaw\n,\nBonn\n.\n")
    assert found["rows"] == told("predict", tmp_path / "m", file)["rows"]
    assert found["rows"][0]["text"] == "Ann"


def test_cuda_where_there_is_none(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("predict", classifier, "-", "--device", "cuda", input="a\n")
    assert done.exit_code == 1
    assert "error: device='cuda': PyTorch sees no CUDA" in done.stderr


def test_the_help_names_every_set() -> None:
    told = " ".join(run("finetune", "--help").stdout.split())
    assert ", ".join(bertnb.NAMED_SETS) in told


def test_the_hint_is_given_only_where_it_helps(place: Path) -> None:
    file = place / "reviews.csv"
    done = run("finetune", file, "--output", "m", "--task", "tokens")
    assert "--task" not in done.stderr


def test_a_score_that_needs_a_library_says_so_first(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "--model", place / "tiny", "--output", tmp_path / "m", *QUICK
    columns = "--text", "first", "--pair", "second", "--label", "score"
    told("finetune", place / "pairs.csv", *base, *columns)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)

    def predict(*_: Any, **__: Any) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr("bertnb.tasks.predict", predict)
    done = run("evaluate", tmp_path / "m", place / "pairs.csv")
    assert "correlations need scipy" in done.stderr


def test_a_model_whose_first_save_was_killed(
    place: Path, classifier: Path, tmp_path: Path
) -> None:
    shutil.copytree(classifier, tmp_path / "m")
    (tmp_path / "m" / "config.json").rename(tmp_path / "m" / "config.json.tmp")
    rows = told("predict", tmp_path / "m", place / "reviews.csv")["rows"]
    assert rows == told("predict", classifier, place / "reviews.csv")["rows"]
    made = told("convert", tmp_path / "m", "--output", tmp_path / "out")
    assert made["model"] == "BertForSequenceClassification"


def test_a_file_may_be_written_again_where_its_folder_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.csv"
    closed = lambda path, _: Path(path) != tmp_path  # noqa: E731
    monkeypatch.setattr("os.access", closed)
    with pytest.raises(typer.BadParameter, match="is not writable"):
        terminal.check_output(file, ".csv")
    file.touch()
    terminal.check_output(file, ".csv")
