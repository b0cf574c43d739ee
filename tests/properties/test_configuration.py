"""BertConfig, read_json and locate: what is refused, ignored and returned."""

import json
import re
from dataclasses import FrozenInstanceError, fields

import pytest

from bertnb import BertConfig, BertnbError, locate, read_json
from bertnb.configuration import FIXED, HIDDEN_ACTS, IGNORED, SIZES


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_a_size_is_a_positive_whole_number(name, value):
    message = f"{name}={value!r}: expected a positive whole number"
    with pytest.raises(ValueError, match=re.escape(message)):
        BertConfig(**{name: value})


@pytest.mark.parametrize("name", SIZES)
def test_the_smallest_size_is_one(name):
    others = dict.fromkeys({"hidden_size", "num_attention_heads"}, 1)
    assert getattr(BertConfig(**{**others, name: 1}), name) == 1


RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("value", [-0.1, 1, 1.0, float("nan"), "0.1", False])
def test_a_dropout_rate_lies_below_one(name, value):
    message = f"{name}={value!r}: expected a number in [0, 1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        BertConfig(**{name: value})


@pytest.mark.parametrize("name", RATES)
def test_dropout_may_be_zero(name):
    assert getattr(BertConfig(**{name: 0.0}), name) == 0


@pytest.mark.parametrize("name", ["initializer_range", "layer_norm_eps"])
@pytest.mark.parametrize(
    "value", [0, -1e-3, float("nan"), float("inf"), "1e-12", None, True]
)
def test_other_numbers_are_positive_and_finite(name, value):
    message = f"{name}={value!r}: expected a positive number"
    with pytest.raises(ValueError, match=re.escape(message)):
        BertConfig(**{name: value})


@pytest.mark.parametrize("value", ["sigmoid", "", None, ["gelu"]])
def test_the_activation_is_one_of_ours(value):
    with pytest.raises(ValueError, match="expected one of gelu, gelu_new"):
        BertConfig(hidden_act=value)


def test_every_activation_can_be_built():
    from bertnb.layers import ACTIVATIONS

    assert set(ACTIVATIONS) == set(HIDDEN_ACTS)


@pytest.mark.parametrize("value", [-1, 10, 1.0, None, True])
def test_the_padding_is_an_id_of_the_vocabulary(value):
    message = f"pad_token_id={value!r}: expected an id from 0 to 9"
    with pytest.raises(ValueError, match=re.escape(message)):
        BertConfig(vocab_size=10, pad_token_id=value)
    assert BertConfig(vocab_size=10, pad_token_id=9).pad_token_id == 9


def test_the_heads_divide_the_hidden_size():
    message = "num_attention_heads=5: expected a divisor of hidden_size=768"
    with pytest.raises(ValueError, match=message):
        BertConfig(num_attention_heads=5)


@pytest.mark.equation("0.2")
@pytest.mark.parametrize(("h", "a", "d"), [(768, 12, 64), (6, 6, 1), (5, 1, 5)])
def test_the_head_size_is_the_share_of_one_head(h, a, d):
    config = BertConfig(hidden_size=h, num_attention_heads=a)
    assert config.head_size == d


def test_a_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError):
        BertConfig().hidden_size = 5


def test_there_are_thirteen_values():
    assert len(BertConfig().to_dict()) == len(fields(BertConfig)) == 13
    assert BertConfig.from_dict(BertConfig(vocab_size=7).to_dict()) == (
        BertConfig(vocab_size=7)
    )


def test_the_three_kinds_of_keys_are_apart():
    names = {field.name for field in fields(BertConfig)}
    assert not names & (IGNORED | FIXED.keys())
    assert not IGNORED & FIXED.keys()


@pytest.mark.parametrize("key", sorted(FIXED))
def test_a_key_that_changes_the_architecture_has_one_value(key):
    for value in FIXED[key]:
        assert BertConfig.from_dict({key: value}) == BertConfig()
    message = f"{key}='another': only {FIXED[key][0]!r} is supported"
    with pytest.raises(ValueError, match=re.escape(message)):
        BertConfig.from_dict({key: "another"})


@pytest.mark.parametrize("key", sorted(IGNORED))
def test_a_harmless_key_changes_nothing(key):
    assert BertConfig.from_dict({key: "whatever"}) == BertConfig()


def test_files_of_the_years_are_read():
    """Keys of real files: Google 2018, transformers 2 (in full), 4 and 5."""
    google = {
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "hidden_act": "gelu",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "type_vocab_size": 2,
        "vocab_size": 21128,
    }
    assert BertConfig.from_dict(google).vocab_size == 21128
    full = {
        "_num_labels": 2,
        "bad_words_ids": None,
        "do_sample": False,
        "finetuning_task": None,
        "is_decoder": False,
        "length_penalty": 1.0,
        "max_length": 20,
        "num_beams": 1,
        "pruned_heads": {},
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "torchscript": False,
        "use_bfloat16": False,
        "xla_device": None,
    }
    assert BertConfig.from_dict(full) == BertConfig()
    newer = {
        "architectures": ["BertForMaskedLM"],
        "gradient_checkpointing": False,
        "model_type": "bert",
        "position_embedding_type": "absolute",
        "tokenizer_class": "BertJapaneseTokenizer",
        "transformers_version": "4.6.0.dev0",
        "use_cache": True,
    }
    assert BertConfig.from_dict(newer) == BertConfig()


@pytest.mark.parametrize("key", ["hidden_sise", "quantization_config", ""])
def test_an_unknown_key_is_refused(key):
    message = f"unknown configuration key {key!r}=4; known: attention_probs"
    with pytest.raises(ValueError, match=re.escape(message)):
        BertConfig.from_dict({key: 4})


def test_an_error_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "my_config.json"
    file.write_text('{"hidden_size": 0}')
    message = f"{file}: hidden_size=0: expected a positive"
    with pytest.raises(BertnbError, match=re.escape(message)):
        BertConfig.from_json_file(file)
    file.write_text('{"hidden_size": 24}')
    assert BertConfig.from_json_file(str(file)).hidden_size == 24


def test_read_json_wants_an_object_in_utf8(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"name": "été"}', encoding="utf-8")
    assert read_json(file) == {"name": "été"}
    file.write_text('["name"]')
    message = f"{file} holds a list; expected keys and values"
    with pytest.raises(BertnbError, match=re.escape(message)):
        read_json(file)
    file.write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(BertnbError, match="is not valid JSON"):
        read_json(file)


def test_locate_finds_a_file_in_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert locate(tmp_path, "config.json") == tmp_path / "config.json"
    assert locate(str(tmp_path), "config.json").read_text() == "{}"


def test_locate_says_what_a_folder_holds_instead(tmp_path):
    (tmp_path / "b.txt").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "config.json").mkdir()  # a folder is no file
    message = f"{tmp_path} holds no config.json; it holds ['a.txt', 'b.txt', "
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        locate(tmp_path, "config.json")
