"""What must hold of a corpus on the disk: whoever made it, whatever happened."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bertnb.configuration import BertnbError
from bertnb.data import Document, encode_documents
from bertnb.rows import PretrainingData
from bertnb.shards import Shards, _opened, file_digest, prepare
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "book" / "runs" / "data-memory.json"
PIECES = [*SPECIAL_TOKENS, *map(str, range(95))]
TOKENIZER = WordPieceTokenizer({t: i for i, t in enumerate(PIECES)})
PART = 100  # characters


def texts(number=40):
    """Documents of 1 to 7 sentences; every ninth is empty."""
    for i in range(number):
        lines = [f"{i} {7 * i % 95} {j}" for j in range(i % 7 + 1)]
        yield Document(str(i), "" if i % 9 == 8 else "\n\n".join(lines))


def make(folder, documents=None, workers=1, **changes):
    documents = texts() if documents is None else documents
    settings = {"shard_characters": PART} | changes
    return prepare(documents, TOKENIZER, folder, workers, **settings)


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}


def filled(documents):
    encoded = encode_documents(documents, TOKENIZER)
    return [document for document in encoded if document]


# the same documents


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=9),
    st.integers(1, 60),
)
def test_the_disk_holds_what_memory_held(tmp_path_factory, shape, part):
    documents = [
        Document("", "\n\n".join(" ".join(["7"] * n) for n in document))
        for document in [*shape, [2]]
    ]
    folder = tmp_path_factory.mktemp("shards")
    shards = make(folder, documents, shard_characters=part)
    expected = filled(documents)
    assert len(shards) == len(expected)
    assert list(shards) == expected
    counts = [sum(map(len, document)) for document in expected]
    assert list(shards.token_counts()) == counts
    assert shards.tokens == sum(counts)


def test_documents_are_numbered_as_in_a_list(tmp_path):
    shards, expected = make(tmp_path), filled(texts())
    assert len(shards.shards) > 5
    for number in (0, 1, 17, len(expected) - 1, -1, -len(expected)):
        assert shards[number] == expected[number]
    for number in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            shards[number]


def test_shards_travel_to_other_processes(tmp_path):
    shards = make(tmp_path)
    assert list(pickle.loads(pickle.dumps(shards))) == list(shards)


def test_batches_are_those_of_the_list(tmp_path):
    some = {"length": 16, "batch_size": 4, "block_tokens": 150}
    one = PretrainingData(make(tmp_path), TOKENIZER, **some)
    other = PretrainingData(filled(texts()), TOKENIZER, **some)
    assert one.batches_per_epoch == other.batches_per_epoch
    assert one._blocks > 1
    for step in range(2 * one.batches_per_epoch):
        a, b = one.batch(step), other.batch(step)
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_at_most_two_files_are_mapped(tmp_path):
    shards = make(tmp_path)
    list(shards)
    assert _opened.cache_info().maxsize == 2
    assert len(shards.shards) > 2


def test_a_folder_that_was_made_anew_is_read_anew(tmp_path):
    one = make(tmp_path)
    first = one[0]
    for file in tmp_path.iterdir():
        file.unlink()
    other = make(tmp_path, [Document("", "94 93")])
    assert other[0] == [[99, 98]] != first


def test_a_document_larger_than_a_part_is_one_document(tmp_path):
    large = Document("", "\n\n".join(["1 2 3"] * 500))
    shards = make(tmp_path, [Document("", "4"), large, Document("", "5")])
    assert [len(document) for document in shards] == [1, 500, 1]
    assert [shard.documents for shard in shards.shards] == [2, 1]


# whoever makes it


def asked(folder, seen):
    """Give the texts, and note how many shards were finished at each."""
    for document in texts():
        index = folder / "index.json"
        shards = (
            json.loads(index.read_text())["shards"] if index.exists() else []
        )
        seen.append(len(shards))
        yield document


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    make(tmp_path / "one")
    seen = []
    shards = make(tmp_path / "more", asked(tmp_path / "more", seen), workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "more")
    parts = len(shards.shards)
    assert parts > workers + 3
    # it reads ahead by a part a worker and one more, not by the corpus
    assert seen[-1] >= parts - workers - 2


def test_documents_are_asked_for_a_part_at_a_time(tmp_path):
    seen = []
    shards = make(tmp_path, asked(tmp_path, seen))
    assert seen[-1] == len(shards.shards) - 1
    assert set(seen) == set(range(len(shards.shards)))


def test_names_and_facts_of_documents_change_no_byte(tmp_path):
    make(tmp_path / "a")
    make(
        tmp_path / "b", [replace(d, name="x", facts={"y": 1}) for d in texts()]
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


PROGRAM = """
import sys, time
sys.path.insert(0, {here!r})
from test_shards import make, texts

def slow():
    for i, document in enumerate(texts()):
        if i == 30:
            time.sleep(600)
        yield document

if __name__ == "__main__":
    make(sys.argv[1], slow(), int(sys.argv[2]))
"""


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(") ", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


@pytest.mark.skipif(not Path("/proc/1/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_called_again_it_goes_on(tmp_path, workers):
    program, folder = tmp_path / "program.py", tmp_path / "killed"
    program.write_text(PROGRAM.format(here=str(Path(__file__).parent)))
    run = subprocess.Popen([sys.executable, program, folder, str(workers)])
    index = folder / "index.json"
    try:
        assert wait_until(
            lambda: (
                index.exists()
                and len(json.loads(index.read_text())["shards"]) > 2
            )
        )
    finally:
        workers_of_it = children(run.pid)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert len(workers_of_it) >= (2 if workers == 2 else 0)
    assert wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers_of_it)
    ), "a worker outlived the process that started it"
    with pytest.raises(BertnbError, match="is not finished: call `prepare`"):
        Shards.open(folder)
    (folder / "00007.99.tmp").write_text("half a shard")
    finished = [s["file"] for s in json.loads(index.read_text())["shards"]]
    times = {f: (folder / f).stat().st_mtime_ns for f in finished}
    make(folder)
    make(tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")
    for file, written in times.items():
        assert (folder / file).stat().st_mtime_ns == written


def test_called_again_on_a_finished_folder_it_changes_nothing(tmp_path):
    make(tmp_path)
    before = contents(tmp_path)
    times = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")}
    assert list(make(tmp_path, workers=2)) == filled(texts())
    assert contents(tmp_path) == before
    for file, written in times.items():
        assert file.stat().st_mtime_ns == written


def test_a_missing_shard_is_made_again(tmp_path):
    make(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "00002.safetensors").unlink()
    make(tmp_path)
    assert contents(tmp_path) == before


def test_the_progress_bar_shows_tokens_and_documents_a_second(tmp_path, capsys):
    make(tmp_path / "a", progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"tokens/s, 36 documents, [\d,]+/s", shown)
    make(tmp_path / "b")
    assert capsys.readouterr().err == ""


# what is refused


@pytest.mark.parametrize("name", ["workers", "shard_characters"])
def test_numbers_below_one_are_an_error(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0.*expected 1 or more"):
        make(tmp_path, **{name: 0})


@pytest.mark.parametrize("documents", [[], [Document("a", " \n ")]])
def test_a_corpus_without_text_is_an_error(tmp_path, documents):
    with pytest.raises(ValueError, match="documents is empty, or holds no"):
        make(tmp_path, documents)
    with pytest.raises((BertnbError, FileNotFoundError)):
        Shards.open(tmp_path)


OTHERS = {
    "changed": lambda: [*texts(39), Document("", "1")],
    "another order": lambda: [*texts()][::-1],
    "fewer": lambda: texts(20),
    "none": list,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_documents_in_the_same_folder_are_an_error(tmp_path, name):
    make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(BertnbError, match="another folder"):
        make(tmp_path, OTHERS[name]())
    assert contents(tmp_path) == before


def test_texts_do_not_run_into_each_other(tmp_path):
    make(tmp_path, [Document("", "1 2"), Document("", "3")])
    with pytest.raises(BertnbError, match="was made from other texts"):
        make(tmp_path, [Document("", "1 "), Document("", "23")])


def variants():
    swapped = PIECES[:-2] + PIECES[:-3:-1]
    vocabulary = dict(TOKENIZER.vocabulary)
    yield "tokenizer", WordPieceTokenizer({t: i for i, t in enumerate(swapped)})
    yield "tokenizer", WordPieceTokenizer(vocabulary, lowercase=False)
    yield "tokenizer", WordPieceTokenizer(vocabulary, strip_accents=False)
    yield "tokenizer", WordPieceTokenizer(vocabulary | {"new": len(PIECES)})


@pytest.mark.parametrize("number", range(4))
def test_another_tokenizer_is_an_error(tmp_path, number):
    make(tmp_path)
    name, other = list(variants())[number]
    with pytest.raises(BertnbError, match=f"was prepared with {name}="):
        prepare(texts(), other, tmp_path, shard_characters=PART)
    message = f"another tokenizer, of 100 pieces; .* {other.vocab_size}"
    with pytest.raises(BertnbError, match=message):
        Shards.open(tmp_path, other)
    Shards.open(tmp_path, TOKENIZER)


def test_another_size_of_parts_is_an_error(tmp_path):
    make(tmp_path)
    with pytest.raises(BertnbError, match="shard_characters=100, not 99: cho"):
        make(tmp_path, shard_characters=99)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message", "seen_at_once"),
    [
        (flip, "has changed: its SHA-256", False),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-3]),
            "has .* bytes; the",
            True,
        ),
        (lambda p: p.write_bytes(p.read_bytes() + b"0"), "has .* bytes", True),
        (Path.unlink, "has 0 bytes; the index says", True),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, harm, message, seen_at_once):
    make(tmp_path)
    before = contents(tmp_path)
    file = tmp_path / "00003.safetensors"
    harm(file)
    message = f"00003.safetensors {message}.*Delete this file, and call"
    with pytest.raises(BertnbError, match=message):
        Shards.open(tmp_path)
    if seen_at_once:
        with pytest.raises(BertnbError, match=message):
            Shards.open(tmp_path, verify=False)
    else:
        Shards.open(tmp_path, verify=False)
    if file.exists():
        with pytest.raises(BertnbError, match=message):
            make(tmp_path)
        file.unlink()
    make(tmp_path)  # the remedy
    assert contents(tmp_path) == before


def rewrite(folder, change):
    """Change a file's arrays, and make the index agree with its bytes."""
    file = folder / "00000.safetensors"
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0] |= {
        "sha256": file_digest(file),
        "bytes": file.stat().st_size,
    }
    path.write_text(json.dumps(index))


def wide(arrays):
    arrays["ids"] = arrays["ids"].astype(np.uint32)


def beyond(arrays):
    arrays["ids"][5] = 100


def short(arrays):
    arrays["ids"] = arrays["ids"][:-1]


def moved(arrays):
    arrays["sentences"][-1] -= 1


def fewer(arrays):
    arrays["documents"] = arrays["documents"][:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wide, "holds ids of type uint32; the index says uint16"),
        (beyond, "holds the id 100; the vocabulary has 100 pieces"),
        (short, "holds .* documents, sentences and tokens; the index"),
        (moved, "holds .* documents, sentences and tokens; the index"),
        (fewer, "holds .* documents, sentences and tokens; the index"),
        (lambda a: a.pop("documents"), "lacks an array: .*documents"),
    ],
)
def test_wrong_arrays_are_an_error_even_with_the_right_checksum(
    tmp_path, change, message
):
    make(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(BertnbError, match=f"00000.safetensors {message}"):
        Shards.open(tmp_path)


def test_a_file_that_is_no_safetensors_is_an_error(tmp_path):
    make(tmp_path)
    rewrite(tmp_path, lambda arrays: None)
    file = tmp_path / "00000.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["sha256"] = file_digest(file)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(BertnbError, match=r"00000\.safetensors lacks an array"):
        Shards.open(tmp_path)


def test_a_folder_without_an_index_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"holds no index\.json"):
            Shards.open(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"weight_map": {}},
        {"format": "bertnb shards 0"},
        {"vocab_size": None, "shards": 3},
        {"shards": [{"file": "a"}]},
        {"shards": [7]},
    ],
)
def test_another_index_is_an_error(tmp_path, values):
    make(tmp_path)
    path = tmp_path / "index.json"
    index = {} if "weight_map" in values else json.loads(path.read_text())
    path.write_text(json.dumps(index | values))
    message = r"index\.json is not an index in the format 'bertnb shards 1'"
    for call in (Shards.open, make):
        with pytest.raises(BertnbError, match=message):
            call(tmp_path)


def test_an_index_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "index.json").write_text("{", encoding="utf-8")
    for call in (Shards.open, make):
        with pytest.raises(BertnbError, match=r"index\.json is not valid JSON"):
            call(tmp_path)


class Deadly(WordPieceTokenizer):
    """In another process it ends that process."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_dies_is_an_error_that_says_so(tmp_path):
    deadly = Deadly(TOKENIZER.vocabulary)
    with pytest.raises(BertnbError, match="a worker process died: for lack of"):
        prepare(texts(), deadly, tmp_path, 2, PART)


# memory


def test_the_recorded_peaks_do_not_grow_with_the_corpus():
    results = json.loads(RECORD.read_text())["results"]
    for what in ("prepare", "shards"):
        rows = [r for r in results if r["what"] == what and r["workers"] == 1]
        rows = [r for r in rows if r.get("block_tokens", 2**20) == 2**20]
        peaks = {r["copies"]: r["peak_mb"] for r in rows}
        assert set(peaks) >= {1, 50}
        assert max(peaks.values()) < 1.06 * peaks[1]
        assert rows[-1].get("tokens", 10**8) >= 10**8
    lists = [r["peak_mb"] for r in results if r["what"] == "list"]
    assert lists[-1] > 2 * lists[0]


def test_the_chapter_shows_the_recorded_figures():
    chapter = (ROOT / "notebooks" / "10_shards.md").read_text("utf-8")
    for row in json.loads(RECORD.read_text())["results"]:
        assert f"{row['peak_mb']:.0f}" in chapter, row
