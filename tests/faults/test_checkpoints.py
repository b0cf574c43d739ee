"""Wrong files: each is a clear error that names the file and the key."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    BertnbError,
)

CONFIG = BertConfig(
    vocab_size=13,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=7,
)
WORDS = "bert.embeddings.word_embeddings.weight"
HEADS = (
    BertForPreTraining,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    BertForPreTraining(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder, *parts, cls=BertForPreTraining):
    """Loading must fail with a message that holds each of `parts`."""
    with pytest.raises(BertnbError) as caught:
        cls.from_pretrained(folder)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, str(file), "is no safetensors file")


def test_bytes_that_are_something_else(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"PK\x03\x04 a zip, or a pickle" * 50)
    refused(folder, str(file), "is no safetensors file")


def test_a_missing_key(folder):
    name = "bert.encoder.layer.1.attention.self.key.bias"
    change_weights(folder, lambda w: w.pop(name))
    message = "missing encoder.layer.1.attention.self.key.bias; unexpected no"
    refused(folder, str(folder / "model.safetensors"), message)


def test_missing_keys_are_counted_beyond_three(folder):
    def drop(weights):
        for name in [n for n in weights if ".layer.1." in n]:
            del weights[name]

    change_weights(folder, drop)
    refused(folder, "and 13 more; unexpected nothing")


def test_an_unexpected_key(folder):
    change_weights(folder, lambda w: w.update(adapter=torch.ones(2)))
    refused(folder, "missing nothing; unexpected adapter")
    refused(folder, "unexpected adapter", cls=BertModel)


def test_layers_that_the_configuration_does_not_have(folder):
    change_config(folder, num_hidden_layers=1)
    refused(folder, "unexpected encoder.layer.1.")


def test_half_a_head(folder):
    change_weights(folder, lambda w: w.pop("cls.seq_relationship.bias"))
    refused(folder, "missing cls.seq_relationship.bias")
    change_weights(folder, lambda w: w.pop("bert.pooler.dense.weight"))
    refused(folder, "missing pooler.dense.weight", cls=BertModel)


def test_a_head_with_too_much(folder):
    extra = {"cls.predictions.extra.weight": torch.ones(2)}
    change_weights(folder, lambda w: w.update(extra))
    refused(folder, "unexpected cls.predictions.extra.weight")


def test_the_same_key_twice(folder):
    def twice(weights):
        weights[WORDS.removeprefix("bert.")] = weights[WORDS].clone()

    change_weights(folder, twice)
    refused(folder, "holds embeddings.word_embeddings.weight twice")


def test_another_shape(folder):
    change_config(folder, vocab_size=14)
    refused(
        folder,
        str(folder / "model.safetensors"),
        "embeddings.word_embeddings.weight has shape (13, 8)",
        "needs (14, 8)",
    )


def test_a_transposed_matrix(folder):
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    change_weights(folder, lambda w: w.update({name: w[name].T.contiguous()}))
    refused(folder, "intermediate.dense.weight has shape (8, 12)", "(12, 8)")


def test_another_number_of_labels(tmp_path):
    BertForSequenceClassification(CONFIG, num_labels=3).save_pretrained(
        tmp_path
    )
    message = "classifier.weight has shape (3, 8); this model needs (4, 8)"
    with pytest.raises(BertnbError, match=re.escape(message)):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite(folder, value):
    def spoil(weights):
        weights[WORDS][3, 4] = value

    change_weights(folder, spoil)
    message = (
        "embeddings.word_embeddings.weight holds values that are not finite"
    )
    refused(folder, str(folder / "model.safetensors"), message)


def test_whole_numbers_instead_of_floats(folder):
    name = "bert.pooler.dense.bias"
    change_weights(folder, lambda w: w.update({name: w[name].to(torch.int8)}))
    refused(folder, "pooler.dense.bias holds torch.int8, not floats")


def test_weights_of_another_architecture(folder):
    def rename(weights):
        for name in list(weights):
            new = name.replace("bert.", "roberta.")
            weights[new] = weights.pop(name)

    change_weights(folder, rename)
    refused(folder, "missing embeddings.", "unexpected roberta.embeddings.")


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("cls.predictions.decoder.weight", WORDS),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ],
)
def test_a_second_copy_of_a_shared_tensor_must_be_equal(folder, copy, original):
    good = BertForPreTraining.from_pretrained(folder).state_dict()
    change_weights(folder, lambda w: w.update({copy: w[original].clone()}))
    same = BertForPreTraining.from_pretrained(folder).state_dict()
    assert all(torch.equal(same[name], good[name]) for name in good)

    change_weights(folder, lambda w: w[copy][-1].add_(1))
    message = f"{copy} differs from {original.removeprefix('bert.')}"
    refused(folder, str(folder / "model.safetensors"), message)
    refused(folder, message, cls=BertForMaskedLM)
    BertModel.from_pretrained(folder)  # no head that it would belong to


def test_a_shared_tensor_that_is_only_there_as_its_copy(folder):
    good = BertForMaskedLM.from_pretrained(folder)

    def move(weights):
        weights["cls.predictions.decoder.weight"] = weights.pop(WORDS)
        bias = weights.pop("cls.predictions.bias")
        weights["cls.predictions.decoder.bias"] = bias

    change_weights(folder, move)
    loaded = BertForMaskedLM.from_pretrained(folder).state_dict()
    for name, tensor in good.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_stored_positions_of_old_files_are_left_out(tmp_path, prefix):
    cls = BertForPreTraining if prefix else BertModel
    cls(CONFIG).save_pretrained(tmp_path)
    ids = {f"{prefix}embeddings.position_ids": torch.arange(7)[None]}
    change_weights(tmp_path, lambda w: w.update(ids))
    cls.from_pretrained(tmp_path)
    BertModel.from_pretrained(tmp_path)


def test_names_of_2018_are_understood(folder):
    good = BertForPreTraining.from_pretrained(folder)

    def rename(weights):
        for name in list(weights):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            new = new.replace("LayerNorm.bias", "LayerNorm.beta")
            weights[new] = weights.pop(name)

    change_weights(folder, rename)
    assert "cls.predictions.transform.LayerNorm.beta" in load_file(
        folder / "model.safetensors"
    )
    loaded = BertForPreTraining.from_pretrained(folder)
    for name, tensor in good.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("\ud800".encode("utf-16", "surrogatepass"), "is not valid JSON"),
        ("[1, 2]", "holds a list; expected keys and values"),
        ('{"hidden_sise": 8}', "unknown configuration key 'hidden_sise'=8"),
        ('{"hidden_size": 7.5}', "hidden_size=7.5: expected a positive whole"),
        (
            '{"initializer_range": NaN}',
            "initializer_range=nan: expected a posi",
        ),
        ('{"model_type": "roberta"}', "model_type='roberta': only 'bert'"),
        ('{"is_decoder": true}', "is_decoder=True: only False"),
        (
            '{"position_embedding_type": "relative_key"}',
            "position_embedding_type='relative_key': only 'absolute'",
        ),
    ],
)
def test_a_wrong_config_json(folder, text, message):
    file = folder / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, str(file), message)
    with pytest.raises(BertnbError, match=re.escape(str(file))):
        BertConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_says_what_is_there(folder, name):
    (folder / name).unlink()
    (folder / "vocab.txt").touch()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}") as caught:
        BertModel.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "'vocab.txt'" in str(caught.value)


@pytest.mark.parametrize("name", ["nothing/here/at/all", "/no/such/folder"])
def test_a_folder_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is not a folder"):
        BertModel.from_pretrained(name)


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        BertModel.from_pretrained(folder / "config.json")


@pytest.mark.parametrize(
    "fault",
    [
        lambda w: w.pop("cls.predictions.bias"),
        lambda w: w.update(adapter=torch.ones(2)),
        lambda w: w["cls.seq_relationship.bias"].fill_(torch.nan),
        lambda w: w.update({"cls.seq_relationship.bias": torch.ones(3)}),
        lambda w: w.update({"cls.predictions.decoder.bias": torch.ones(13)}),
    ],
    ids=["missing", "unexpected", "nan", "shape", "tied"],
)
def test_a_refused_file_leaves_the_model_as_it_was(folder, fault):
    torch.manual_seed(1)
    model = BertForPreTraining(CONFIG)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    weights = load_file(folder / "model.safetensors")
    fault(weights)
    with pytest.raises(BertnbError, match="some file"):
        model.load_hf_weights(weights, "some file")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("wanted", HEADS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("saved", [BertModel, *HEADS], ids=lambda c: c.__name__)
def test_a_head_that_is_missing_is_new_and_says_so_once(
    saved, wanted, tmp_path, recwarn
):
    """Every head model starts from every other one's file."""
    torch.manual_seed(0)
    old = saved(CONFIG)
    old.save_pretrained(tmp_path)
    new = wanted.from_pretrained(tmp_path)
    there = set(load_file(tmp_path / "model.safetensors"))
    bare = {name.removeprefix("bert.") for name in there}
    wanted(CONFIG).save_pretrained(tmp_path / "wanted")
    own = load_file(tmp_path / "wanted" / "model.safetensors")
    untrained = {n.removeprefix("bert.") for n in own} - bare
    messages = [str(w.message) for w in recwarn if w.category is UserWarning]
    assert len(messages) == bool(untrained)
    if untrained:
        assert str(tmp_path / "model.safetensors") in messages[0]
        assert sorted(untrained)[0] in messages[0]
        assert "start untrained" in messages[0]
        assert __file__ == recwarn.pop(UserWarning).filename
    body = old if saved is BertModel else old.bert
    for name, tensor in body.state_dict().items():
        if not name.startswith("pooler.") or new.bert.pooler is not None:
            assert torch.equal(new.bert.state_dict()[name], tensor), name


def test_a_masked_lm_without_pooler_becomes_a_model_with_a_warning(tmp_path):
    BertForMaskedLM(CONFIG).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no weights for pooler.dense.bias"):
        model = BertModel.from_pretrained(tmp_path)
    assert model.pooler is not None
    quiet = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert quiet.pooler is None


def test_a_pooler_is_left_out_where_it_is_not_wanted(tmp_path):
    BertModel(CONFIG).save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert model.pooler is None
