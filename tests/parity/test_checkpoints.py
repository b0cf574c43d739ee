"""The checkpoint of 2018 against TensorFlow's own files and transformers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tf_bundle
import torch
import transformers

import bertnb
from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    WordPieceTokenizer,
    from_tf_checkpoint,
    hf_name,
    hf_name_from_tf,
    read_tf_checkpoint,
    resize_vocabulary,
)

transformers.utils.logging.disable_progress_bar()
DATA = Path(
    os.environ.get("BERTNB_DATA", Path(__file__).parents[3] / "shared/data")
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
BATCH = {
    "input_ids": torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 10, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6]),
}


def outputs(model, batch=BATCH):
    with torch.no_grad():
        result = model.eval()(**batch)
    fields = result if isinstance(result, dict) else vars(result)
    return torch.cat([t.flatten() for t in fields.values() if t is not None])


@pytest.fixture
def google():
    """A checkpoint that TensorFlow wrote."""
    folder = DATA / "tf_ckpt_tiny_random"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set BERTNB_DATA to the folder of real data")
    return folder


def test_tensorflows_own_file_is_read_and_every_sum_is_right(google):
    tensors = read_tf_checkpoint(google / "bert_model.ckpt")
    config = json.loads((google / "bert_config.json").read_text())
    assert len(tensors) == 139
    assert tensors["global_step"].dtype == torch.int64
    table = tensors["bert/embeddings/word_embeddings"]
    assert table.shape == (config["vocab_size"], config["hidden_size"])
    kernel = tensors["bert/encoder/layer_1/output/dense/kernel"]
    assert kernel.shape == (config["intermediate_size"], config["hidden_size"])
    floats = [t for n, t in tensors.items() if n != "global_step"]
    assert {t.dtype for t in floats} == {torch.float32}
    assert all(t.isfinite().all() for t in floats)
    # fresh weights: a normal cut at two deviations of 0.02
    assert 0.01 < table.std() < 0.03
    assert table.abs().max() <= 0.04


def test_the_numbers_are_those_in_the_data_file(google):
    """Without our reader: the first tensor lies at byte 0, by the names."""
    raw = (google / "bert_model.ckpt.data-00000-of-00001").read_bytes()
    tensors = read_tf_checkpoint(google / "bert_model.ckpt")
    assert sum(t.nbytes for t in tensors.values()) == len(raw)
    at = 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        assert tensors[name].numpy().tobytes() == raw[at : at + size], name
        at += size


def test_a_model_from_tensorflows_file_equals_transformers(google, tmp_path):
    model = from_tf_checkpoint(BertForPreTraining, google)
    assert not model.training
    tokenizer = WordPieceTokenizer.from_pretrained(google)
    batch = tokenizer(
        ["all work and no play", "a dull boy"], ["makes jack", "a [MASK] boy"]
    )
    ours = model(**batch).prediction_logits
    assert ours.isfinite().all()
    model.save_pretrained(tmp_path)
    peer, report = transformers.BertForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert (outputs(model, batch) - outputs(peer, batch)).abs().max() < 1e-6
    # and each tensor by its name, without our loading
    tensors = read_tf_checkpoint(google / "bert_model.ckpt")
    state = peer.state_dict()
    own = [n for n in tensors if "adam" not in n and n != "global_step"]
    for name in own:
        tensor = tensors[name].numpy()
        tensor = tensor.T if name.endswith("kernel") else tensor
        assert np.array_equal(state[hf_name_from_tf(name)].numpy(), tensor)
    assert {hf_name_from_tf(n) for n in own} == {
        hf_name(n) for n in model.state_dict()
    }


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore:.*start untrained:UserWarning")
def test_every_model_begins_from_tensorflows_file(google, name):
    """Heads that the file lacks are new; heads that it has are left out."""
    model = from_tf_checkpoint(getattr(bertnb, name), google)
    full = from_tf_checkpoint(BertForPreTraining, google).bert.state_dict()
    body = getattr(model, "bert", model).state_dict()
    assert all(torch.equal(body[n], full[n]) for n in body)


@pytest.mark.equation("15.4")
def test_a_kernel_is_turned_and_an_output_matrix_is_not(google, measured):
    """The original computes x K + b, and x W^T + b for `output_weights`."""
    tensors = read_tf_checkpoint(google / "bert_model.ckpt")
    model = from_tf_checkpoint(BertForPreTraining, google)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    part = "bert/encoder/layer_0/intermediate/dense/"
    y = x @ tensors[part + "kernel"] + tensors[part + "bias"]
    layer = model.bert.encoder.layer[0].feed_forward.intermediate
    measured(layer(x) - y, 1e-6)
    part = "bert/encoder/layer_0/attention/self/query/"  # square
    y = x @ tensors[part + "kernel"] + tensors[part + "bias"]
    measured(model.bert.encoder.layer[0].attention.query(x) - y, 1e-6)
    part = "cls/seq_relationship/output_"
    y = x @ tensors[part + "weights"].T + tensors[part + "bias"]
    measured(model.next_sentence(x) - y, 1e-6)


# the same without TensorFlow's file: a writer that shares nothing with us


def to_google(model):
    """The original's names and layout, from transformers' model."""
    arrays = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if "LayerNorm" in name:
            name = name.replace("weight", "gamma").replace("bias", "beta")
        elif name.startswith("classifier."):
            name = name.replace("classifier.", "output_")
        elif name.startswith("qa_outputs."):
            name = name.replace("qa_outputs.", "cls.squad.output_")
        elif "seq_relationship" in name or name == "cls.predictions.bias":
            name = name.replace("weight", "output_weight")
            name = name.replace("bias", "output_bias")
        elif name.endswith("_embeddings.weight"):
            name = name.removesuffix(".weight")
        elif name.endswith("weight"):
            name, array = name.replace("weight", "kernel"), array.T
        if name.endswith("output_weight"):
            name += "s"
        name = name.replace(".layer.", ".layer_").replace(".", "/")
        arrays[name] = np.ascontiguousarray(array)
        arrays[f"{name}/adam_v"] = array * 0 + np.nan  # never looked at
    return arrays | {"global_step": np.array(9, "i8")}


@pytest.mark.equation("15.4")
@pytest.mark.parametrize("name", HEADS)
def test_every_head_comes_from_the_form_of_2018(name, tmp_path, measured):
    torch.manual_seed(0)
    config = transformers.BertConfig(**CONFIG.to_dict())
    peer = getattr(transformers, name)(config)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    body = getattr(peer, "bert", None)
    arrays = to_google(peer)
    if body is None:  # the original always writes bert/
        arrays = {f"bert/{n}": a for n, a in arrays.items()}
        arrays["global_step"] = arrays.pop("bert/global_step")
    tf_bundle.write_bundle(tmp_path / "model.ckpt-9", arrays, shards=2)
    text = json.dumps(CONFIG.to_dict())
    (tmp_path / "bert_config.json").write_text(text)
    ours = from_tf_checkpoint(getattr(bertnb, name), tmp_path)
    measured(outputs(ours) - outputs(peer), 1e-5)
    ours.save_pretrained(tmp_path / "out")
    back = getattr(transformers, name).from_pretrained(tmp_path / "out")
    assert (outputs(back) - outputs(peer)).abs().max() < 1e-6


# new words


@pytest.mark.parametrize("size", [9, 14])
@pytest.mark.parametrize("name", HEADS)
def test_a_resized_model_is_the_same_in_transformers(name, size, tmp_path):
    torch.manual_seed(0)
    ours = getattr(bertnb, name)(CONFIG)
    resize_vocabulary(ours, size, shrink=True)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.save_pretrained(tmp_path)
    peer, report = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert peer.config.vocab_size == size
    batch = {**BATCH, "input_ids": BATCH["input_ids"] % size}
    assert (outputs(ours, batch) - outputs(peer, batch)).abs().max() < 1e-5


def test_the_same_new_rows_give_the_same_model_as_theirs(tmp_path):
    """Theirs resized by transformers, ours by us, with their new rows."""
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG)
    model.save_pretrained(tmp_path)
    peer = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    peer.resize_token_embeddings(14)
    resize_vocabulary(model, 14)
    new = peer.get_input_embeddings().weight
    with torch.no_grad():
        table = model.bert.embeddings.word_embeddings.weight
        assert torch.equal(table[:11], new[:11])
        table[11:] = new[11:]
    batch = {**BATCH, "input_ids": BATCH["input_ids"] + 3}
    assert (outputs(model, batch) - outputs(peer, batch)).abs().max() < 1e-6
