"""The installed program, as the shell and other programs meet it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from manifest import ROOT

import bertnb

PROGRAM = Path(sys.executable).with_name("bertnb")
SENTENCE = "The people of the United States have a right to know. "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(20):
        text = (SENTENCE + f"This is number {number}. ") * 8
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    model = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 200}
    model |= {"num_hidden_layers": 1, "intermediate_size": 32}
    values = {"model": model, "device": "cpu", "batch_size": 2}
    values |= {"eval_batches": 1, "eval_every": 20, "total_steps": 4000}
    (tmp_path / "run.json").write_text(json.dumps(values))
    return tmp_path


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [PROGRAM, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


PRETRAIN = "pretrain texts --output model --config run.json --json".split()


def test_the_program_is_this_module(folder: Path) -> None:
    out, err = start(folder, "--version").communicate()
    assert (out, err) == (f"bertnb {bertnb.__version__}\n", "")


def test_help_loads_nothing_that_is_slow() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; "
        "from bertnb.cli import app; "
        "done = [CliRunner().invoke(app, [*a.split(), '--help']).exit_code "
        "for a in ('', 'pretrain', 'prepare', 'bench', 'finetune')]; "
        "slow = 'torch', 'numpy', 'tokenizers', 'rich', 'tqdm'; "
        "print(done, [m for m in slow if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "[0, 0, 0, 0, 0] []\n"


def stop(folder: Path, number: signal.Signals) -> "tuple[int, str, str]":
    """Stop a run after its first checkpoint; return its code and its words."""
    with start(folder, *PRETRAIN) as program:
        checkpoints = folder / "model" / "checkpoints"
        until = time.monotonic() + 180
        while not list(checkpoints.glob("*.pt")) and time.monotonic() < until:
            time.sleep(0.05)
        program.send_signal(number)
        out, err = program.communicate(timeout=180)
    return program.returncode, out, err


def test_ctrl_c_saves_and_says_so(folder: Path) -> None:
    code, out, err = stop(folder, signal.SIGINT)
    assert code == 130, err
    assert json.loads(out)["stopped"] == "SIGINT"  # one document, no more
    assert "pretraining: " in err
    assert "Traceback" not in err


def test_a_run_that_is_terminated_goes_on_where_it_was(folder: Path) -> None:
    code, out, err = stop(folder, signal.SIGTERM)
    assert code == 143, err
    assert json.loads(out)["stopped"] == "SIGTERM"
    files = (folder / "model" / "checkpoints").glob("*.pt")
    last = max(int(file.name.split("-")[1]) for file in files)
    with start(folder, *PRETRAIN, "--max-seconds", "1") as program:
        out, err = program.communicate(timeout=180)
    assert program.returncode == 0, err
    assert json.loads(out)["stopped"] == "max_seconds"
    assert f"| {last}/4000 [" in err  # where its bar begins
    assert "| 0/4000 [" not in err


def test_a_reader_that_leaves_is_no_fault(folder: Path) -> None:
    (folder / "lines.txt").write_text("\n".join(["Peace."] * 300))
    with start(folder, "embed", "lines.txt", "--json") as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        err = program.stderr.read()
    assert "Traceback" not in err
    assert "error" not in err
    assert program.returncode == 1
