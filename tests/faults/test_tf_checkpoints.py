"""Wrong TensorFlow checkpoints: each is a clear error, and nothing is run."""

import json
import re

import numpy as np
import pytest
import tf_bundle
import torch

from bertnb import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    BertnbError,
    from_tf_checkpoint,
    read_tf_checkpoint,
)
from bertnb.checkpoints import read_table

CONFIG = BertConfig(
    vocab_size=9,
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=6,
    max_position_embeddings=5,
)
LAYER = "bert/encoder/layer_0/"
DENSE = {  # part -> size in, size out
    LAYER + "attention/self/query": (4, 4),
    LAYER + "attention/self/key": (4, 4),
    LAYER + "attention/self/value": (4, 4),
    LAYER + "attention/output/dense": (4, 4),
    LAYER + "intermediate/dense": (4, 6),
    LAYER + "output/dense": (6, 4),
    "bert/pooler/dense": (4, 4),
}
NORMS = ("bert/embeddings", LAYER + "attention/output", LAYER + "output")


def google_arrays():
    """A body as the original names it, with the optimiser's memory."""
    draw = np.random.default_rng(0)
    shapes = {
        "bert/embeddings/word_embeddings": (9, 4),
        "bert/embeddings/position_embeddings": (5, 4),
        "bert/embeddings/token_type_embeddings": (2, 4),
    }
    for part, (inner, outer) in DENSE.items():
        shapes |= {f"{part}/kernel": (inner, outer), f"{part}/bias": (outer,)}
    for part in NORMS:
        shapes |= {f"{part}/LayerNorm/{n}": (4,) for n in ("gamma", "beta")}
    arrays = {n: draw.normal(size=s).astype("f4") for n, s in shapes.items()}
    arrays |= {f"{n}/adam_m": arrays[n] for n in shapes}
    arrays |= {f"{n}/adam_v": arrays[n] for n in shapes}
    return arrays | {"global_step": np.array(7, "i8")}


@pytest.fixture
def folder(tmp_path):
    tf_bundle.write_bundle(tmp_path / "bert_model.ckpt", google_arrays())
    text = json.dumps(CONFIG.to_dict())
    (tmp_path / "bert_config.json").write_text(text)
    from_tf_checkpoint(BertModel, tmp_path)  # it is good
    return tmp_path


def rewrite(folder, arrays, **how):
    tf_bundle.write_bundle(folder / "bert_model.ckpt", arrays, **how)


def index_of(folder):
    return folder / "bert_model.ckpt.index"


def refused(folder, *parts, cls=BertModel):
    with pytest.raises(BertnbError) as caught:
        from_tf_checkpoint(cls, folder)
    for part in parts:
        assert part in str(caught.value)


SMALL = {"b/kernel": np.ones((2, 3), "f4"), "b/step": np.array(3, "i8")}


def test_every_bit_of_an_index_is_checked(tmp_path):
    """Whatever single bit changes: a BertnbError, never another result."""
    tf_bundle.write_bundle(tmp_path / "x", {"step": SMALL["b/step"]})
    file = tmp_path / "x.index"
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(BertnbError, match=re.escape(str(file))):
            read_table(file)


def test_every_bit_of_the_data_is_checked(tmp_path):
    tf_bundle.write_bundle(tmp_path / "x", SMALL)
    file = tmp_path / "x.data-00000-of-00001"
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        name = "b/kernel" if bit < 8 * 24 else "b/step"
        message = rf"x\.index: {name} has another CRC in {file.name}"
        with pytest.raises(BertnbError, match=message):
            read_tf_checkpoint(tmp_path / "x")


def test_an_index_cut_short_anywhere(tmp_path):
    tf_bundle.write_bundle(tmp_path / "x", SMALL)
    file = tmp_path / "x.index"
    good = file.read_bytes()
    for keep in range(len(good)):
        file.write_bytes(good[:keep])
        with pytest.raises(BertnbError, match="is no TensorFlow index, or cut"):
            read_table(file)


def test_data_cut_short_anywhere(folder):
    file = folder / "bert_model.ckpt.data-00000-of-00001"
    good = file.read_bytes()
    for keep in (0, 3, len(good) // 2):
        file.write_bytes(good[:keep])
        refused(folder, "which is cut short", file.name, "bert/")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", bytes(48), b"x" * 500, bytes(40) + b"W\xfb"]
)
def test_a_file_that_is_no_index(folder, content):
    index_of(folder).write_bytes(content)
    refused(folder, str(index_of(folder)), "is no TensorFlow index")


def test_a_shard_that_is_not_there(folder):
    rewrite(folder, google_arrays(), shards=2)
    from_tf_checkpoint(BertModel, folder)
    (folder / "bert_model.ckpt.data-00001-of-00002").unlink()
    refused(folder, "is in bert_model.ckpt.data-00001-of-00002, which is not")


def test_a_compressed_block(tmp_path):
    tf_bundle.write_bundle(tmp_path / "x", SMALL, kind=1)
    with pytest.raises(
        BertnbError, match=r"x\.index: the block at byte 0 is c"
    ):
        read_table(tmp_path / "x.index")


def written(tmp_path, entries):
    file = tmp_path / "x.index"
    file.write_bytes(tf_bundle.table(entries))
    return tmp_path / "x"


HEADER = (b"", tf_bundle.field(1, 1))


def said(**changes):
    """An entry for two floats, with fields changed by their number."""
    fields = {
        1: tf_bundle.field(1, 1),
        2: tf_bundle.field(2, tf_bundle.field(2, tf_bundle.field(1, 2))),
        5: tf_bundle.field(5, 8),
        6: tf_bundle.masked(tf_bundle.crc32c(bytes(8))),
    }
    fields[6] = b"\x35" + fields[6]
    fields |= {int(n[1:]): content for n, content in changes.items()}
    return b"".join(fields.values())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (said(), None),
        (said(f1=tf_bundle.field(1, 7)), "of type 7"),  # strings
        (said(f1=b""), "of type 0"),
        (said(f7=tf_bundle.field(7, b"")), "or cut into slices"),
        (said(f2=b""), "has 8 bytes for the shape []"),
        (said(f2=tf_bundle.field(2, 3)), "is no index of tensors"),
        (said(f2=tf_bundle.field(2, b"\x13\x03")), "is no index of tensors"),
        (said(f5=b""), "another CRC"),
        (said(f5=tf_bundle.field(5, 9)), "which is cut short"),
        (said(f5=tf_bundle.field(5, 2**70)), "which is cut short"),
        (said(f4=tf_bundle.field(4, 2**63)), "which is cut short"),
        (said(f3=tf_bundle.field(3, 1)), "data-00001-of-00001, which is not"),
        (said()[:-2], "is no index of tensors: field 6"),
        (said() + b"\x80", "is no index of tensors"),
        (said() + b"\x0b", "a field of kind 3"),
        (said(f3=tf_bundle.field(3, b"../../x")), "is no index of tensors"),
    ],
)
def test_an_entry_that_says_something_else(tmp_path, entry, message):
    """With right check sums, as somebody who means harm would write it."""
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(8))
    prefix = written(tmp_path, [HEADER, (b"words", entry)])
    if message is None:
        assert read_tf_checkpoint(prefix)["words"].tolist() == [0, 0]
        return
    with pytest.raises(BertnbError, match=re.escape(message)) as caught:
        read_tf_checkpoint(prefix)
    assert "x.index" in str(caught.value)


def test_a_tensor_without_numbers(tmp_path):
    empty = said(
        f2=tf_bundle.field(2, tf_bundle.field(2, b"")),
        f5=b"",
        f6=b"\x35" + tf_bundle.masked(tf_bundle.crc32c(b"")),
    )
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"")
    prefix = written(tmp_path, [HEADER, (b"words", empty)])
    with pytest.raises(BertnbError, match=r"0 bytes for the shape \[0\]"):
        read_tf_checkpoint(prefix)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "is no index of tensors"),
        ([(b"", tf_bundle.field(2, 1))], "the highest byte first"),
        ([(b"", b"\x0a")], "is no index of tensors"),
    ],
)
def test_a_header_that_is_not_ours(tmp_path, header, message):
    prefix = written(tmp_path, [*header, (b"words", said())])
    with pytest.raises(BertnbError, match=message):
        read_tf_checkpoint(prefix)


def test_a_name_that_is_no_text(tmp_path):
    prefix = written(tmp_path, [HEADER, (b"\xff", said())])
    with pytest.raises(BertnbError, match="is no index of tensors"):
        read_tf_checkpoint(prefix)


@pytest.mark.parametrize(
    "keys", [[b"b", b"a"], [b"a", b"a"], [b"", b"a", b"a"]]
)
def test_keys_that_are_not_in_order(tmp_path, keys):
    prefix = written(tmp_path, [(key, b"") for key in keys])
    with pytest.raises(BertnbError, match="is damaged: the order of its keys"):
        read_table(tmp_path / "x.index")
    assert prefix


@pytest.mark.parametrize(
    "content",
    [
        b"",  # no place for the number of restart points
        b"\x05\x01\x00a" + bytes(4) + b"\1\0\0\0",  # shares 5 of nothing
        b"\x00\x09\x00a" + bytes(4) + b"\1\0\0\0",  # a key beyond the block
        b"\x00\x01\x09a" + bytes(4) + b"\1\0\0\0",  # a value beyond it
        b"\x00\x01\x00a" + bytes(4) + b"\xff\0\0\0",
        b"\x80",
    ],
)
def test_a_block_with_a_right_sum_and_a_wrong_inside(tmp_path, content):
    bad = content + b"\0"
    bad += tf_bundle.masked(tf_bundle.crc32c(bad))
    notes = tf_bundle.block([])
    handle = tf_bundle.varint(0) + tf_bundle.varint(len(content))
    blocks = tf_bundle.block([(b"z", handle)])
    footer = tf_bundle.varint(len(bad)) + tf_bundle.varint(len(notes) - 5)
    footer += tf_bundle.varint(len(bad + notes))
    footer += tf_bundle.varint(len(blocks) - 5)
    footer = footer.ljust(40, b"\0") + tf_bundle.MAGIC.to_bytes(8, "little")
    (tmp_path / "x.index").write_bytes(bad + notes + blocks + footer)
    with pytest.raises(BertnbError, match=r"x\.index is damaged"):
        read_table(tmp_path / "x.index")


def test_a_missing_and_an_unexpected_variable(folder):
    arrays = google_arrays()
    del arrays[LAYER + "output/dense/kernel"]
    rewrite(folder, arrays)
    file = str(index_of(folder))
    refused(folder, file, "missing encoder.layer.0.output.dense.weight")
    rewrite(folder, google_arrays() | {"bert/adapter/kernel": np.ones(2, "f4")})
    refused(folder, file, "unexpected adapter.weight")
    model = from_tf_checkpoint(BertModel, folder, ignore=("adapter",))
    assert not model.training


def test_a_kernel_of_another_shape(folder):
    arrays = google_arrays()
    name = LAYER + "intermediate/dense/kernel"
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    rewrite(folder, arrays)
    refused(folder, "intermediate.dense.weight has shape (4, 6)", "(6, 4)")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite(folder, value):
    arrays = google_arrays()
    arrays["bert/embeddings/word_embeddings"][3, 2] = value
    rewrite(folder, arrays)
    refused(folder, str(index_of(folder)), "word_embeddings.weight holds value")


def test_whole_numbers_instead_of_floats(folder):
    arrays = google_arrays()
    arrays["bert/pooler/dense/bias"] = np.ones(4, "i4")
    rewrite(folder, arrays)
    refused(folder, "pooler.dense.bias holds torch.int32, not floats")


def test_weights_of_another_architecture(folder):
    arrays = {
        n.replace("bert/", "albert/"): a for n, a in google_arrays().items()
    }
    rewrite(folder, arrays)
    refused(folder, "missing embeddings", "unexpected albert.embeddings")


def test_a_head_that_is_missing_is_new_and_says_so_where_it_was_called(folder):
    with pytest.warns(UserWarning, match="cls.predictions") as caught:
        model = from_tf_checkpoint(BertForPreTraining, folder)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    body = from_tf_checkpoint(BertModel, folder).state_dict()
    assert all(torch.equal(model.bert.state_dict()[n], body[n]) for n in body)
    with pytest.warns(UserWarning, match="no weights for classifier"):
        model = from_tf_checkpoint(
            BertForSequenceClassification, folder, num_labels=3
        )
    assert model.num_labels == 3


def test_a_folder_without_a_checkpoint_says_what_it_wants(folder):
    index_of(folder).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds \[\]; expected one"):
        from_tf_checkpoint(BertModel, folder)
    with pytest.raises(FileNotFoundError, match=r"bert_model\.ckpt\.index"):
        read_tf_checkpoint(folder / "bert_model.ckpt")


def test_a_folder_with_two_checkpoints_wants_a_prefix(folder):
    tf_bundle.write_bundle(folder / "model.ckpt-20", google_arrays())
    message = re.escape("['bert_model.ckpt.index', 'model.ckpt-20.index']")
    with pytest.raises(ValueError, match=message):
        from_tf_checkpoint(BertModel, folder)
    from_tf_checkpoint(BertModel, folder / "model.ckpt-20")


def test_a_missing_or_wrong_configuration(folder):
    (folder / "bert_config.json").write_text('{"hidden_size": 0}')
    refused(folder, "bert_config.json", "hidden_size=0")
    (folder / "bert_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no bert_config\.json"):
        from_tf_checkpoint(BertModel, folder)
