"""Folders against transformers' folders, and against the bytes by hand."""

import json
from hashlib import sha256
from zlib import crc32

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig as HFConfig

import bertnb
from bertnb import BertConfig, hf_name

transformers.utils.logging.disable_progress_bar()
CONFIG = BertConfig(
    vocab_size=13,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=7,
)
MODELS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
)


def both(name):
    """Our model and theirs, with weights of their own."""
    torch.manual_seed(0)
    ours = getattr(bertnb, name)(CONFIG)
    theirs = getattr(transformers, name)(HFConfig(**CONFIG.to_dict()))
    for parameter in (*ours.parameters(), *theirs.parameters()):
        torch.nn.init.normal_(parameter)
    return ours, theirs


def names_without_buffers(model):
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_our_names_map_one_to_one_onto_theirs(name):
    ours, theirs = both(name)
    translated = [hf_name(n) for n in ours.state_dict()]
    assert len(set(translated)) == len(translated)
    assert set(translated) == names_without_buffers(theirs)
    shapes = {n: p.shape for n, p in theirs.named_parameters()}
    for own, parameter in ours.named_parameters():
        assert parameter.shape == shapes[hf_name(own)]


@pytest.mark.parametrize("name", MODELS)
def test_they_read_what_we_write(name, tmp_path):
    ours, theirs = both(name)
    ours.save_pretrained(tmp_path)
    back, report = type(theirs).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    state = back.state_dict()
    for own, tensor in ours.state_dict().items():
        assert torch.equal(state[hf_name(own)], tensor), own
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [name]
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == [
        name
    ]


@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_they_write(name, tmp_path):
    ours, theirs = both(name)
    theirs.save_pretrained(tmp_path)
    back = type(ours).from_pretrained(tmp_path)
    state = theirs.state_dict()
    for own, tensor in back.state_dict().items():
        assert torch.equal(state[hf_name(own)], tensor), own


@pytest.mark.parametrize("inner", ["BertModel", *MODELS[1:]])
@pytest.mark.parametrize("outer", ["BertModel", *MODELS[1:]])
@pytest.mark.filterwarnings("ignore:.*start untrained:UserWarning")
def test_a_body_goes_from_every_model_to_every_model(inner, outer, tmp_path):
    """With the prefix `bert.` and without."""
    _, theirs = both(inner)
    theirs.save_pretrained(tmp_path)
    state = getattr(theirs, "bert", theirs).state_dict()
    back = getattr(bertnb, outer).from_pretrained(tmp_path)
    for own, tensor in getattr(back, "bert", back).state_dict().items():
        if not own.startswith("pooler.") or hf_name(own) in state:
            assert torch.equal(state[hf_name(own)], tensor), own


def test_the_file_read_with_json_and_numpy_holds_the_numbers(tmp_path):
    ours, _ = both("BertForPreTraining")
    ours.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    digest = sha256((tmp_path / "config.json").read_bytes()).hexdigest()
    metadata = header.pop("__metadata__")
    sums = json.loads(metadata.pop("bertnb_crc32"))
    assert metadata == {"format": "pt", "config_sha256": digest}
    own = {hf_name(name): p for name, p in ours.state_dict().items()}
    assert header.keys() == own.keys()
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = np.frombuffer(data[start + first : start + last], "<f4")
        assert entry["dtype"] == "F32"
        assert entry["shape"] == list(own[name].shape)
        assert (numbers == own[name].flatten().numpy()).all()
        assert sums.pop(name) == crc32(numbers.tobytes())
    assert not sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_read_exactly(dtype, tmp_path):
    _, theirs = both("BertModel")
    theirs.to(dtype).save_pretrained(tmp_path)
    back = bertnb.BertModel.from_pretrained(tmp_path)
    state = theirs.state_dict()
    for own, tensor in back.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(state[hf_name(own)].float(), tensor), own
