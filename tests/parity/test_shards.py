"""Shards and readers against independent readings of the same bytes."""

import json
import os
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
from safetensors.numpy import load_file

from bertnb.data import (
    Document,
    encode_documents,
    load_folder,
    read_dataset,
    split_sentences,
)
from bertnb.shards import prepare
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

TOKENIZER = WordPieceTokenizer(
    {t: i for i, t in enumerate([*SPECIAL_TOKENS, *map(str, range(95))])}
)
DOCUMENTS = [
    Document("a", "1 2 3\n\n4"),
    Document("empty", " \n\n "),
    Document("b", "5 6\n\n7\n\n8 9 10 11"),
]


def by_hand(path):
    """Return the arrays of a file, read as the format's description says."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    kinds = {"U16": "<u2", "U32": "<u4"}
    return {
        name: np.frombuffer(
            data[8 + size + facts["data_offsets"][0] :],
            kinds[facts["dtype"]],
            facts["shape"][0],
        )
        for name, facts in header.items()
        if name != "__metadata__"
    }


@pytest.mark.equation("10.10")
def test_a_file_holds_the_lists_of_the_formula(tmp_path, measured):
    shards = prepare(DOCUMENTS, TOKENIZER, tmp_path)
    arrays = by_hand(tmp_path / "00000.safetensors")
    x, t, d = (arrays[n].tolist() for n in ("ids", "sentences", "documents"))
    measured(np.array(x) - np.arange(6, 17), 0)
    assert t == [0, 3, 4, 6, 7, 11]
    assert d == [0, 2, 5]
    documents = [
        [x[t[j] : t[j + 1]] for j in range(d[k], d[k + 1])] for k in range(2)
    ]
    assert documents == [shards[0], shards[1]] == list(shards)
    encoded = encode_documents(DOCUMENTS, TOKENIZER)
    assert documents == [document for document in encoded if document]
    for name, array in load_file(tmp_path / "00000.safetensors").items():
        assert np.array_equal(array, arrays[name])


@pytest.mark.equation("10.9")
@pytest.mark.parametrize(
    ("pieces", "width"), [(100, 2), (2**16, 2), (2**16 + 1, 4)]
)
def test_an_id_has_the_bytes_of_the_formula(tmp_path, pieces, width):
    words = [*SPECIAL_TOKENS, *map(str, range(pieces - 5))]
    tokenizer = WordPieceTokenizer({t: i for i, t in enumerate(words)})
    last = str(pieces - 6)
    shards = prepare([Document("a", last)], tokenizer, tmp_path)
    (shard,) = shards.shards
    ids = by_hand(tmp_path / shard.file)["ids"]
    assert ids.itemsize == width
    assert ids.tolist() == [pieces - 1]
    assert list(shards) == [[[pieces - 1]]]


def test_rows_are_those_of_the_library(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(7)]})
    rows.to_parquet(tmp_path / "train.parquet")
    ours = [d.text for d in read_dataset(str(tmp_path))]
    theirs = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    assert ours == [row["text"] for row in theirs] == rows["text"][:]


def test_the_originals_sample_is_read_as_the_original_reads_it():
    here = Path(__file__).resolve().parents[3] / "shared/data"
    file = Path(os.environ.get("BERTNB_DATA", here)) / "google_bert"
    file = file / "sample_text.txt"
    if not file.exists():
        pytest.skip("no sample_text.txt: set BERTNB_DATA to a folder with it")
    documents = [[]]  # create_pretraining_data.py:193-204, before its tokenizer
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            documents[-1].append(line.strip())
        else:
            documents.append([])
    documents = [document for document in documents if document]
    ours = load_folder(file, blank_lines=True)
    assert len(ours) == len(documents) == 3
    for document, lines in zip(ours, documents, strict=True):
        assert [p.strip() for p in document.text.split("\n\n")] == lines
        sentences = split_sentences(document.text)
        assert " ".join(sentences) == " ".join(" ".join(lines).split())
        assert len(sentences) >= len(lines)  # no line is joined to the next
