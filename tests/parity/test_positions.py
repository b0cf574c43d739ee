"""Both tables of positions against NumPy, torch.nn and transformers."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig as HFConfig
from transformers import BertModel as HFModel
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.distilbert.modeling_distilbert import (
    create_sinusoidal_embeddings,
)

from bertnb import BertConfig, LearnedPositions, sinusoidal_positions

SMALL = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def numpy_table(length, dim):
    """One entry after the other, in float64."""
    table = np.zeros((length, dim))
    for p in range(length):
        for i in range(dim // 2):
            omega = 10000.0 ** (-2 * i / dim)
            table[p, 2 * i] = np.sin(p * omega)
            table[p, 2 * i + 1] = np.cos(p * omega)
    return table


@pytest.mark.equation("3.6", "3.7")
@pytest.mark.parametrize("shape", [(1, 2), (5, 4), (40, 16), (600, 6)])
def test_sinusoids_are_the_float64_table_rounded_to_float32(shape, measured):
    ours = sinusoidal_positions(*shape)
    assert ours.dtype == torch.float32
    assert ours.shape == shape
    difference = ours.double().numpy() - numpy_table(*shape)
    measured(difference, 2**-25 + 1e-12)  # half the spacing of float32 below 1


@pytest.mark.equation("3.7")
def test_float64_angles_are_exact_at_far_places_too(measured):
    ours = sinusoidal_positions(100_000, 4)[-1].double().numpy()
    angle = 99_999 * np.array([1.0, 1.0, 0.01, 0.01])
    theirs = np.where([True, False] * 2, np.sin(angle), np.cos(angle))
    measured(ours - theirs, 1e-7)


@pytest.mark.equation("3.7")
def test_sinusoids_equal_those_of_distilbert(measured):
    theirs = torch.empty(128, 32)
    create_sinusoidal_embeddings(n_pos=128, dim=32, out=theirs)
    measured(sinusoidal_positions(128, 32) - theirs, 1e-7)


@pytest.mark.equation("3.9")
def test_learned_positions_equal_the_embedding_of_torch_and_its_gradient(
    measured,
):
    torch.manual_seed(0)
    ours = LearnedPositions(BertConfig(**SMALL))
    theirs = nn.Embedding(16, 8)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.tensor([[0, 1, 2], [15, 1, 0]])
    measured(ours(ids) - theirs(ids), 0)
    measured(ours(ids) - ours.weight[ids], 0)
    ours(ids).square().sum().backward()
    theirs(ids).square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
def test_learned_positions_equal_those_of_transformers(direction):
    torch.manual_seed(0)
    ours = LearnedPositions(BertConfig(**SMALL))
    theirs = BertEmbeddings(HFConfig(**SMALL)).position_embeddings
    if direction == "ours to theirs":
        theirs.load_state_dict(ours.state_dict())
    else:
        ours.load_state_dict(theirs.state_dict())
    ids = torch.arange(16)
    assert torch.equal(ours(ids), theirs(ids))


def test_transformers_too_counts_places_from_the_left_end_of_the_row():
    torch.manual_seed(0)
    model = HFModel(HFConfig(**SMALL)).eval()

    def states(ids, position_ids=None):
        ids = torch.tensor([ids])
        out = model(
            ids, attention_mask=(ids > 0).long(), **(position_ids or {})
        )
        return out.last_hidden_state[ids > 0]

    with torch.no_grad():
        alone = states([5, 6, 7])
        right = states([5, 6, 7, 0, 0])
        left = states([0, 0, 5, 6, 7])
        places = {"position_ids": torch.tensor([[0, 0, 0, 1, 2]])}
        again = states([0, 0, 5, 6, 7], places)
    assert (right - alone).abs().max() < 1e-5
    assert (left - alone).abs().max() > 0.1
    assert (again - alone).abs().max() < 1e-5
