"""Check sums, tables of entries, names and new words: what must always hold."""

import re
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tf_bundle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bertnb.folders
from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    crc32c,
    hf_name_from_tf,
    masked_crc32c,
    read_table,
    read_tf_checkpoint,
    resize_vocabulary,
)

CONFIG = BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
)
HEADS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
GENERATOR = 0x11EDC6F41  # of CRC32C with its x^32, highest power first
J = 0xFFFFFFFF


def remainder(polynomial):
    """A long division of whole numbers, whose bits are the coefficients."""
    while polynomial.bit_length() > 32:
        shift = polynomial.bit_length() - 33
        polynomial ^= GENERATOR << shift
    return polynomial


def reverse(number, bits):
    return int(f"{number:0{bits}b}"[::-1], 2)


def by_definition(data):
    """(15.1) as it stands, on one large whole number."""
    message = 0
    for byte in data:
        message = message << 8 | reverse(byte, 8)  # the lowest bit first
    rest = remainder(message << 32 ^ J << 8 * len(data))
    return reverse(rest ^ J, 32)


# check sums


@pytest.mark.equation("15.1")
@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200))
def test_the_sum_is_the_remainder_of_the_definition(data):
    assert crc32c(data) == by_definition(data)


@pytest.mark.equation("15.1")
@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (b"", 0),
        (bytes(32), 0x8A9136AA),  # RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_sums(data, crc):
    assert crc32c(data) == crc


@pytest.mark.equation("15.2")
@pytest.mark.parametrize(
    "size",
    [
        *(1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 96, 97, 1023, 1024, 1025),
        *(4095, 4096, 4097, 5119, 5120, 5121, 7168, 7169, 65535, 100_001),
    ],
)
def test_lanes_of_every_number_give_the_sum_of_a_loop(size):
    """Joined two by two, odd ones too; a third program has the last word."""
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == tf_bundle.crc32c(data)
    assert crc32c(bytes(size)) == tf_bundle.crc32c(bytes(size))


@pytest.mark.equation("15.2")
def test_the_rest_of_two_parts_comes_from_the_rests_of_the_parts():
    def r(data):
        """The linear part: the two J taken away again."""
        message = int(f"1{data.hex()}", 16) ^ 1 << 8 * len(data)
        return remainder(message << 32)

    draw = np.random.default_rng(0)
    for _ in range(20):
        a, b = (
            draw.bytes(draw.integers(1, 40)),
            draw.bytes(draw.integers(1, 40)),
        )
        assert r(a + b) == remainder(r(a) << 8 * len(b)) ^ r(b)


@pytest.mark.equation("15.3")
def test_the_masked_sum_is_turned_and_moved_and_can_be_taken_back():
    for data in (b"123456789", b"foo", b"", b"a" * 999):
        crc, stored = crc32c(data), masked_crc32c(data)
        assert 0 <= stored < 2**32
        turned = (stored - 0xA282EAD8) % 2**32
        assert (turned >> 17 | turned << 15) % 2**32 == crc
        assert stored != crc


@pytest.mark.parametrize("data", [b"x", b"I love natural language processing"])
def test_every_error_within_32_neighbouring_bits_is_noticed(data):
    right = crc32c(data)
    draw = np.random.default_rng(0)
    bits = 8 * len(data)
    for _ in range(200):
        start = int(draw.integers(bits))
        wrong = (int(draw.integers(2**32)) | 1) << start
        bad = int.from_bytes(data, "little") ^ wrong % 2**bits
        assert crc32c(bad.to_bytes(len(data), "little")) != right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_our_own_files_is_that_of_zip(dtype):
    tensor = torch.randn(4, 3).to(dtype)
    content = tensor.view(torch.uint8).numpy().tobytes()
    assert bertnb.folders._sum(tensor) == zlib.crc32(content)
    turned = tensor.T.contiguous().T  # the same numbers in another order
    assert bertnb.folders._sum(turned) == zlib.crc32(content)


# tables


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.binary(max_size=20), st.binary(max_size=40), max_size=60
    ),
    st.integers(1, 25),
)
def test_any_table_comes_back(tmp_path_factory, entries, per_block):
    file = tmp_path_factory.mktemp("table") / "x.index"
    pairs = sorted(entries.items())
    file.write_bytes(tf_bundle.table(pairs, per_block))
    assert list(read_table(file).items()) == pairs


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("per_block", [1, 3, 100])
def test_tensors_of_every_type_and_shape_come_back(tmp_path, shards, per_block):
    draw = np.random.default_rng(0)
    arrays = {
        "a/long/name/that/goes/on": draw.normal(size=(3, 4)).astype("f4"),
        "a/long/name/that/goes/off": draw.normal(size=(2, 3, 4)),
        "a/long/name": draw.normal(size=300).astype("f2"),
        "whole": np.arange(-3, 3, dtype="i4"),
        "large": np.array([-(2**62), 2**62], "i8"),
        "step": np.array(12345678901, "i8"),
        "größe": np.ones((1, 1), "f4"),
    }
    tf_bundle.write_bundle(
        tmp_path / "x", arrays, shards=shards, per_block=per_block
    )
    tensors = read_tf_checkpoint(tmp_path / "x")
    assert list(tensors) == sorted(arrays)
    for name, array in arrays.items():
        assert tuple(tensors[name].shape) == array.shape
        assert np.array_equal(tensors[name].numpy(), array), name
        assert str(tensors[name].numpy().dtype) == str(array.dtype)
        tensors[name].add_(1)  # memory of its own


def test_bfloat16_is_read(tmp_path):
    """NumPy has no such type: the bytes are those of 1.0 and -2.0."""
    entry = tf_bundle.entry(np.zeros(2, "f2"), 0, 0, b"")
    entry = entry.replace(b"\x08\x13", b"\x08\x0e", 1)
    data = b"\x80\x3f\x00\xc0"
    sum_ = tf_bundle.masked(tf_bundle.crc32c(data))
    entry = re.sub(rb"\x35.{4}$", b"\x35" + sum_.replace(b"\\", b"\\\\"), entry)
    pairs = [(b"", tf_bundle.field(1, 1)), (b"x", entry)]
    (tmp_path / "x.index").write_bytes(tf_bundle.table(pairs))
    (tmp_path / "x.data-00000-of-00001").write_bytes(data)
    tensor = read_tf_checkpoint(tmp_path / "x")["x"]
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [1, -2]


def test_ignored_parts_are_whole_parts_and_are_not_read(tmp_path):
    arrays = {
        name: np.ones(2, "f4")
        for name in ("a/adam_m", "a/adam_m_b", "adam_m/a", "a", "adam")
    }
    tf_bundle.write_bundle(tmp_path / "x", arrays)
    kept = read_tf_checkpoint(tmp_path / "x", ("adam_m",))
    assert list(kept) == ["a", "a/adam_m_b", "adam"]
    file = tmp_path / "x.data-00000-of-00001"
    content = bytearray(file.read_bytes())
    content[8] ^= 1  # in a/adam_m: who does not read it does not mind
    file.write_bytes(content)
    assert len(read_tf_checkpoint(tmp_path / "x", ("adam_m",))) == 3


# names


@pytest.mark.parametrize(
    ("google", "hugging_face"),
    [
        (
            "bert/embeddings/word_embeddings",
            "embeddings.word_embeddings.weight",
        ),
        (
            "bert/embeddings/token_type_embeddings",
            "embeddings.token_type_embeddings.weight",
        ),
        ("bert/embeddings/LayerNorm/gamma", "embeddings.LayerNorm.weight"),
        ("bert/embeddings/LayerNorm/beta", "embeddings.LayerNorm.bias"),
        (
            "bert/encoder/layer_11/attention/self/query/kernel",
            "encoder.layer.11.attention.self.query.weight",
        ),
        (
            "bert/encoder/layer_0/output/dense/bias",
            "encoder.layer.0.output.dense.bias",
        ),
        ("bert/pooler/dense/kernel", "pooler.dense.weight"),
    ],
)
def test_names_of_the_body(google, hugging_face):
    assert hf_name_from_tf(google) == f"bert.{hugging_face}"


@pytest.mark.parametrize(
    ("google", "hugging_face"),
    [
        ("cls/predictions/output_bias", "cls.predictions.bias"),
        (
            "cls/predictions/transform/dense/kernel",
            "cls.predictions.transform.dense.weight",
        ),
        ("cls/seq_relationship/output_weights", "cls.seq_relationship.weight"),
        ("cls/seq_relationship/output_bias", "cls.seq_relationship.bias"),
        ("output_weights", "classifier.weight"),
        ("output_bias", "classifier.bias"),
        ("cls/squad/output_weights", "qa_outputs.weight"),
        ("cls/squad/output_bias", "qa_outputs.bias"),
    ],
)
def test_names_of_the_heads(google, hugging_face):
    assert hf_name_from_tf(google) == hugging_face


def test_the_ignore_list_is_the_optimisers_and_has_every_name():
    """A missing comma once made one name of two, in other people's lists."""
    assert bertnb.TF_IGNORED == ("adam_m", "adam_v", "global_step")


# new words


def model_of(name):
    torch.manual_seed(0)
    return getattr(bertnb, name)(CONFIG).eval()


def rows(model):
    body = getattr(model, "bert", model)
    return body.embeddings.word_embeddings


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [10, 11, 13, 40])
def test_old_words_keep_their_rows_and_every_part_knows_the_size(name, size):
    model = model_of(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    assert resize_vocabulary(model, size, shrink=True) is None
    for key, tensor in model.state_dict().items():
        kept = min(size, 11)
        if key.endswith(("word_embeddings.weight", "masked_lm.bias")):
            assert len(tensor) == size
            assert torch.equal(tensor[:kept], before[key][:kept]), key
        else:
            assert torch.equal(tensor, before[key]), key
    assert model.config == replace(CONFIG, vocab_size=size)
    assert getattr(model, "bert", model).config == model.config
    assert rows(model).num_embeddings == size
    ids = torch.tensor([[2, size - 1, 3]])
    model(ids)
    with pytest.raises(ValueError, match=f"vocab_size={size}|{size}"):
        model(ids + 1)


@pytest.mark.equation("15.5")
def test_old_scores_stay_and_probabilities_shrink_by_one_factor(measured):
    model = model_of("BertForMaskedLM").double()
    torch.nn.init.normal_(rows(model).weight)
    torch.nn.init.normal_(model.masked_lm.bias)
    ids = torch.tensor([[2, 5, 6, 3]])
    before = model(ids).logits
    resize_vocabulary(model, 15, torch.Generator().manual_seed(1))
    after = model(ids).logits
    measured(after[..., :11] - before, 1e-12)
    old, new = before.exp().sum(-1), after[..., 11:].exp().sum(-1)
    factor = (old / (old + new))[..., None]
    measured(after.softmax(-1)[..., :11] - before.softmax(-1) * factor, 1e-12)


def test_new_rows_start_as_the_original_starts_all():
    model = BertForMaskedLM(replace(CONFIG, initializer_range=0.05))
    torch.nn.init.normal_(model.masked_lm.bias)
    resize_vocabulary(model, 5011, torch.Generator().manual_seed(0))
    new = rows(model).weight[11:].detach()
    assert new.abs().max() <= 0.1  # two deviations
    assert abs(new.std() - 0.88 * 0.05) < 0.001  # of a cut normal
    assert abs(new.mean()) < 0.001
    assert (model.masked_lm.bias[11:] == 0).all()
    assert (model.masked_lm.bias[:11] != 0).all()


def test_the_generator_decides_and_the_global_one_stays_as_it_is():
    one, two, three = (model_of("BertModel") for _ in range(3))
    state = torch.get_rng_state()
    resize_vocabulary(one, 20, torch.Generator().manual_seed(5))
    resize_vocabulary(two, 20, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    resize_vocabulary(three, 20, torch.Generator().manual_seed(6))
    assert torch.equal(rows(one).weight, rows(two).weight)
    assert not torch.equal(rows(one).weight[11:], rows(three).weight[11:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_and_frozen_parameters_stay_as_they_are(dtype):
    model = model_of("BertForMaskedLM").to(dtype)
    rows(model).weight.requires_grad_(False)
    resize_vocabulary(model, 13)
    assert rows(model).weight.dtype == model.masked_lm.bias.dtype == dtype
    assert not rows(model).weight.requires_grad
    assert model.masked_lm.bias.requires_grad
    assert isinstance(rows(model).weight, torch.nn.Parameter)


def test_table_and_output_layer_are_still_one():
    model = model_of("BertForPreTraining")
    resize_vocabulary(model, 14)
    names = [n for n, p in model.named_parameters() if 14 in p.shape]
    assert names == [
        "bert.embeddings.word_embeddings.weight",
        "masked_lm.bias",
    ]
    ids = torch.tensor([[2, 13, 3]])
    labels = torch.full((1, 3), -100)
    labels[0, 1] = 12  # a new word as input, another new one as the target
    loss = model(ids, labels=labels, next_sentence_label=torch.tensor([0])).loss
    loss.backward()
    gradient = rows(model).weight.grad
    assert gradient[13].any()
    assert gradient[12].any()


@pytest.mark.parametrize("name", HEADS)
def test_a_resized_model_is_saved_and_comes_back(name, tmp_path):
    model = model_of(name)
    resize_vocabulary(model, 17)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert back.config.vocab_size == 17
    state = back.state_dict()
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("size", [0, -1, 2.5, "12", None, True])
def test_a_size_that_is_none(size):
    model = model_of("BertModel")
    with pytest.raises(ValueError, match=f"vocab_size={re.escape(repr(size))}"):
        resize_vocabulary(model, size)
    assert model.config == CONFIG


def test_words_are_dropped_only_where_that_is_said():
    model = model_of("BertForMaskedLM")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    message = "size=8 drops the last 3 words .* shrink=True"
    with pytest.raises(ValueError, match=message):
        resize_vocabulary(model, 8)
    config = replace(CONFIG, pad_token_id=9)
    padded = BertModel(config)
    with pytest.raises(ValueError, match="pad_token_id=9: expected an id"):
        resize_vocabulary(padded, 8, shrink=True)
    assert padded.config == config
    assert rows(padded).num_embeddings == 11
    assert model.config == CONFIG
    state = model.state_dict()
    assert all(torch.equal(p, before[n]) for n, p in state.items())


def test_new_words_do_not_disturb_the_books_own_model():
    model = BertForPreTraining.from_pretrained(bertnb.book_model())
    ids = torch.tensor([[2, 100, 200, 3]])
    before = model(ids).prediction_logits
    resize_vocabulary(model, model.config.vocab_size + 8)
    after = model(ids).prediction_logits
    assert (after[..., :-8] - before).abs().max() < 1e-4
