"""The page of results says what the records hold, and no bad line passes."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import results
import yaml
from manifest import ROOT

Add = Callable[..., None]


def run(**changes: Any) -> dict[str, Any]:
    """A run of the whole of SST-2, made up."""
    return {
        "task": "sst2",
        "model": "MiniLM-L6",
        "by": results.OURS,
        "scores": {"accuracy": 0.9},
        "seconds": 100.0,
        "cpu_seconds": 50.0,
        "examples": 67_349,
        "scored": 872,
        "plan": {"epochs": 2, "batch_size": 64},
        "precision": "float32",
        "command": "python benchmarks/fine_tuning.py sst2",
        "hardware": {"cpu": "an abacus", "cores": 2, "threads": 1, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "seed": 0,
        "commit": "abcdef0",
        **changes,
    }


@pytest.fixture
def add(tmp_path: Path) -> Add:
    def write(*entries: dict[str, Any], to: str = "fine-tuning.jsonl") -> None:
        with (tmp_path / to).open("a", encoding="utf-8") as file:
            for entry in entries:
                file.write(json.dumps(entry) + "\n")

    return write


def seeds(scores: list[float], **changes: Any) -> list[dict[str, Any]]:
    return [
        run(scores={"accuracy": score}, seed=seed, **changes)
        for seed, score in enumerate(scores)
    ]


def rows(text: str, first: str) -> list[list[str]]:
    """Return the lines of tables whose first cell is this."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [cells for cells in lines if cells[0] == first]


def test_means_deviations_and_differences(tmp_path: Path, add: Add) -> None:
    add(
        *seeds([0.90, 0.91, 0.92]),
        *seeds([0.90, 0.91, 0.95], by=results.THEIRS, seconds=300.0),
    )
    text = results.page(tmp_path)
    ours = rows(text, "`bertnb.fine_tune`")[0]
    theirs = rows(text, "`transformers.Trainer`")[0]
    assert ours[1:] == ["3", "91.00", "1.00", "100", "50"]
    # of 90, 91, 95: the squares 4, 1, 9 over 3 - 1
    assert theirs[1:5] == ["3", "92.00", f"{math.sqrt(7):.2f}", "300"]
    by = f"{-1 / math.sqrt(7):+.1f}"
    assert f"Difference: -1.00 points, {by} of the Trainer's dev" in text
    (line,) = rows(text, "[SST-2](#results-sst2)")
    assert line[2] == "**bertnb** 91.00 ± 1.00 (3)<br>Trainer 92.00 ± 2.65 (3)"
    assert line[3:] == ["–", "*yours to fill*"]


def test_each_seed_is_there_with_all_its_scores(
    tmp_path: Path, add: Add
) -> None:
    add(run(scores={"accuracy": 0.9, "f1": 0.8123}, seed=7))
    text = results.page(tmp_path)
    assert "accuracy | f1" in text
    found = [r for r in rows(text, "`bertnb.fine_tune`") if r[1] == "7"]
    assert found[0][2:4] == ["0.9000", "0.8123"]
    assert found[0][-1] == "abcdef0"
    assert f"\n{run()['command']}\n" in text


def test_one_seed_has_no_deviation(tmp_path: Path, add: Add) -> None:
    add(run(), run(by=results.THEIRS))
    text = results.page(tmp_path)
    assert rows(text, "`bertnb.fine_tune`")[0][3] == "–"
    assert "Difference: +0.00 points." in text


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"examples": 500}, "subset: 500 of 67,349 examples"),
        ({"scored": 100}, "subset: 100 of 872 scored"),
        ({"command": "python x.py --steps 3"}, "subset: 3 steps only"),
    ],
)
def test_a_subset_is_called_one(
    tmp_path: Path, add: Add, changes: dict[str, Any], label: str
) -> None:
    add(run())
    assert "subset" not in results.page(tmp_path)
    add(run(**changes))
    text = results.page(tmp_path)
    assert f"### MiniLM-L6 ({label})" in text
    assert f"*{label}*" in rows(text, "[SST-2](#results-sst2)")[0][2]


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": {"epochs": 3, "batch_size": 64}},
        {"precision": "bfloat16"},
        {"examples": 500},
    ],
)
def test_runs_that_differ_are_not_compared(
    tmp_path: Path, add: Add, changes: dict[str, Any]
) -> None:
    add(run(), run(by=results.THEIRS, **changes))
    assert "Difference" not in results.page(tmp_path)


def test_two_plans_are_told_apart(tmp_path: Path, add: Add) -> None:
    add(run(), run(plan={"epochs": 2, "batch_size": 32, "dropout": 0.0}))
    text = results.page(tmp_path)
    cell = rows(text, "[SST-2](#results-sst2)")[0][2]
    for said in ("batch size 64", "batch size 32, dropout 0.0"):
        assert f"### MiniLM-L6 ({said})" in text
        assert f"*{said}*" in cell


def test_the_latest_plan_is_first(tmp_path: Path, add: Add) -> None:
    add(
        run(),
        run(plan={"epochs": 3, "batch_size": 64}, scores={"accuracy": 0.5}),
    )
    (cells,) = rows(results.page(tmp_path), "[SST-2](#results-sst2)")
    assert cells[2].index("50.00") < cells[2].index("90.00")


def test_times_of_two_machines_are_not_set_side_by_side(
    tmp_path: Path, add: Add
) -> None:
    large = {"gpu": "a large one", "cores": 9}
    add(*seeds([0.90, 0.92]), *seeds([0.91], by=results.THEIRS, hardware=large))
    text = results.page(tmp_path)
    assert "Difference: +0.00 points" in text
    assert rows(text, "`bertnb.fine_tune`")[0][-2:] == ["–", "–"]
    one = [r for r in rows(text, "`transformers.Trainer`") if r[1] == "0"]
    assert one[0][-5:-1] == ["100", "50", "0.0", "a large one"]


def test_how_a_rate_was_chosen(tmp_path: Path, add: Add) -> None:
    assert "was chosen" not in results.page(tmp_path)
    for rate, score in ((1e-4, 0.5), (2e-4, 0.625)):
        entry = {"task": "sst2", "plan": {"epochs": 3, "learning_rate": rate}}
        add(entry | {"score": score}, to="fine-tuning-rates.jsonl")
    entry["plan"]["dropout"] = 0.0
    add(entry | {"score": 0.75}, to="fine-tuning-rates.jsonl")
    text = results.page(tmp_path)
    assert (
        "one seed each. Learning rate 0.0001 gave 50.00; 0.0002 gave 62.50; "
        "0.0002, dropout 0 gave 75.00."
    ) in text
    assert text.count("The plan was chosen") == 1


def test_the_column_of_a_reader_is_filled(tmp_path: Path, add: Add) -> None:
    add(*seeds([0.92, 0.94], model=results.COLAB))
    (line,) = rows(results.page(tmp_path), "[SST-2](#results-sst2)")
    assert line[4] == "**bertnb** 93.00 ± 1.41 (2)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "is no object"),
        (json.dumps({"task": "sst2"}), "there is no 'model'"),
        (
            json.dumps(run(seconds="long")),
            "seconds is 'long', which is no numb",
        ),
        (json.dumps(run(plan=[])), r"plan is \[\], which is no dict"),
        (json.dumps(run(task="sst3")), "task is 'sst3'; there are sst2, stsb"),
        (json.dumps(run(by="hand")), "by is 'hand'"),
        (json.dumps(run(scores={"f1": 1.0})), "the score 'accuracy' is None"),
        (json.dumps(run(scores={"accuracy": math.nan})), "'accuracy' is nan"),
        (
            json.dumps(run()),
            "seed 0 of sst2 by bertnb.fine_tune is there twice",
        ),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, add: Add, line: str, message: str
) -> None:
    add(run())
    with (tmp_path / "fine-tuning.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(results.RecordError, match=message) as found:
        results.page(tmp_path)
    assert str(found.value).startswith("fine-tuning.jsonl:2: ")


FACTS = {
    "command": "python b.py",
    "hardware": {"cpu": "an abacus", "gpu": None},
    "versions": {},
    "seed": 0,
}


def test_the_other_records_come_when_they_are_there(
    tmp_path: Path, add: Add
) -> None:
    bare = results.page(tmp_path)
    for share in (0.5, 0.7):
        entry = {"in words": {"f1": share}, "in pieces": {"f1": 0.4}}
        counts = {"in words": 10, "in pieces": 2000}
        add(
            {"question": "pieces", "labels": "every", "entities": counts}
            | entry
            | FACTS,
            to="taggers.jsonl",
        )
    add(
        {"by": "bag of words", "words in a row": 2, "features": 5000}
        | {"examples": 67349, "scores": {"accuracy": 0.8}}
        | {**FACTS, "seed": None},
        to="bag-of-words.jsonl",
    )
    text = results.page(tmp_path)
    assert rows(text, "every") == [
        ["every", "2", "60.00 ± 14.14", "40.00 ± 0.00", "10", "2,000"]
    ]
    assert rows(text, "2") == [["2", "5,000", "67,349", "80.00"]]
    assert text.startswith(bare.rstrip())
    add({"question": "pieces", "labels": "x", **FACTS}, to="taggers.jsonl")
    with pytest.raises(results.RecordError, match="'pieces' does not fit"):
        results.page(tmp_path)


def test_a_record_of_speed_is_shown(tmp_path: Path) -> None:
    peers = {"ours": {"tokens_per_second": 3000}}
    peers["other"] = {"tokens_per_second": 1500}
    result = {"command": "b.py", "what": "race", "ratio": {"bertnb": 1.5123}}
    timed = {"what": "texts", "texts": 200, "tokens": 9000, "threads": 1}
    timed |= {"rounds": 9, "sides": peers}
    ratio = {"ratio": 2.0, "quartile_1": 1.9, "quartile_3": 2.1}
    timed["compared"] = {"other": ratio}
    gap = {"relative_error": 2e-7, "largest_difference": 1e-6}
    timed["errors"] = {"ours": gap}
    file = tmp_path / "inference-cpu.json"
    file.write_text(json.dumps({"facts": FACTS, "results": [timed, result]}))
    text = results.page(tmp_path)
    assert rows(text, "ours") == [["ours", "3,000", "1", "2e-07, 1e-06"]]
    assert rows(text, "other") == [["other", "1,500", "2.00 (1.90 to 2.10)"]]
    assert rows(text, "ratio, bertnb") == [["ratio, bertnb", "1.512"]]
    file.write_text("{}")
    with pytest.raises(
        results.RecordError, match=r"inference-cpu\.json: no rec"
    ):
        results.page(tmp_path)


def test_fine_tuning_beside_the_trainer_in_time(tmp_path: Path) -> None:
    side = {"examples_per_second": 30.0, "examples_per_cpu_second": 40.0}
    other = {"examples_per_second": 20.0, "examples_per_cpu_second": 25.0}
    table = {"ours": side, "Trainer": other | {"ratio": 1.5, "cpu_ratio": 1.6}}
    result = {"name": "fine-tuning, SST-2", "batch": 32, "rounds": 4}
    result |= {"loss_difference": 1.2e-6, "float32": table, "bfloat16": {}}
    file = tmp_path / "fine-tuning-speed.json"
    file.write_text(json.dumps({"facts": FACTS, "results": [result]}))
    text = results.page(tmp_path)
    assert rows(text, "float32") == [
        ["float32", "**bertnb**", "30.00", "", "40.00"],
        ["float32", "Trainer", "20.00", "1.50", "25.00", "1.60"],
    ]
    assert "differ by 1e-06 at the most" in text


def test_the_page_of_the_records_that_are_there(tmp_path: Path) -> None:
    tool = str(ROOT / "tools" / "results.py")
    done = subprocess.run(
        [sys.executable, tool, "--into", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results.md").read_text("utf-8")
    for page in re.findall(r"\]\(\.\./(notebooks/\w+)\.ipynb\)", text):
        assert (ROOT / page).with_suffix(".md").exists(), page
    assert results.COMMAND in text


def test_the_page_is_made_and_is_in_the_book() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    assert "book/results" in files
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "tools/results.py --into $(SOURCE)/book" in makefile
