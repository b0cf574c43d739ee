"""Killed at any moment, stopped, damaged: the run ends with the same weights.

A server process imports the package once; each life of a run is a fork of it,
a process of its own that is really killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch

from bertnb import (
    BertConfig,
    BertForPreTraining,
    BertnbError,
    Checkpoints,
    PretrainConfig,
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
STEPS = 66  # ten lives take at most six steps each

SERVER = '''
import io, json, os, signal, sys, time, warnings
from pathlib import Path

import torch, torch.distributed, torch._dynamo, tqdm
import bertnb.engine as engine
import bertnb.runs as runs
from bertnb import BertConfig, BertForPreTraining, PretrainConfig
from bertnb import WordPieceTokenizer

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(moment, where, told, pause):
    """Change the code of this life so that it ends at the moment."""
    if moment in ("step", "tell"):
        train = engine.train
        def until(*arguments):
            for number, report in enumerate(train(*arguments), 1):
                if number == where and moment == "step":
                    die()
                if number == where:
                    Path(told).write_text("here")
                time.sleep(pause)
                yield report
        engine.train = until
    elif moment == "batch":  # in the thread that makes them
        batch, made = engine.PretrainingRun.batch, []
        def until(run, step):
            made.append(step)
            return die() if len(made) == where else batch(run, step)
        engine.PretrainingRun.batch = until
    elif moment == "half":  # of the checkpoint is written
        save = torch.save
        def until(state, file):
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[: int(where * len(whole.getvalue()))])
            file.flush()
            die()
        runs.torch.save = until
    elif moment == "written":
        digest = runs.file_digest
        def until(path):
            return die() if path.suffix == ".tmp" else digest(path)
        runs.file_digest = until
    elif moment == "named":  # and the oldest is not deleted yet
        runs._store_names = die
    elif moment == "evaluated":
        engine.PretrainingRun._write_log = die
    elif moment == "model":  # and the tokenizer is not written yet
        WordPieceTokenizer.save_pretrained = die

def live(config, moment, where, told, pause):
    arm(moment, where, told, pause)
    model = BertConfig(**config.pop("model"))
    warnings.simplefilter("always")
    result = engine.pretrain(PretrainConfig(model=model, **config), False)
    end = {"stopped": result.stopped, "records": result.records}
    Path(told).write_text(json.dumps(end))

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        task = json.loads(line)
        errors = os.open(task.pop("errors"), os.O_CREAT | os.O_RDWR)
        os.dup2(errors, 2)
        code = 1
        try:
            live(**task)
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


class Lives:
    """The server, and the files by which a life tells something."""

    def __init__(self, process, folder):
        self.process, self.folder = process, folder
        self.told, self.errors = folder / "told", folder / "errors"

    def say(self, config, moment="", where=0, pause=0.0):
        for path in (self.told, self.errors):
            path.unlink(missing_ok=True)
        task = {
            "config": asdict(config),
            "moment": moment,
            "where": where,
            "pause": pause,
            "told": str(self.told),
            "errors": str(self.errors),
        }
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def ended(self):
        return int(self.process.stdout.readline())

    def run(self, config, moment="", where=0):
        """Live a life; return how it ended, and what it told."""
        self.say(config, moment, where)
        code = self.ended()
        if code == 1:
            pytest.fail(self.errors.read_text())
        return code, json.loads(self.told.read_text()) if code == 0 else None

    @contextmanager
    def running(self, config, steps, pause=0.3):
        """Give the process of a run that has taken some steps, slowly."""
        pid = self.say(config, "tell", steps, pause)
        deadline = time.monotonic() + 100
        while not self.told.exists():
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.01)
        yield pid


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield Lives(process, tmp_path_factory.mktemp("lives"))
        process.stdin.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        animal = ("cat", "dog", "owl", "fox")[number % 4]
        lines = [f"The {animal} saw {n} birds on a tree." for n in range(9)]
        (folder / f"{number:02}.txt").write_text(" ".join(lines))
    return PretrainConfig(
        str(folder / "none"),
        SMALL,
        corpus=str(folder),
        sequence_length=24,
        batch_size=4,
        total_steps=STEPS,
        eval_every=6,
        save_every=3,
        eval_batches=1,
        mlm_probability=0.3,
        final_mlm_probability=0.15,
        device="cpu",
        precision="float32",
    )


@pytest.fixture
def config(base, tmp_path):
    return replace(base, output_dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(lives, base, tmp_path_factory):
    """What the run that nobody disturbs leaves."""
    folder = tmp_path_factory.mktemp("whole")
    code, told = lives.run(replace(base, output_dir=str(folder)))
    assert (code, told["stopped"]) == (0, None)
    return left_by(folder), told["records"]


def left_by(folder):
    return BertForPreTraining.from_pretrained(folder).state_dict()


def assert_ends_like(lives, config, whole):
    code, told = lives.run(config)
    assert (code, told["stopped"]) == (0, None)
    weights, records = whole
    ours = left_by(config.output_dir)
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    untimed = [
        [r | {"seconds": 0} for r in x] for x in (told["records"], records)
    ]
    assert untimed[0] == untimed[1]
    state = Checkpoints(f"{config.output_dir}/checkpoints").load()
    assert state["done"] == STEPS


def ten_moments():
    draw = random.Random(4)
    steps = [("step", draw.randint(1, 6)) for _ in range(2)]
    halves = [("half", draw.random()) for _ in range(2)]
    others = [("batch", draw.randint(1, 6))]
    fixed = ["written", "named", "evaluated", "model"]
    moments = [*steps, *halves, *others, *((name, 0) for name in fixed)]
    moments.append(("half", 1.0))  # all is written, and not yet stored
    draw.shuffle(moments)
    return moments


def test_killed_at_ten_random_moments_it_ends_with_the_same_weights(
    lives, config, whole
):
    moments = ten_moments()
    assert len(moments) == 10
    for moment, where in moments:
        code, _ = lives.run(config, moment, where)
        assert code == -signal.SIGKILL, moment
    assert_ends_like(lives, config, whole)


def test_killed_from_outside_at_random_times(lives, config, whole):
    draw = random.Random(0)
    for _ in range(2):
        with lives.running(config, draw.randint(1, 9), 0.05) as pid:
            time.sleep(draw.random() / 5)
            os.kill(pid, signal.SIGKILL)
        assert lives.ended() == -signal.SIGKILL
    assert_ends_like(lives, config, whole)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_saves_and_goes_on(lives, config, whole, which):
    with lives.running(config, steps=4) as pid:
        os.kill(pid, which)
    assert lives.ended() == 0, lives.errors.read_text()
    assert json.loads(lives.told.read_text())["stopped"] == which.name
    state = Checkpoints(f"{config.output_dir}/checkpoints").load()
    assert 4 <= state["done"] < STEPS
    exported = left_by(config.output_dir)  # a model can be had already
    assert all(torch.equal(exported[k], t) for k, t in state["model"].items())
    assert_ends_like(lives, config, whole)


def test_a_truncated_checkpoint_is_refused_and_the_one_before_used(
    lives, config, whole
):
    code, told = lives.run(replace(config, max_tokens=config.places(10)))
    assert (code, told["stopped"]) == (0, "max_tokens")
    checkpoints = Checkpoints(f"{config.output_dir}/checkpoints")
    older, newest = checkpoints.files()
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    assert_ends_like(lives, config, whole)
    errors = lives.errors.read_text()
    assert f"{newest} is damaged" in errors
    assert newest.with_suffix(".damaged").exists()
    log = (checkpoints.folder.parent / "log.jsonl").read_text()
    resumed = json.loads(log.splitlines()[0])["resumed_at"]
    assert resumed == [int(older.name[5:14])] == [9]


def test_a_second_process_on_the_folder_is_refused(lives, config):
    with lives.running(config, steps=1) as pid:
        with pytest.raises(BertnbError, match="another process is writing"):
            pretrain(config, progress=False)
        os.kill(pid, signal.SIGKILL)
    assert lives.ended() == -signal.SIGKILL
    result = pretrain(
        replace(config, max_tokens=config.places(1)), progress=False
    )
    assert result.stopped == "max_tokens"  # the folder is free
