"""What must hold for any encoder: masks, padding, dropout, counts, errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bertnb import (
    BertConfig,
    BertEncoder,
    BertLayer,
    BertModel,
    BertPooler,
    expand_mask,
    gather_positions,
    hf_name,
    parameter_count,
)

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=18,
    max_position_embeddings=10,
    initializer_range=0.2,
)


def build(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return BertModel(config).double().eval()


def moved(model, one, two, mask=None):
    """For each token, how far its last state differs between two texts."""
    with torch.no_grad():
        a, b = (model(ids, mask).last_hidden_state for ids in (one, two))
    return (a - b).norm(dim=-1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 99))
def test_padding_width_changes_nothing(length, padding, seed):
    model = build(seed=seed)
    ids = torch.randint(20, (1, length))
    filler = torch.randint(20, (1, padding))
    mask = torch.cat((torch.ones_like(ids), torch.zeros_like(filler)), dim=1)
    with torch.no_grad():
        plain = model(ids)
        padded = model(torch.cat((ids, filler), dim=1), mask)
    state = padded.last_hidden_state[:, :length]
    assert (state - plain.last_hidden_state).abs().max() < 1e-12
    assert (padded.pooler_output - plain.pooler_output).abs().max() < 1e-12


def test_the_rows_of_a_batch_do_not_see_each_other():
    model, ids = build(), torch.randint(20, (3, 6))
    with torch.no_grad():
        together = model(ids).last_hidden_state
        alone = torch.cat([model(row[None]).last_hidden_state for row in ids])
    assert (together - alone).abs().max() < 1e-12


def test_every_token_sees_every_other():
    model, one = build(), torch.randint(20, (1, 6))
    for changed in range(6):
        two = one.clone()
        two[0, changed] = (one[0, changed] + 1) % 20
        assert (moved(model, one, two) > 1e-3).all()


def test_under_a_causal_mask_no_token_sees_a_later_one():
    model, one = build(), torch.randint(20, (1, 6))
    causal = torch.ones(1, 6, 6).tril()
    for changed in range(6):
        two = one.clone()
        two[0, changed] = (one[0, changed] + 1) % 20
        distance = moved(model, one, two, causal)[0]
        assert (distance[:changed] == 0).all()
        assert (distance[changed:] > 1e-3).all()


def test_a_mask_of_queries_by_keys_is_per_row():
    model, ids = build(), torch.randint(20, (2, 4))
    masks = torch.stack((torch.ones(4, 4), torch.ones(4, 4).tril()))
    with torch.no_grad():
        both = model(ids, masks).last_hidden_state
        rows = [
            model(ids[i : i + 1], masks[i : i + 1]).last_hidden_state
            for i in (0, 1)
        ]
    assert (both - torch.cat(rows)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masks_that_say_the_same_give_the_same(dtype):
    model, ids = build(), torch.randint(20, (2, 5))
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    square = keep[:, None].expand(2, 5, 5)
    with torch.no_grad():
        one = model(ids, keep.to(dtype)).last_hidden_state
        two = model(ids, square.to(dtype)).last_hidden_state
        none, ones = model(ids), model(ids, torch.ones(2, 5, dtype=dtype))
    assert (one - two).abs().max() < 1e-12
    plain = none.last_hidden_state
    assert (plain - ones.last_hidden_state).abs().max() < 1e-12
    assert (one[1] - plain[1]).abs().max() > 1e-3


def test_expand_mask_has_a_place_for_heads_and_queries():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert expand_mask(torch.ones(2, 5), ids).shape == (2, 1, 1, 5)
    assert expand_mask(torch.ones(2, 5, 5), ids).shape == (2, 1, 5, 5)
    assert expand_mask(torch.ones(2, 5), ids).dtype == torch.bool


def test_a_row_without_any_token_is_defined():
    model, ids = build(), torch.randint(20, (2, 5))
    mask = torch.tensor([[1] * 5, [0] * 5])
    with torch.no_grad():
        fast = model(ids, mask)
        slow = model(ids, mask, output_attentions=True)
        plain = model(ids[:1])
    assert fast.last_hidden_state.isfinite().all()
    difference = fast.last_hidden_state - slow.last_hidden_state
    assert difference.abs().max() < 1e-12
    assert (slow.attentions[0][1] == 0).all()
    first = fast.last_hidden_state[:1]
    assert (first - plain.last_hidden_state).abs().max() < 1e-12


def test_segments_and_positions_have_their_defaults():
    model, ids = build(), torch.randint(20, (2, 5))
    zeros, places = torch.zeros_like(ids), torch.arange(5)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        said = model(ids, None, zeros, places).last_hidden_state
        other = model(ids, None, zeros + 1).last_hidden_state
        shifted = model(ids, None, None, places + 1).last_hidden_state
        batched = model(ids, None, None, places.expand(2, 5)).last_hidden_state
    assert torch.equal(plain, said)
    assert torch.equal(plain, batched)
    assert (plain - other).abs().max() > 1e-3
    assert (plain - shifted).abs().max() > 1e-3


def test_eval_mode_is_deterministic_and_training_is_not():
    ids = torch.randint(20, (2, 5))
    noisy = replace(
        CONFIG, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5
    )
    model = build(noisy)
    with torch.no_grad():
        one, two = (model(ids, **WANTED) for _ in range(2))
        assert torch.equal(one.last_hidden_state, two.last_hidden_state)
        assert torch.equal(one.pooler_output, two.pooler_output)
        assert torch.equal(
            one.last_hidden_state, build()(ids).last_hidden_state
        )
        model.train()
        one, two = (model(ids).last_hidden_state for _ in range(2))
    assert not torch.equal(one, two)


WANTED = {"output_hidden_states": True}


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.equation("6.1")
def test_dropout_stands_on_each_branch_before_the_sum():
    """With "multiply by 2" in its place, (6.1) can be written down."""
    torch.manual_seed(0)
    layer = BertLayer(CONFIG).double().eval()
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    layer.dropout = Double()
    y = layer.attention_norm(x + 2 * layer.attention(x)[0])
    z = layer.output_norm(y + 2 * layer.feed_forward(y))
    assert torch.equal(layer(x)[0], z)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_layer_takes_the_rate_for_hidden_states(rate):
    config = replace(
        CONFIG, hidden_dropout_prob=rate, attention_probs_dropout_prob=0.7
    )
    assert BertLayer(config).dropout.p == rate


def test_a_layer_is_post_norm():
    """After each layer every state has mean 0 and variance 1, unlike (6.6)."""
    with torch.no_grad():
        out = build()(torch.randint(20, (2, 5)), output_hidden_states=True)
    for states in out.hidden_states:
        assert states.mean(dim=-1).abs().max() < 1e-9
        variance = states.var(dim=-1, correction=0)
        assert (variance - 1).abs().max() < 1e-9


def test_states_and_weights_come_on_request_only():
    model, ids = build(), torch.randint(20, (2, 5))
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with torch.no_grad():
        plain = model(ids, mask)
        states = model(ids, mask, output_hidden_states=True)
        weights = model(ids, mask, output_attentions=True)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert states.attentions is None
    assert weights.hidden_states is None
    assert len(states.hidden_states) == 4
    assert torch.equal(states.hidden_states[-1], states.last_hidden_state)
    with torch.no_grad():
        assert torch.equal(states.hidden_states[0], model.embeddings(ids))
    assert [w.shape for w in weights.attentions] == [(2, 3, 5, 5)] * 3
    for w in weights.attentions:
        assert (w.sum(dim=-1) - 1).abs().max() < 1e-12
        assert (w[1, :, :, 3:] == 0).all()


@pytest.mark.equation("6.3")
def test_the_pooler_is_the_equation(measured):
    torch.manual_seed(0)
    pooler = BertPooler(CONFIG)
    x = torch.randn(2, 12)
    expected = torch.tanh(x @ pooler.dense.weight.T + pooler.dense.bias)
    measured(pooler(x) - expected, 1e-6)


def test_the_model_pools_place_0_or_those_that_are_named():
    model = build()
    ids = torch.randint(20, (2, 7))
    places = torch.tensor([[3, 0, 3], [6, 1, 0]])
    with torch.no_grad():
        plain, named = model(ids), model(ids, cls_positions=places)
        expected = model.pooler(plain.last_hidden_state)  # of every place
    assert (plain.pooler_output - expected[:, 0]).abs().max() < 1e-12
    assert named.pooler_output.shape == (2, 3, 12)
    for row in range(2):
        pooled = named.pooler_output[row]
        assert (pooled - expected[row, places[row]]).abs().max() < 1e-12
    assert torch.equal(named.last_hidden_state, plain.last_hidden_state)


# the last layer only where it is read


def masks_of(length):
    """None, padding, queries by keys, and one with rows that see nothing."""
    keys = torch.arange(length) < torch.tensor([[length], [2]])
    square = torch.rand(2, length, length) < 0.5
    square[:, range(length), range(length)] = True
    hollow = square.clone()
    hollow[0, 1] = hollow[1] = False
    return {"none": None, "keys": keys, "square": square, "hollow": hollow}


def gradients(model, output, towards):
    loss = sum((o * t).sum() for o, t in zip(output, towards, strict=True))
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.equation("6.8")
@pytest.mark.parametrize("kind", ["none", "keys", "square", "hollow"])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)
def test_some_places_of_the_last_layer_equal_all(
    kind, named, dtype, bound, measured
):
    """States, pooled vectors and every gradient."""
    model = build().to(dtype)
    ids = torch.randint(20, (2, 7))
    places = torch.tensor([[5, 1, 1, 0], [0, 6, 2, 3]])
    firsts = torch.tensor([[0, 4, 4], [3, 1, 0]]) if named else None
    mask = masks_of(7)[kind]
    full = model(ids, mask, cls_positions=firsts)
    some = model(ids, mask, cls_positions=firsts, masked_positions=places)
    a = gather_positions(full.last_hidden_state, places), full.pooler_output
    b = some.last_hidden_state, some.pooler_output
    towards = [torch.randn_like(x) for x in a]
    for one, two in zip(a, b, strict=True):
        assert one.shape == two.shape
        measured(one - two, bound)
    slopes = [gradients(model, states, towards) for states in (a, b)]
    for one, two in zip(*slopes, strict=True):
        scale = max(1, one.abs().max().item())
        measured((one - two) / scale, bound)


def test_the_last_layer_computes_only_what_is_read():
    model = build()
    shapes = {}
    for number, layer in enumerate(model.encoder.layer):
        layer.output_norm.register_forward_hook(
            lambda _, __, y, number=number: shapes.update({number: y.shape})
        )
    ids = torch.randint(20, (2, 7))
    places = torch.tensor([[5, 1, 2], [0, 6, 2]])
    model(ids, masked_positions=places)
    assert shapes == {0: (2, 7, 12), 1: (2, 7, 12), 2: (2, 4, 12)}
    bare = BertModel(CONFIG, add_pooling_layer=False).double()
    bare.encoder.layer[2].register_forward_hook(
        lambda _, __, y: shapes.update({"bare": y[0].shape})
    )
    bare(ids, masked_positions=places)
    assert shapes["bare"] == (2, 3, 12)


def test_all_states_are_there_if_they_are_asked_for():
    model = build()
    ids = torch.randint(20, (2, 7))
    places = {"masked_positions": torch.tensor([[5, 1], [0, 6]])}
    fast = model(ids, **places)
    for wish in ("output_hidden_states", "output_attentions"):
        out = model(ids, **places, **{wish: True})
        states = out.last_hidden_state
        assert (states - fast.last_hidden_state).abs().max() < 1e-12
        assert (out.pooler_output - fast.pooler_output).abs().max() < 1e-12
    assert out.attentions[-1].shape == (2, 3, 7, 7)
    every = model(ids, output_hidden_states=True, **places).hidden_states
    assert [x.shape for x in every] == [(2, 7, 12)] * 4


def test_gather_takes_each_rows_own_places():
    states = torch.arange(24.0).reshape(2, 4, 3)
    taken = gather_positions(states, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(taken[0], states[0, [3, 0]])
    assert torch.equal(taken[1], states[1, [1, 1]])


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (torch.tensor([[0], [4]]), "holds 4; expected 0 to 3"),
        (torch.tensor([[-1], [0]]), "holds -1"),
        (torch.tensor([[0]]), r"has shape \(1, 1\); .*\(2, K\)"),
        (torch.tensor([0, 1]), r"has shape \(2,\)"),
    ],
)
def test_wrong_places_are_named(positions, words):
    with pytest.raises(ValueError, match=f"^positions {words}"):
        gather_positions(torch.zeros(2, 4, 3), positions)
    ids = torch.zeros(2, 4).long()
    for name in ("masked_positions", "cls_positions"):
        with pytest.raises(ValueError, match=f"^{name} {words}"):
            build()(ids, **{name: positions})


def test_a_model_without_pooler_gives_the_same_states():
    torch.manual_seed(0)
    bare = BertModel(CONFIG, add_pooling_layer=False).double().eval()
    bare.load_hf_weights(hf_weights(build()), "here")
    ids = torch.randint(20, (1, 4))
    with torch.no_grad():
        out, full = bare(ids), build()(ids)
    assert out.pooler_output is None
    assert torch.equal(out.last_hidden_state, full.last_hidden_state)


def hf_weights(model):
    return {hf_name(name): p for name, p in model.state_dict().items()}


def test_every_parameter_gets_a_gradient():
    model = build().train()
    segments = torch.tensor([[0, 0, 1, 1]])
    out = model(torch.randint(20, (1, 4)), token_type_ids=segments)
    direction = torch.randn(1, 4, 12, dtype=torch.float64)
    loss = (out.last_hidden_state * direction).sum()
    (loss + out.pooler_output.sum()).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # it has no effect: exercise 1.3
            assert parameter.grad.abs().max() > 1e-9, name


def test_the_gradient_of_a_layer_is_its_finite_difference():
    torch.manual_seed(0)
    config = replace(CONFIG, hidden_size=4, num_attention_heads=2)
    layer = BertLayer(config).double().eval()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask)[0], x)


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_every_part_starts_as_the_configuration_says(spread):
    torch.manual_seed(0)
    model = BertModel(replace(CONFIG, hidden_size=60, initializer_range=spread))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "orm.weight" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.abs().max() <= 2 * spread, name
            assert 0.6 * spread < parameter.std() < 1.1 * spread, name


@pytest.mark.equation("6.5")
@settings(max_examples=25, deadline=None)
@given(*[st.integers(1, 30)] * 7)
def test_the_count_is_that_of_the_model(v, m, t, n, a, d, f):
    config = BertConfig(
        vocab_size=v,
        max_position_embeddings=m,
        type_vocab_size=t,
        num_hidden_layers=n,
        num_attention_heads=a,
        hidden_size=a * d,
        intermediate_size=f,
    )
    with torch.device("meta"):
        model = BertModel(config)
    terms = parameter_count(config)
    total = terms.pop("total")
    assert total == sum(p.numel() for p in model.parameters())
    assert total == sum(terms.values())
    layer = model.encoder.layer[0]
    for name, module, times in (
        ("word_embeddings", model.embeddings.word_embeddings, 1),
        ("position_embeddings", model.embeddings.position_embeddings, 1),
        ("token_type_embeddings", model.embeddings.token_type_embeddings, 1),
        ("embedding_norm", model.embeddings.LayerNorm, 1),
        ("attention", layer.attention, n),
        ("feed_forward", layer.feed_forward, n),
        ("layer_norms", layer.output_norm, 2 * n),
        ("pooler", model.pooler, 1),
    ):
        count = sum(p.numel() for p in module.parameters())
        assert terms[name] == times * count, name


def test_ids_are_a_batch_of_rows():
    message = r"input_ids has shape \(4,\); expected \(batch, length\)"
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (2, 1, 5), (2, 1, 1, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    ids = torch.zeros(2, 5, dtype=torch.int64)
    message = (
        r"attention_mask has shape .*expected \(2, 5\) like input_ids, or "
        r"\(2, 5, 5\) for queries by keys"
    )
    with pytest.raises(ValueError, match=message):
        build()(ids, torch.ones(shape))


def test_a_text_that_is_too_long_names_the_limit():
    ids = torch.zeros(1, 11, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_position_embeddings=10"):
        build()(ids)


def test_an_id_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match=r"input_ids holds 20.*vocab_size=20"):
        build()(torch.tensor([[3, 20]]))


def test_longest_text_fits():
    ids = torch.zeros(1, 10, dtype=torch.int64)
    assert build()(ids).last_hidden_state.shape == (1, 10, 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees():
    model, ids = build(), torch.randint(20, (2, 5))
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    with torch.no_grad():
        here = model(ids, mask).last_hidden_state
        there = model.cuda()(ids.cuda(), mask.cuda()).last_hidden_state
    assert (here - there.cpu()).abs().max() < 1e-9


def test_the_stack_keeps_only_what_is_asked_for():
    torch.manual_seed(0)
    output = BertEncoder(CONFIG).eval()(torch.randn(1, 4, 12))
    assert output.hidden_states is None
    assert output.attentions is None
