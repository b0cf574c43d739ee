"""A corpus larger than memory.

Written by tools/extract.py from notebooks/10_shards.md: edit that notebook, not this file.
"""

import hashlib
import json
import multiprocessing
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from bertnb.configuration import BertnbError, read_json
from bertnb.data import Document, encode_documents
from bertnb.next_sentence import Sentence
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "Shard",
    "file_digest",
    "FORMAT",
    "SETTINGS",
    "Shards",
    "prepare",
    "Job",
]


# %% One file
@dataclass(frozen=True)
class Shard:
    """What the index says of one file."""

    file: str
    bytes: int
    sha256: str
    texts: str  # SHA-256 of the texts that it was made from
    documents: int
    sentences: int
    tokens: int


def _write_shard(
    documents: Iterable[Document], tokenizer: WordPieceTokenizer, path: Path
) -> Shard:
    """Encode documents into one file; it appears whole or not at all."""
    dtype = _id_type(tokenizer.vocab_size)
    ids, sentences, counts = [np.empty(0, dtype)], [0], [0]
    for document in documents:
        (encoded,) = encode_documents([document], tokenizer)
        if encoded:
            ids += [np.array(sentence, dtype) for sentence in encoded]
            sentences += map(len, encoded)
            counts.append(len(encoded))
    arrays = {
        "ids": np.concatenate(ids),
        "sentences": np.cumsum(sentences, dtype=np.uint32),  # (10.10)
        "documents": np.cumsum(counts, dtype=np.uint32),
    }
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(arrays, unfinished)
    shard = Shard(
        path.name,
        unfinished.stat().st_size,
        file_digest(unfinished),
        _text_digest(documents),
        len(counts) - 1,
        len(sentences) - 1,
        len(arrays["ids"]),
    )
    unfinished.replace(path)
    return shard


def _id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32  # (10.9)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _text_digest(documents: Iterable[Document]) -> str:
    digests = (hashlib.sha256(d.text.encode()).digest() for d in documents)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _fingerprint(tokenizer: WordPieceTokenizer) -> str:
    """Return 64 bits of a SHA-256 of what decides a text's ids."""
    cleaning = [tokenizer.lowercase, tokenizer.strip_accents]
    return hashlib.sha256(
        json.dumps([tokenizer.vocabulary, *cleaning], sort_keys=True).encode()
    ).hexdigest()[:16]


# %% The index, and reading
FORMAT = "bertnb shards 1"
SETTINGS = ("format", "tokenizer", "vocab_size", "dtype", "shard_characters")


@dataclass(frozen=True)
class _Index:
    """The file index.json of a folder."""

    settings: dict[str, Any]  # what decides the bytes, besides the texts
    shards: list[Shard]
    complete: bool

    @classmethod
    def read(cls, folder: Path) -> "_Index":
        path = folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no index.json: it is no folder of shards; "
                "`prepare` makes one"
            )
        values = read_json(path)
        try:
            settings = {name: values[name] for name in SETTINGS}
            shards = [Shard(**shard) for shard in values["shards"]]
            complete = values["complete"]
        except (KeyError, TypeError):
            settings = {"format": None}
        if settings["format"] != FORMAT:
            raise BertnbError(
                f"{path} is not an index in the format {FORMAT!r}: call "
                "`prepare` with another folder"
            )
        return cls(settings, shards, complete)

    def write(self, folder: Path) -> None:
        values = self.settings | {
            "complete": self.complete,
            "shards": [asdict(shard) for shard in self.shards],
        }
        unfinished = folder / "index.json.tmp"
        unfinished.write_text(json.dumps(values, indent=1), encoding="utf-8")
        unfinished.replace(folder / "index.json")

    def check(self, path: Path, shard: Shard, thorough: bool) -> None:
        """Raise a BertnbError unless a file is what the index says."""
        size = path.stat().st_size if path.is_file() else 0
        problem = ""
        if size != shard.bytes:
            problem = f"has {size} bytes; the index says {shard.bytes}"
        elif thorough and file_digest(path) != shard.sha256:
            problem = "has changed: its SHA-256 is not that of the index"
        elif thorough:
            problem = self._problem(path, shard)
        if problem:
            raise BertnbError(
                f"{path} {problem}. Delete this file, and call `prepare` as "
                "before: it makes what is missing"
            )

    def _problem(self, path: Path, shard: Shard) -> str:
        """Return what is wrong with a file's arrays, or an empty text."""
        try:
            with safe_open(path, framework="np") as file:
                ids, sentences, documents = map(
                    file.get_tensor, ("ids", "sentences", "documents")
                )
        except SafetensorError as error:
            return f"lacks an array: {error}"
        dtype, pieces = self.settings["dtype"], self.settings["vocab_size"]
        told = shard.documents, shard.sentences, shard.tokens
        sizes = len(documents) - 1, len(sentences) - 1, len(ids)
        ends = sizes[0], documents[-1], sentences[-1]
        checks = [
            (
                ids.dtype == dtype,
                f"holds ids of type {ids.dtype}; the index says {dtype}",
            ),
            (
                ids.max(initial=0) < pieces,
                f"holds the id {ids.max(initial=0)}; the vocabulary has "
                f"{pieces} pieces",
            ),
            (
                told == sizes == ends,
                f"holds {sizes} documents, sentences and tokens; the index "
                f"says {told}",
            ),
        ]
        return next((problem for holds, problem in checks if not holds), "")


@lru_cache(maxsize=2)  # so many files are mapped, however many there are
def _opened(path: Path, sha256: str) -> tuple[Any, Any, Any]:
    file: Any = safe_open(path, framework="np")
    return (
        file.get_slice("ids"),  # stays on the disk
        file.get_tensor("sentences"),
        file.get_tensor("documents"),
    )


class Shards:
    """A prepared corpus: a sequence of documents that stays on the disk.

    `shards[7]` reads document 7: a list of sentences, each a list of ids.
    `len(shards)` is the number of documents, `shards.tokens` that of the ids.
    """

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.folder, self.shards = folder, shards
        self.tokens = sum(shard.tokens for shard in shards)
        self._starts = [0, *accumulate(shard.documents for shard in shards)]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        tokenizer: WordPieceTokenizer | None = None,
        verify: bool = True,
    ) -> "Shards":
        """Open a folder that `prepare` has made.

        Args:
            tokenizer: if given, the shards must come from one like it.
            verify: read every file and compare its SHA-256 and its ids with
                the index; False: only the sizes of the files.

        Raises:
            FileNotFoundError: the folder holds no index.
            BertnbError: it is not finished, comes from another tokenizer, or
                a file is missing, truncated or changed.
        """
        folder = Path(folder)
        index = _Index.read(folder)
        if not index.complete:
            raise BertnbError(
                f"{folder} is not finished: call `prepare` as before, and it goes on"
            )
        if tokenizer and index.settings["tokenizer"] != _fingerprint(tokenizer):
            pieces = index.settings["vocab_size"]
            raise BertnbError(
                f"{folder} was made with another tokenizer, of {pieces} pieces; "
                f"this one has {tokenizer.vocab_size}. Use that one, or "
                "prepare another folder"
            )
        for shard in index.shards:
            index.check(folder / shard.file, shard, verify)
        return cls(folder, index.shards)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int, /) -> list[Sentence]:
        number = range(len(self))[number]  # -1 is the last; or IndexError
        place = bisect_right(self._starts, number) - 1
        shard = self.shards[place]
        ids, sentences, documents = _opened(
            self.folder / shard.file, shard.sha256
        )
        n = number - self._starts[place]
        first, last = documents[n : n + 2].tolist()
        bounds = sentences[first : last + 1].tolist()  # (10.10)
        flat = ids[bounds[0] : bounds[-1]].tolist()
        return [
            flat[a - bounds[0] : b - bounds[0]] for a, b in pairwise(bounds)
        ]

    def token_counts(self) -> Iterator[int]:
        """Give the number of tokens of each document, without their ids."""
        for shard in self.shards:
            path = self.folder / shard.file
            _, sentences, documents = _opened(path, shard.sha256)
            yield from np.diff(sentences[documents]).tolist()


# %% Preparing
def prepare(
    documents: Iterable[Document],
    tokenizer: WordPieceTokenizer,
    folder: str | Path,
    workers: int = 1,
    shard_characters: int = 2**24,
    progress: bool = False,
) -> Shards:
    """Encode documents into a folder of shards, and open it.

    The bytes depend on the texts, the tokenizer and `shard_characters`, not
    on `workers`. Stopped, and called again with the same documents, it goes on
    after the last finished shard, and makes those that are missing.

    Args:
        documents: they are read once, in order.
        workers: processes that encode. With several, the code of a program
            must stand under `if __name__ == "__main__":`.
        shard_characters: a shard takes documents until it has so many.
        progress: show a bar with tokens and documents a second.

    Raises:
        ValueError: the documents have no text, or a number is below 1.
        BertnbError: the folder holds something else, a finished shard is
            damaged, or a worker died.
    """
    if workers < 1 or shard_characters < 1:
        raise ValueError(
            f"workers={workers}, shard_characters={shard_characters}: expected "
            "1 or more"
        )
    folder = Path(folder)
    settings = {
        "format": FORMAT,
        "tokenizer": _fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "dtype": np.dtype(_id_type(tokenizer.vocab_size)).name,
        "shard_characters": shard_characters,
    }
    finished = _finished(folder, settings)
    jobs = _jobs(
        _parts(documents, shard_characters), tokenizer, folder, dict(finished)
    )
    with tqdm(
        desc="preparing", unit=" tokens", unit_scale=True, disable=not progress
    ) as bar:
        started, count = perf_counter(), 0
        for shard in _in_order(jobs, workers):
            finished[shard.file] = shard
            _Index(settings, [*finished.values()], False).write(folder)
            count += shard.documents
            speed = count / (perf_counter() - started)
            bar.set_postfix_str(f"{count:,} documents, {speed:,.0f}/s")
            bar.update(shard.tokens)
    if not any(shard.tokens for shard in finished.values()):
        raise ValueError(
            "documents is empty, or holds no text: nothing to prepare"
        )
    _Index(settings, [*finished.values()], True).write(folder)
    return Shards.open(folder, tokenizer, verify=False)


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Shard]:
    """Return the shards that a stopped call has left, each verified."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("*.tmp"):
        unfinished.unlink()
    if not (folder / "index.json").exists():
        return {}
    index = _Index.read(folder)
    for name, value in settings.items():
        if index.settings.get(name) != value:
            raise BertnbError(
                f"{folder} was prepared with {name}={index.settings.get(name)!r}, "
                f"not {value!r}: choose another folder, or delete this one"
            )
    for shard in index.shards:
        path = folder / shard.file
        if path.exists():
            index.check(path, shard, thorough=True)
    return {shard.file: shard for shard in index.shards}


def _parts(
    documents: Iterable[Document], characters: int
) -> Iterator[list[Document]]:
    """Give documents in lists that have so many characters, or are the last."""
    part, size = [], 0
    for document in documents:
        part.append(document)
        size += len(document.text)
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part


Job = tuple[list[Document], WordPieceTokenizer, Path]


def _jobs(
    parts: Iterable[list[Document]],
    tokenizer: WordPieceTokenizer,
    folder: Path,
    finished: dict[str, Shard],
) -> Iterator[Job]:
    """Give the shards to make; finished ones must be of the same texts."""
    number = -1
    for number, part in enumerate(parts):
        path = folder / f"{number:05}.safetensors"
        known = finished.get(path.name)
        if known and known.texts != _text_digest(part):
            raise BertnbError(
                f"{path} was made from other texts: prepare these documents "
                "in another folder"
            )
        if not known or not path.exists():
            yield part, tokenizer, path
    if number + 1 < len(finished):
        raise BertnbError(
            f"{folder} holds {len(finished)} shards, and the documents end "
            f"after {number + 1}: prepare them in another folder"
        )


def _in_order(jobs: Iterable[Job], workers: int) -> Iterator[Shard]:
    """Do the jobs, at most `workers` + 1 at a time, and give the shards in
    the jobs' order."""
    if workers == 1:
        yield from (_write_shard(*job) for job in jobs)
        return
    waiting: deque[Future[Shard]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _follow_parent) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(_write_shard, *job))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise BertnbError(
                "a worker process died: for lack of memory (take fewer "
                "workers), or because the program's code does not stand under "
                '`if __name__ == "__main__":`. Finished shards are kept'
            ) from error


def _follow_parent() -> None:
    """In a worker: end when the main process ends, even if it was killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one worker

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
