"""PretrainedModel on a toy with a body and a head."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bertnb.folders
from bertnb import BertConfig, BertnbError, PretrainedModel, hf_name

CONFIG = BertConfig(
    vocab_size=5, hidden_size=4, num_attention_heads=2, hidden_act="relu"
)


class Toy(PretrainedModel):
    def __init__(self, config, width=3):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, width)

    @classmethod
    def saved_head_arguments(cls, saved):
        return {"width": saved["num_labels"]} if "num_labels" in saved else {}

    def extra_config(self):
        return {"num_labels": self.classifier.out_features}


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy(CONFIG, width=6)


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_folder_holds_two_files_and_comes_back(toy, tmp_path):
    toy.save_pretrained(str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    back = Toy.from_pretrained(str(folder))
    assert same(back, toy)
    assert back.config == CONFIG


def test_config_json_names_model_and_head(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["Toy"]
    assert saved["model_type"] == "bert"
    assert saved["num_labels"] == 6
    assert BertConfig.from_dict(saved) == CONFIG
    assert CONFIG.to_dict().items() <= saved.items()


def test_a_loaded_model_is_ready_to_use_and_can_be_trained(toy, tmp_path):
    toy.train().save_pretrained(tmp_path)
    assert toy.training
    back = Toy.from_pretrained(tmp_path)
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())


def test_head_arguments_come_from_the_call_or_else_from_the_file(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    assert Toy.from_pretrained(tmp_path).classifier.out_features == 6
    with pytest.raises(BertnbError, match=r"classifier\.weight has shape"):
        Toy.from_pretrained(tmp_path, width=2)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "num_labels": 2}))
    assert same(Toy.from_pretrained(tmp_path, width=6), toy)
    with pytest.raises(TypeError, match="height"):
        Toy.from_pretrained(tmp_path, height=6)


def test_a_model_without_a_head_has_no_head_arguments(toy):
    assert PretrainedModel.saved_head_arguments({"id2label": {"0": "a"}}) == {}
    assert PretrainedModel.extra_config(toy) == {}


def test_saving_again_replaces(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    other = Toy(CONFIG, width=2)
    other.save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), other)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("written", [0, 50, None])
def test_a_save_that_dies_leaves_the_last_good_files(
    toy, tmp_path, monkeypatch, written
):
    toy.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save_file = bertnb.folders.save_file

    def dies(weights, path, metadata):
        save_file(weights, path, metadata)
        path.write_bytes(path.read_bytes()[:written])
        raise KeyboardInterrupt

    monkeypatch.setattr(bertnb.folders, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        Toy(CONFIG, width=2).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    assert same(Toy.from_pretrained(tmp_path), toy)
    toy.save_pretrained(tmp_path)  # what the dead one left is in nobody's way
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_loading_copies(toy, tmp_path):
    """The model does not share memory with what was given to it."""
    weights = {n: torch.ones_like(p) for n, p in toy.state_dict().items()}
    toy.load_hf_weights(weights, "here")
    weights["words.weight"].zero_()
    assert (toy.words.weight == 1).all()
    toy.save_pretrained(tmp_path)
    back = Toy.from_pretrained(tmp_path)
    toy.words.weight.data.zero_()
    assert (back.words.weight == 1).all()


def test_loading_leaves_the_given_weights_as_they_are(toy):
    weights = {n: p.clone() for n, p in toy.state_dict().items()}
    weights["bert.embeddings.position_ids"] = torch.arange(3)
    names = set(weights)
    toy.load_hf_weights(weights, "here")
    assert set(weights) == names


def test_a_missing_head_warns_where_from_pretrained_was_called(toy, tmp_path):
    weights = {"words.weight": torch.ones(5, 4)}
    toy.save_pretrained(tmp_path)
    bertnb.folders.save_file(weights, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="start untrained") as caught:
        back = Toy.from_pretrained(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "no weights for classifier.bias, classifier.weight:" in text
    assert (back.words.weight == 1).all()


def test_a_missing_body_is_an_error_and_says_what_is_not_wrong(toy):
    weights = {n: p for n, p in toy.state_dict().items() if n != "words.weight"}
    message = "here does not fit Toy: missing words.weight; unexpected nothing"
    with pytest.raises(BertnbError, match=message):
        toy.load_hf_weights(weights, "here")


def test_the_first_three_of_many_names(toy):
    extra = {f"adapter.{i}": torch.ones(1) for i in range(5)}
    message = "unexpected adapter.0, adapter.1, adapter.2 and 2 more"
    with pytest.raises(BertnbError, match=message):
        toy.load_hf_weights({**toy.state_dict(), **extra}, "here")
    del extra["adapter.3"], extra["adapter.4"]
    with pytest.raises(BertnbError, match=r"adapter.1, adapter.2 \(`ignore`"):
        toy.load_hf_weights({**toy.state_dict(), **extra}, "here")


def test_weights_on_another_layout_are_saved(toy, tmp_path):
    """A transposed view is not contiguous; safetensors wants it to be."""
    toy.words.weight = nn.Parameter(torch.arange(20.0).view(4, 5).T)
    toy.save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), toy)


def test_a_model_in_half_precision_is_saved_as_it_is(toy, tmp_path):
    toy.bfloat16().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("words.weight", "words.weight"),
        ("masked_lm.bias", "cls.predictions.bias"),
        ("masked_lm.dense.bias", "cls.predictions.transform.dense.bias"),
        ("next_sentence.bias", "cls.seq_relationship.bias"),
        (
            "bert.encoder.layer.3.attention.output.bias",
            "bert.encoder.layer.3.attention.output.dense.bias",
        ),
        (
            "encoder.layer.0.output_norm.weight",
            "encoder.layer.0.output.LayerNorm.weight",
        ),
    ],
)
def test_a_name_is_translated_once(ours, theirs):
    assert hf_name(ours) == theirs
