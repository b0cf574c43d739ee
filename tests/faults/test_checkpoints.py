"""Wrong files: each is a clear error that names the file and the key."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bertnb.folders
from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    BertnbError,
    hf_name,
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


# pickles


class Program:
    """What unpickles by running something: it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def move_into_pickle(folder, change=dict):
    """Replace the good safetensors by a `.bin`, changed."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(change(weights), file)
    return file


def untouched(folder, *parts):
    """A refused file runs nothing, and leaves a model as it was."""
    refused(folder, *parts)
    assert not (folder / "made").exists()


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(folder):
    move_into_pickle(folder, lambda w: {**w, "more": Program(folder / "made")})
    untouched(folder, "pytorch_model.bin wants to call posix.mkdir")
    Program(folder / "made").__reduce__()[0](str(folder / "made"))
    assert (folder / "made").exists()  # it would have worked


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_that_would_run_code_is_refused(folder, protocol):
    file = move_into_pickle(folder)
    file.write_bytes(pickle.dumps(Program(folder / "made"), protocol))
    untouched(folder, str(file), "nothing was run")


def test_a_program_named_as_a_shard_of_tensors_is_not_run(folder):
    """A pickle does not get in under the index of the safer format."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "x": Program(folder / "made")}, folder / "model.bin")
    index = {"weight_map": dict.fromkeys(weights, "model.bin")}
    write_index(folder, index)
    untouched(folder, "'model.bin'", "ends in .safetensors")


def test_a_pickle_inside_a_safetensors_name_is_not_opened(folder):
    file = folder / "model.safetensors"
    file.write_bytes(pickle.dumps(Program(folder / "made")))
    untouched(folder, str(file), "is no safetensors file")


@pytest.mark.parametrize("keep", [0, 10, 3000, -1])
def test_a_truncated_pickle(folder, keep):
    file = move_into_pickle(folder)
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, str(file), "is damaged")


def test_one_wrong_bit_in_a_pickle(folder):
    """torch.load would not notice."""
    file = move_into_pickle(folder)
    content = bytearray(file.read_bytes())
    torch.manual_seed(0)
    words = BertForPreTraining(CONFIG).bert.embeddings.word_embeddings.weight
    at = content.find(words.detach().numpy().tobytes())
    content[at + 1] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)
    refused(folder, str(file), "is damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: list(w.values()), "holds a list; expected names and tens"),
        (lambda w: {**w, "epoch": 3}, "'epoch' is no name with a tensor"),
        (lambda w: {**w, 7: torch.ones(1)}, "7 is no name with a tensor"),
        (lambda w: {"model": w}, "'model' is no name with a tensor"),
        (
            lambda w: {**w, "x": torch.eye(2).to_sparse()},
            "'x' is no name with a tensor",
        ),
        (
            lambda w: {**w, "x": torch.ones(1, device="meta")},
            "'x' is no name with a tensor",
        ),
    ],
)
def test_a_pickle_of_something_else(folder, change, message):
    file = move_into_pickle(folder, change)
    refused(folder, str(file), message)


def test_a_damaged_better_file_is_not_passed_over_for_a_worse(folder):
    """A broken model.safetensors is an error, whatever lies beside it."""
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, str(file), "is no safetensors file")


# shards


def write_index(folder, index, kind="model.safetensors"):
    file = folder / f"{kind}.index.json"
    file.write_text(json.dumps(index))
    return file


@pytest.fixture
def shards(folder):
    """The same model in two shards, and what the index says."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(weights) // 2
    parts = [dict(list(weights.items())[:half])]
    parts.append({n: w for n, w in weights.items() if n not in parts[0]})
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        save_file(part, folder / name)
        index["weight_map"] |= dict.fromkeys(part, name)
    write_index(folder, index)
    return index


ONE, TWO = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def test_shards_are_read(folder, shards):
    torch.manual_seed(0)
    good = BertForPreTraining(CONFIG).state_dict()
    loaded = BertForPreTraining.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], good[name]) for name in good)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "/tmp/absolute.safetensors",
        "C:drive.safetensors",
        "..\\windows.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "model.safetensors\n",
        "pytorch_model.bin",
        "model.safetensors.py",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_a_shard_must_be_a_file_beside_its_index(folder, shards, name):
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / ONE).read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / "inside.safetensors").write_bytes(outside.read_bytes())
    shards["weight_map"][WORDS] = name
    file = write_index(folder, shards)
    refused(folder, f"{file} wants {WORDS} from {name!r}", "a file beside it")


def test_a_link_beside_the_index_is_followed(folder, shards):
    """The hub's cache is made of links that lead out of the folder."""
    kept = folder.parent / "blob"
    (folder / ONE).rename(kept)
    (folder / ONE).symlink_to(kept)
    BertForPreTraining.from_pretrained(folder)


def test_a_shard_that_is_not_there(folder, shards):
    (folder / TWO).unlink()
    key = next(k for k, v in shards["weight_map"].items() if v == TWO)
    refused(folder, "model.safetensors.index.json", f"is in {TWO}", key)


def test_a_key_in_two_shards(folder, shards):
    weights = load_file(folder / TWO)
    weights[WORDS] = load_file(folder / ONE)[WORDS]
    save_file(weights, folder / TWO)
    refused(folder, f"{folder / TWO} holds {WORDS}, against", "index.json")


def test_a_key_that_its_shard_lacks(folder, shards):
    weights = load_file(folder / ONE)
    del weights[WORDS]
    save_file(weights, folder / ONE)
    refused(folder, f"{folder / ONE} lacks {WORDS}, against", "index.json")


def test_a_key_under_the_wrong_shard(folder, shards):
    shards["weight_map"][WORDS] = TWO
    write_index(folder, shards)
    refused(folder, f"{WORDS}, against model.safetensors.index.json")


def test_a_key_of_a_shard_that_the_index_does_not_name(folder, shards):
    del shards["weight_map"][WORDS]
    write_index(folder, shards)
    refused(folder, f"{folder / ONE} holds {WORDS}, against")


def test_a_truncated_shard(folder, shards):
    file = folder / TWO
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, str(file), "is no safetensors file")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": [WORDS]}]
)
def test_an_index_without_a_map(folder, shards, index):
    file = write_index(folder, index)
    refused(folder, f"{file} has no weight_map")


def test_an_index_that_is_not_json(folder, shards):
    file = folder / "model.safetensors.index.json"
    file.write_text("{")
    refused(folder, f"{file} is not valid JSON")


def test_a_program_in_a_shard_is_not_run(folder, shards):
    weights = {**load_file(folder / ONE), **load_file(folder / TWO)}
    (folder / "model.safetensors.index.json").unlink()
    good = "pytorch_model-00001-of-00001.bin"
    weights["x"] = Program(folder / "made")
    torch.save(weights, folder / good)
    index = {"weight_map": dict.fromkeys(weights, good)}
    write_index(folder, index, "pytorch_model.bin")
    untouched(folder, good, "wants to call posix.mkdir")


# single bits, and numbers that do not fit


def test_every_byte_of_our_file_of_weights_is_checked(folder):
    """safetensors has no check sums; ours notes them in its metadata."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), 97):
        bad = bytearray(content)
        bad[at] ^= 1
        file.write_bytes(bad)
        refused(folder, str(file), "is damaged: it has another check sum")


def test_sums_that_are_no_sums(folder):
    weights = load_file(folder / "model.safetensors")
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"bertnb_crc32": "{"})
    refused(folder, str(file), "is no safetensors file")


def test_a_number_that_only_64_bits_can_hold(folder):
    def widen(weights):
        weights[WORDS] = weights[WORDS].double()

    change_weights(folder, widen)
    BertForPreTraining.from_pretrained(folder)
    change_weights(folder, lambda w: w[WORDS].add_(1e300))
    refused(folder, "word_embeddings.weight holds values that are not finite")


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn]
)
def test_numbers_of_another_kind(folder, dtype):
    change_weights(folder, lambda w: w.update({WORDS: w[WORDS].to(dtype)}))
    refused(folder, f"word_embeddings.weight holds {dtype}, not floats")


def test_copies_of_a_shared_tensor_in_another_precision(folder):
    """Equal after rounding is not equal; other shapes are not compared."""
    name = "cls.predictions.decoder.weight"
    change_weights(folder, lambda w: w.update({name: w[WORDS].half()}))
    refused(folder, f"{name} differs from embeddings.word")
    change_weights(folder, lambda w: w.update({WORDS: w[WORDS].half()}))
    BertForPreTraining.from_pretrained(folder)
    change_weights(folder, lambda w: w.update({name: w[name][:1].clone()}))
    refused(folder, f"{name} differs from embeddings.word")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("roberta", {"type_vocab_size": 1}),
        ("distilbert", {"activation": "gelu", "dim": 8, "n_layers": 2}),
        ("electra", {"embedding_size": 8}),
    ],
)
def test_configurations_of_other_architectures(folder, kind, values):
    change_config(folder, **values, model_type=kind)
    refused(folder, str(folder / "config.json"), f"model_type={kind!r}: only")


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra"])
def test_keys_of_other_architectures(folder, kind):
    def rename(weights):
        for name in list(weights):
            weights[name.replace("bert.", f"{kind}.")] = weights.pop(name)

    change_weights(folder, rename)
    refused(
        folder,
        str(folder / "model.safetensors"),
        "missing embeddings.LayerNorm.bias",
        f"unexpected {kind}.embeddings.LayerNorm.bias",
    )


# what is left out on purpose


def test_the_table_of_ignored_keys_is_the_one_that_we_know():
    assert bertnb.IGNORED_WEIGHTS == ("embeddings.position_ids",)


def test_ignored_keys_are_named_and_nothing_else_is_left_out(folder):
    extra = {
        "cls.species.weight": torch.full((6, 8), torch.nan),
        "cls.species.bias": torch.ones(6),
        "bert.adapter.weight": torch.ones(2),
    }
    good = load_file(folder / "model.safetensors")
    change_weights(folder, lambda w: w.update(extra))
    refused(folder, "unexpected adapter.weight, cls.species.bias", "`ignore`")
    refused(folder, "unexpected adapter.weight", cls=BertForMaskedLM)
    load = BertForPreTraining.from_pretrained
    with pytest.raises(BertnbError, match=r"unexpected adapter\.weight \("):
        load(folder, ignore=("cls.species.",))
    for adapter in ("adapter.", "bert.adapter."):
        model = load(folder, ignore=("cls.species.", adapter))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, good[hf_name(name)]), name
    with pytest.raises(BertnbError, match="missing embeddings"):
        load(folder, ignore=("cls.species.", "adapter.", "embeddings."))


def test_one_string_is_not_taken_for_many_letters(folder):
    message = re.escape("ignore='cls.': expected a tuple, ('cls.',)")
    with pytest.raises(TypeError, match=message):
        BertForMaskedLM.from_pretrained(folder, ignore="cls.")


# a save that is killed


class KilledError(BaseException):
    pass


def snapshot(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def save_and_die(model, folder, step, monkeypatch):
    """Write, write, rename, rename: killed before step 0, 1, ..."""
    done = []

    def counted(function):
        def call(*arguments, **more):
            if len(done) == step:
                raise KilledError
            done.append(function)
            return function(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", counted(Path.write_bytes))
        patch.setattr(bertnb.folders, "save_file", counted(save_file))
        patch.setattr(Path, "replace", counted(Path.replace))
        with pytest.raises(KilledError):
            model.save_pretrained(folder)


@pytest.mark.parametrize("step", range(5))
def test_a_save_that_follows_a_killed_one_and_is_killed_too_mixes_nothing(
    tmp_path, monkeypatch, step
):
    first, second, third = (
        BertForMaskedLM(replace(CONFIG, vocab_size=size))
        for size in (13, 14, 15)
    )
    first.save_pretrained(tmp_path)
    save_and_die(second, tmp_path, 3, monkeypatch)  # between the renamings
    save_and_die(third, tmp_path, step, monkeypatch)  # one renaming more
    right = third if step == 4 else second
    back = BertForMaskedLM.from_pretrained(tmp_path)
    assert back.config == right.config
    for name, tensor in snapshot(right).items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("other", ["shape", "activation", "weights"])
def test_a_killed_save_leaves_the_old_model_or_the_new_one(
    tmp_path, monkeypatch, step, other
):
    """Killed before each step, also between the two renamings: never a mix."""
    torch.manual_seed(0)
    changes = {
        "shape": {"vocab_size": 14},
        "activation": {"hidden_act": "relu"},
    }
    old = BertForMaskedLM(CONFIG)
    new = BertForMaskedLM(replace(CONFIG, **changes.get(other, {})))
    old.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    save_and_die(new, tmp_path, step, monkeypatch)
    right = new if step == 3 else old
    back = BertForMaskedLM.from_pretrained(tmp_path)
    assert back.config == right.config
    for name, tensor in snapshot(right).items():
        assert torch.equal(back.state_dict()[name], tensor), name
    if step < 3:
        assert (tmp_path / "config.json").read_text() == before
    new.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert BertForMaskedLM.from_pretrained(tmp_path).config == new.config


def test_bytes_are_on_the_disk_before_they_have_the_name(folder, monkeypatch):
    order = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda n: (order.append("sync"), fsync(n)))
    monkeypatch.setattr(
        Path, "replace", lambda p, t: (order.append(t.name), rename(p, t))
    )
    BertForPreTraining(CONFIG).save_pretrained(folder)
    assert order == ["sync", "sync", "model.safetensors", "config.json"]


def test_a_first_save_that_is_killed_before_its_end_is_whole(tmp_path):
    model = BertForMaskedLM(CONFIG)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "config.json.tmp")
    assert BertForMaskedLM.from_pretrained(tmp_path).config == CONFIG
    (tmp_path / "config.json.tmp").write_text("{}")  # of another save
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_a_leftover_of_another_save_does_not_count(folder):
    (folder / "config.json.tmp").write_text('{"hidden_size": "half')
    BertForPreTraining.from_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    refused(folder, str(file), "is no safetensors file")


def test_a_config_json_changed_by_hand_is_taken(folder):
    change_config(folder, hidden_act="relu")
    model = BertForPreTraining.from_pretrained(folder)
    assert model.config.hidden_act == "relu"


@pytest.mark.parametrize(
    "name", ["reviews/", "./reviews", "../no-such/a", "~/model"]
)
def test_a_path_is_no_name_on_the_hub(name, monkeypatch):
    def ask(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    with pytest.raises(FileNotFoundError, match=f"'{name}' is not a folder$"):
        BertModel.from_pretrained(name)


def test_whoever_may_read_the_configuration_may_read_the_weights(tmp_path):
    small = BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    before = os.umask(0o027)
    try:
        BertModel(small).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {0o640}
