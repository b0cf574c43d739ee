"""Killed, torn, full: what a folder of checkpoints must survive."""

import errno
import fcntl
import os
import pickle
import random
import resource
import signal
import subprocess
import sys

import pytest
import torch

from bertnb.configuration import BertnbError
from bertnb.runs import Checkpoints, locked


def state_of(step):
    return {"step": step, "numbers": torch.full((5000,), float(step))}


def is_whole(state):
    return bool((state["numbers"] == state["step"]).all())


def filled(folder, steps=(1, 2)):
    checkpoints = Checkpoints(folder, keep=len(steps))
    for step in steps:
        checkpoints.save(step, state_of(step))
    return checkpoints


def child(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def damages():
    yield "empty", lambda content: b""
    for share in (0.001, 0.3, 0.5, 0.9, 0.999):
        yield f"{share}", lambda c, share=share: c[: int(share * len(c))]
    yield "less by one", lambda content: content[:-1]
    yield "more by one", lambda content: content + b"\0"
    yield "zeros", lambda content: bytes(len(content))
    for place in (0, 5000, -1):
        yield f"bit at {place}", lambda c, place=place: flipped(c, place)


def flipped(content, place):
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "damage", [d for _, d in damages()], ids=[name for name, _ in damages()]
)
def test_a_damaged_file_is_refused_and_the_one_before_taken(tmp_path, damage):
    checkpoints = filled(tmp_path)
    path = checkpoints.files()[-1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged") as caught:
        state = checkpoints.load()
    assert state["step"] == 1
    assert is_whole(state)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert path.with_suffix(".damaged").exists()  # for whoever looks into it
    assert checkpoints.load()["step"] == 1  # without a warning, which fails
    checkpoints.save(2, state_of(2))
    assert checkpoints.load()["step"] == 2


def test_a_bit_that_torch_does_not_see(tmp_path):
    checkpoints = filled(tmp_path)
    path = checkpoints.files()[-1]
    content = path.read_bytes()
    two = torch.full((4,), 2.0).numpy().tobytes()
    path.write_bytes(flipped(content, content.index(two) + 2))
    assert not is_whole(torch.load(path, weights_only=True))
    with pytest.warns(UserWarning, match="damaged"):
        assert is_whole(checkpoints.load())


def test_all_damaged_is_an_error_each_time(tmp_path):
    """The second call must not begin anew without a word."""
    checkpoints = filled(tmp_path)
    for path in checkpoints.files():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(BertnbError, match=r"every checkpoint .* is damaged"),
    ):
        checkpoints.load()
    with pytest.raises(BertnbError, match=r"every checkpoint .* is damaged"):
        checkpoints.load()


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    checkpoints = filled(tmp_path)
    whole = checkpoints.files()[-1].read_bytes()
    for name in ("1.tmp", "2.tmp"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert checkpoints.load()["step"] == 2
    checkpoints.save(3, state_of(3))
    assert not list(tmp_path.glob("*.tmp"))
    assert checkpoints.load()["step"] == 3


class Harmful:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_file_that_would_run_a_program_does_not(tmp_path):
    """Its digest is right: whoever made it could name it."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"state": Harmful(tmp_path / "made")})
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.load()
    assert not (tmp_path / "made").exists()


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("when", ["writing", "storing"])
def test_a_full_disk_takes_nothing_away(tmp_path, monkeypatch, when):
    checkpoints = filled(tmp_path)
    before = checkpoints.files()

    def half(state, file):
        file.write(b"half")
        disk_full()

    with monkeypatch.context() as patch:
        if when == "writing":
            patch.setattr(torch, "save", half)
        else:
            patch.setattr(os, "fsync", disk_full)
        with pytest.raises(BertnbError, match=r"step 3 .*No space left"):
            checkpoints.save(3, state_of(3))
    assert sorted(tmp_path.iterdir()) == before
    assert checkpoints.load()["step"] == 2
    checkpoints.save(3, state_of(3))
    assert checkpoints.load()["step"] == 3


def test_a_file_that_may_not_grow_is_refused(tmp_path):
    """The operating system refuses the bytes, in the middle of the file."""
    checkpoints = filled(tmp_path)
    before = checkpoints.files()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(BertnbError, match="step 3 could not be written"):
            checkpoints.save(3, {"numbers": torch.ones(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert checkpoints.load()["step"] == 2


SAVER = """
import sys
import torch
from bertnb.runs import Checkpoints, locked

with locked(sys.argv[1]):
    checkpoints = Checkpoints(sys.argv[1], keep=1)
    step = (checkpoints.load() or {"step": 0})["step"]
    while True:
        step += 1
        numbers = torch.full((300_000,), float(step))
        checkpoints.save(step, {"step": step, "numbers": numbers})
        print(step, flush=True)
"""


def test_killed_while_saving_a_whole_one_is_there_and_the_lock_is_free(
    tmp_path,
):
    """Nearly all the time of this program goes into saving. (10 kills of a
    whole run: test_engine.py.)"""
    draw, step = random.Random(0), 0
    for _ in range(3):
        with child(SAVER, tmp_path) as process:
            told = [int(process.stdout.readline())]
            assert told[0] == step + 1
            with (
                pytest.raises(BertnbError, match="another process"),
                locked(tmp_path),
            ):
                pytest.fail("two writers")
            for _ in range(draw.randrange(9)):
                told.append(int(process.stdout.readline()))
            process.send_signal(signal.SIGKILL)
            told += map(int, process.stdout.read().split())
        assert process.returncode == -signal.SIGKILL
        with locked(tmp_path):  # free: the system let go of it
            state = Checkpoints(tmp_path).load()
        assert is_whole(state)
        assert told[-1] <= state["step"] <= told[-1] + 1
        assert len(Checkpoints(tmp_path).files()) <= 2
        step = state["step"]


def test_a_file_system_without_locks_is_no_reason_to_stop(
    tmp_path, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        ran = True
    assert ran
