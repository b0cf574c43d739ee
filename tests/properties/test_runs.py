"""What a run is built on: saved states, a stop in time, batches made ahead."""

import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bertnb.configuration import BertnbError
from bertnb.runs import (
    Checkpoints,
    StopRequest,
    World,
    as_json,
    locked,
    prefetch,
    refuse_changes,
    settings_of,
    weights_digest,
)

# checkpoints


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "weights": torch.randn(3, 4),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "random": torch.get_rng_state(),
        "step": 7,
        "text": "a\nb",
        "nested": [{"none": None}, 0.1],
    }
    path = Checkpoints(tmp_path / "deep" / "er").save(7, state)
    back = Checkpoints(path.parent).load()
    assert back.keys() == state.keys()
    for name in ("weights", "half", "random"):
        assert torch.equal(back[name], state[name])
        assert back[name].dtype == state[name].dtype
    for name in ("step", "text", "nested"):
        assert back[name] == state[name]


def test_a_new_folder_has_no_state(tmp_path):
    assert Checkpoints(tmp_path / "nothing").load() is None
    assert Checkpoints(tmp_path / "nothing").files() == []


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_few_are_kept_and_the_newest_is_loaded(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (1, 9, 10, 99, 100, 1000):
        path = checkpoints.save(step, {"step": step})
        assert checkpoints.load() == {"step": step}
        assert checkpoints.files()[-1] == path
    kept = [int(path.name[5:14]) for path in checkpoints.files()]
    assert kept == [1, 9, 10, 99, 100, 1000][-keep:]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_step_that_is_saved_again_is_replaced(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for number in range(9):  # in any order of their digests
        path = checkpoints.save(5, {"number": number})
        assert checkpoints.load() == {"number": number}
        assert checkpoints.files() == [path]


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    others = ["step-1.pt", "step-000000003-best.pt", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    for step in (1, 2):
        checkpoints.save(step, {"step": step})
    assert checkpoints.load() == {"step": 2}
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """And the new name, before the old file goes."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    old = checkpoints.save(1, {"step": 1})
    seen, fsync = [], os.fsync

    def watch(handle):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    new = checkpoints.save(2, {"step": 2})
    assert seen == [[f"{os.getpid()}.tmp", old.name], [old.name, new.name]]
    assert checkpoints.files() == [new]


# one writer


def test_a_folder_has_one_writer(tmp_path):
    with (
        locked(tmp_path / "new"),
        pytest.raises(BertnbError, match=r"another process .*/new: wait"),
        locked(tmp_path / "new"),
    ):
        pytest.fail("two writers")
    with locked(tmp_path / "new"), locked(tmp_path / "another"):
        pass


# stop


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_note(which):
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), which)
        assert stop.name == which.name


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_interrupts(second):
    def both():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)
        time.sleep(5)  # the signal comes before its end

    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        both()
    assert stop.name == "SIGTERM"


def test_handlers_are_put_back():
    def handlers():
        return [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    before = handlers()
    with StopRequest():
        assert handlers()[0] not in before
    assert handlers() == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert handlers() == before


def test_a_thread_leaves_signals_alone():
    found = []

    def work():
        with StopRequest() as stop:
            found.append((stop.name, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
    assert signal.getsignal(signal.SIGTERM) == before


# ahead


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_order_and_from_another_thread(depth):
    def make(step):
        return step, threading.current_thread()

    items = list(prefetch(make, range(3, 40), depth))
    assert [step for step, _ in items] == list(range(3, 40))
    assert {thread for _, thread in items} != {threading.main_thread()}
    assert len({thread for _, thread in items}) == 1
    assert list(prefetch(make, [], depth)) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_are_made_ahead(depth):
    made = []
    items = prefetch(lambda step: made.append(step), iter(range(99)), depth)
    for taken in range(1, 5):
        next(items)
        deadline = time.monotonic() + 10
        while len(made) < taken + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # one more would come now
        assert len(made) == taken + depth
    items.close()


class TurnError(Exception):
    pass


def test_an_exception_comes_in_its_turn():
    def make(step):
        if step == 3:
            raise TurnError("three")
        return step

    items = prefetch(make, range(9), depth=9)
    for step in range(3):
        assert next(items) == step
        time.sleep(0.01)  # the thread has long failed
    with pytest.raises(TurnError, match="three"):
        next(items)

    def steps():
        yield 0
        raise TurnError("steps")

    items = prefetch(make, steps())
    assert next(items) == 0
    with pytest.raises(TurnError, match="steps"):
        next(items)


@pytest.mark.parametrize("taken", [1, 3])
@pytest.mark.parametrize("pause", [0, 0.05])
def test_the_thread_ends_with_the_iterator(taken, pause):
    before = set(threading.enumerate())
    items = prefetch(lambda step: step, iter(int, 1), depth=2)
    for _ in range(taken):
        next(items)
    time.sleep(pause)  # it waits for room, or does not yet
    assert set(threading.enumerate()) > before
    items.close()
    assert set(threading.enumerate()) == before


def test_the_thread_ends_when_the_reader_fails():
    before = set(threading.enumerate())

    def read():
        for item in prefetch(lambda step: step, range(99)):
            if item == 5:
                raise TurnError

    with pytest.raises(TurnError):
        read()
    assert set(threading.enumerate()) == before


def test_depth_is_at_least_one():
    with pytest.raises(ValueError, match="depth=0"):
        next(prefetch(lambda step: step, range(3), depth=0))


# processes


def test_one_process_is_the_whole_world(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    model = nn.Linear(2, 2)
    with World.join("cpu") as world:
        assert (world.rank, world.size) == (0, 1)
        assert world.device == torch.device("cpu")
        assert not dist.is_initialized()
        assert world.wrap(model) is model
        assert world.agree(None) is None
        assert world.agree("SIGTERM") == "SIGTERM"
        assert world.gather({"a": 1}) == [{"a": 1}]


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of the only process of a torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("torchrun")
def test_a_group_is_joined_and_left():
    with World.join("cpu") as world:
        assert (world.rank, world.size) == (0, 1)
        assert dist.is_initialized()
        with World.join("cpu") as again:  # as it is
            assert again == world
        assert dist.is_initialized()
    assert not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), World.join("cpu"):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def test_changed_settings_are_named_and_long_values_cut(tmp_path):
    was = {"seed": 0, "digest": "a" * 64, "old": 1}
    refuse_changes(was, {"seed": 0, "digest": "a" * 64}, tmp_path)
    now = {"seed": 1, "digest": "b" * 64, "new": 2}
    with pytest.raises(BertnbError) as caught:
        refuse_changes(was, now, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "seed was 0 and is 1; " in message
    assert f"digest was '{'a' * 59} and is '{'b' * 59}; " in message
    assert "new was None and is 2. Choose another output_dir" in message
    assert "old was" not in message


def test_settings_come_back_as_they_went():
    class Some:
        def __init__(self):
            self.pair, self.share = (1, 2), np.float32(0.5)
            self.by_name = MappingProxyType({"a": 1.0})
            self.act, self.long = len, ["x"] * 2000
            self._own, self.rows = 3, [4]

    found = settings_of(Some(), ("rows",))
    digest = found.pop("long")
    assert len(digest) == 16
    assert found == {
        "pair": [1, 2],
        "share": 0.5,
        "by_name": {"a": 1.0},
        "act": "builtin_function_or_method",
    }
    assert as_json(found) == found
    other = Some()
    other.long[7] = "y"
    assert settings_of(other)["long"] != digest


def test_the_digest_of_weights_is_of_names_shapes_and_bits():
    weights = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    digest = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == digest
    assert weights_digest({k: t.clone() for k, t in weights.items()}) == digest
    part = torch.arange(6.0).repeat_interleave(2)[::2]  # not contiguous
    assert weights_digest(weights | {"a": part}) == digest
    for other in (
        {"a": weights["b"], "b": weights["a"]},
        weights | {"b": -weights["b"]},
        weights | {"b": torch.ones(3, 2)},
        weights | {"a": weights["a"].double()},
        {"a": weights["a"]},
    ):
        assert weights_digest(other) != digest


def test_settings_of_data_classes_and_what_they_compute():
    @dataclass(slots=True)
    class Slots:
        smoothing: float = 0.0

    @dataclass(frozen=True)
    class Lazy:
        share: float = field(default=0.5, init=False)

        @cached_property
        def spread(self):
            return 1.2

    assert settings_of(Slots(0.5)) == {"smoothing": 0.5}
    lazy = Lazy()
    before = settings_of(lazy)
    assert before == {"share": 0.5}
    assert lazy.spread == 1.2
    assert settings_of(lazy) == before
