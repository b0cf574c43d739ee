"""Runs that survive.

Written by tools/extract.py from notebooks/11_runs.md: edit that notebook, not this file.
"""

import hashlib
import json
import os
import queue
import re
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from numbers import Real
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from bertnb.configuration import BertnbError
from bertnb.folders import WEIGHTS
from bertnb.optimization import pick_device
from bertnb.shards import file_digest

__all__ = [
    "Checkpoints",
    "CHECKPOINT",
    "refuse_changes",
    "as_json",
    "settings_of",
    "weights_digest",
    "locked",
    "StopRequest",
    "prefetch",
    "World",
]


# %% A checkpoint is whole, or it is none
class Checkpoints:
    """The last checkpoints of a run, in a folder of their own.

    A file is called `step-000000500-3f9a0c77d1e2b456.pt`: the step, and the
    first 16 digits of the SHA-256 of its bytes. It gets this name when it is
    whole and on the disk, so a save that was killed leaves only a `.tmp`.

    Args:
        keep: how many are kept; older ones go when a new one is there.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: expected 1 or more checkpoints")
        self.folder, self.keep = Path(folder), keep

    def files(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        found = self.folder.glob("step-*.pt")
        return sorted(p for p in found if CHECKPOINT.fullmatch(p.name))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a state of tensors, numbers, texts, lists and dictionaries.

        Another state of the same step is replaced.

        Raises:
            BertnbError: it could not be written; the last one is untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        unfinished = self.folder / f"{os.getpid()}.tmp"
        try:
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's own for a full disk
            unfinished.unlink(missing_ok=True)
            raise BertnbError(
                f"the checkpoint of step {step} could not be written to "
                f"{self.folder}: {error}. Make room; the run goes on from the "
                "checkpoint before"
            ) from error
        name = f"step-{step:09}-{file_digest(unfinished)[:16]}.pt"
        path = unfinished.replace(self.folder / name)
        _store_names(self.folder)
        for old in self.files():
            if old.name[:14] == name[:14] and old != path:
                old.unlink()
        for old in self.files()[: -self.keep]:
            old.unlink()
        return path

    def load(self, device: str | torch.device = "cpu") -> dict[str, Any] | None:
        """Return the newest state that is whole; None if there is none yet.

        A file whose bytes are not those of its name is set aside under
        another name, with a warning, and the one before is taken.

        Raises:
            BertnbError: there were checkpoints, and every one is damaged.
        """
        for path in reversed(self.files()):
            if file_digest(path)[:16] == path.stem.rpartition("-")[2]:
                return torch.load(path, map_location=device, weights_only=True)
            path.rename(path.with_suffix(".damaged"))
            warnings.warn(
                f"{path} is damaged (its bytes are not those that were "
                "written) and now called .damaged: taking the one before",
                stacklevel=2,
            )
        if any(self.folder.glob("step-*.damaged")):
            raise BertnbError(
                f"every checkpoint in {self.folder} is damaged: delete the "
                "folder to begin anew"
            )
        return None


CHECKPOINT = re.compile(r"step-\d{9}-[0-9a-f]{16}\.pt")


def _store_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_changes(
    was: Mapping[str, Any], now: Mapping[str, Any], folder: str | Path
) -> None:
    """Compare what must be the same when a run goes on: settings, data.

    Raises:
        BertnbError: something is not; the message names each, before and
            now, by its first 60 characters.
    """
    changed = [
        f"{name} was {was.get(name)!r:.60} and is {value!r:.60}"
        for name, value in now.items()
        if was.get(name) != value
    ]
    if changed:
        raise BertnbError(
            f"{folder} holds a run of another configuration: "
            f"{'; '.join(changed)}. Choose another output_dir, or delete it"
        )


def as_json(value: Any) -> Any:
    """Return a value as it comes back from a file of JSON.

    What JSON cannot hold becomes a number or a dict if it is like one, else
    the name of its type; keys that it cannot hold are left out.
    """
    return json.loads(json.dumps(value, skipkeys=True, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return float(value) if isinstance(value, Real) else type(value).__name__


def settings_of(value: object, but: Collection[str] = ()) -> dict[str, Any]:
    """Return an object's attributes by name, as JSON; of long ones a digest.

    Left out are those of `but`, cached properties, and names that begin with
    `_`.
    """
    found: dict[str, Any] = {}
    fields = getattr(value, "__dataclass_fields__", ())
    for name in sorted({*fields, *getattr(value, "__dict__", ())}):
        computed = isinstance(getattr(type(value), name, None), cached_property)
        if name[0] != "_" and name not in but and not computed:
            found[name] = as_json(getattr(value, name, None))
            text = json.dumps(found[name], sort_keys=True)
            if len(text) > 2000:
                found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and bytes: one for one model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# %% One writer a folder
try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder, so that no second process writes to it.

    The lock belongs to the process: it is gone when the process is, however
    it ended. Where the system has no such locks (Windows), nothing is held;
    where the file system has none, neither, and a warning says so.

    Raises:
        BertnbError: another process holds the folder, or it holds a model
            that no run has written there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ours = any((folder / name).exists() for name in (".lock", "checkpoints"))
    if not ours and any((folder / name).exists() for name in WEIGHTS):
        raise BertnbError(
            f"{folder} holds a model that no run has written there, and it "
            "would be overwritten: choose another folder"
        )
    with (folder / ".lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BertnbError(
                    f"another process is writing to {folder}: wait for it, or "
                    "choose another folder"
                ) from error
            except OSError as error:  # of some network file systems
                warnings.warn(
                    f"{folder} cannot be locked ({error}): take care that only "
                    "one process writes to it",
                    stacklevel=3,
                )
        yield


# %% Stop between two steps
class StopRequest:
    """Within `with`, SIGTERM and SIGINT (Ctrl-C) only leave a note.

    `name` is then "SIGTERM" or "SIGINT", else None; whoever runs a loop looks
    at it between two steps. A second signal interrupts at once. In a thread
    that is not the main one, signals are left alone.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                self._before[which] = signal.signal(which, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)


# %% Batches made ahead
_Item = TypeVar("_Item")


def prefetch(
    make: Callable[[int], _Item], steps: Iterable[int], depth: int = 2
) -> Iterator[_Item]:
    """Give `make(step)` for each step, made by a thread, `depth` ahead.

    What the thread raises is raised here, in its turn. The thread ends with
    the iterator.

    Raises:
        ValueError: `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth={depth}: expected 1 or more items ahead")
    made: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    over = threading.Event()

    def work() -> None:
        try:
            for step in steps:
                room.acquire()
                if over.is_set():
                    return
                made.put((True, make(step)))
            made.put((False, None))
        except BaseException as error:  # the reader's to handle
            made.put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            whole, item = made.get()
            if not whole:
                if item is not None:
                    raise item
                return
            room.release()
            yield item
    finally:
        over.set()
        room.release()
        thread.join()


# %% Several processes as one
@dataclass(frozen=True)
class World:
    """The processes of a run: this one's number, and how many there are."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    @contextmanager
    def join(cls, device: str | None = None) -> Iterator["World"]:
        """Join the processes that torchrun has started, or be the only one.

        On CUDA each process takes the GPU of its local number. A group that
        is already there is used, and left as it is.
        """
        chosen = pick_device(device)
        if "RANK" not in os.environ:
            yield cls(0, 1, chosen)
            return
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        mine = not dist.is_initialized()
        if mine:
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, **_meeting_place())
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), chosen)
        finally:
            if mine:
                dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a model whose gradients are the mean over the processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def agree(self, wish: str | None) -> str | None:
        """Return the wish of the first process that has one, on all alike."""
        if self.size == 1:
            return wish
        return next((w for w in self.gather(wish) if w is not None), None)

    def gather(self, item: Any) -> list[Any]:
        """Return what each process gives, in order of rank, on all alike."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items


_GROUPS = count()  # that this process has made


def _meeting_place() -> dict[str, Any]:
    """Return where a new group finds its members: a shelf of its own.

    The list of addresses that torchrun keeps outlives groups and restarts, and
    whoever reads an old one calls a process that is gone (pytorch 167288).
    """
    there = os.environ
    if there.get("LOCAL_WORLD_SIZE") != there["WORLD_SIZE"]:
        return {}  # each machine counts its own restarts
    store, rank, size = next(iter(rendezvous("env://")))
    attempt = there.get("TORCHELASTIC_RESTART_COUNT", "0")
    shelf = PrefixStore(f"{attempt}/{next(_GROUPS)}", store)
    return {"store": shelf, "rank": rank, "world_size": size}
