"""What must hold of the embeddings for any numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb import BertConfig, BertEmbeddings, BertModel

CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
    hidden_dropout_prob=0.5,
    attention_probs_dropout_prob=0.0,
)
IDS = torch.tensor([[5, 9, 9, 3, 0], [7, 5, 1, 0, 0]])


def module(seed=0):
    torch.manual_seed(seed)
    return BertEmbeddings(CONFIG).double().eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_omitted_segments_are_0_and_omitted_places_count_from_0():
    embed = module()
    explicit = embed(IDS, torch.zeros_like(IDS), torch.arange(5))
    assert torch.equal(embed(IDS), explicit)
    assert not torch.equal(embed(IDS, torch.ones_like(IDS)), explicit)
    moved = embed(IDS, position_ids=torch.arange(1, 6))
    assert not torch.equal(moved, explicit)


def test_segments_and_places_may_be_one_row_for_all():
    embed = module()
    segments, places = (
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([4, 0, 2, 9, 9]),
    )
    expected = embed(IDS, segments.expand(2, 5), places.expand(2, 5))
    assert torch.equal(embed(IDS, segments, places), expected)
    assert torch.equal(embed(IDS, segments[None], places[None]), expected)


@given(st.integers(0, 1), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_token_s_vector_depends_on_its_own_three_ids_only(row, place, seed):
    embed = module()
    torch.manual_seed(seed)
    others, segments = torch.randint(40, (2, 5)), torch.randint(2, (2, 5))
    changed = others.clone()
    changed[row, place] = IDS[row, place]
    here = segments[row, place]
    alone = embed(
        IDS[row, place].view(1, 1), here.view(1, 1), torch.tensor([place])
    )
    close(embed(changed, segments)[row, place], alone[0, 0])


def test_padding_width_changes_nothing():
    wide = torch.nn.functional.pad(IDS, (0, 6))
    close(module()(wide)[:, :5], module()(IDS))


@pytest.mark.equation("5.2")
def test_one_hot_times_table_is_the_look_up(measured):
    table = module().word_embeddings.weight
    onehot = torch.nn.functional.one_hot(IDS, 40).double()
    measured(onehot @ table - module().word_embeddings(IDS), 0)


@pytest.mark.equation("5.4")
def test_the_gradient_of_a_row_is_the_sum_over_its_places(measured):
    embed, sums = module(), []

    def keep(norm, arguments):
        arguments[0].retain_grad()
        sums.append(arguments[0])

    embed.LayerNorm.register_forward_pre_hook(keep)
    (embed(IDS) * torch.randn(2, 5, 12)).sum().backward()
    expected = torch.zeros(40, 12).double()
    for row, word in enumerate(IDS):
        for place, number in enumerate(word):
            expected[number] += sums[0].grad[row, place]
    measured(embed.word_embeddings.weight.grad - expected, 1e-12)


def test_only_rows_that_occur_get_a_gradient():
    embed = module()
    segments = torch.zeros_like(IDS)
    (embed(IDS, segments) * torch.randn(2, 5, 12)).sum().backward()
    for table, used in (
        (embed.word_embeddings, {0, 1, 3, 5, 7, 9}),  # [PAD], 0, as any row
        (embed.token_type_embeddings, {0}),
        (embed.position_embeddings, set(range(5))),
    ):
        rows = table.weight.grad.any(dim=1).nonzero().flatten().tolist()
        assert set(rows) == used


def test_pad_gets_no_gradient_where_mask_and_loss_leave_it_out():
    torch.manual_seed(0)
    model = BertModel(CONFIG).double().eval()
    mask = (IDS != 0).long()
    states = model(IDS, attention_mask=mask).last_hidden_state
    loss = (states * torch.randn(2, 5, 12))[mask.bool()].sum()
    loss.backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert gradient[5].any()
    assert not gradient[0].any()


def test_gradients_agree_with_finite_differences():
    embed = module()
    names = [name for name, _ in embed.named_parameters()]
    values = [p.detach().requires_grad_() for p in embed.parameters()]

    def run(*tensors):
        weights = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(embed, weights, (IDS[:1, :3],))

    assert torch.autograd.gradcheck(run, values)


def test_dropout_stands_after_the_norm_at_the_rate_of_the_hidden_states():
    embed = module().train()
    calm = module()(IDS)
    out = embed(IDS)
    kept = out != 0
    assert 0.3 < kept.double().mean() < 0.7
    close(out[kept], 2 * calm[kept])  # 1 / (1 - 0.5)


def test_evaluation_is_free_of_chance():
    embed = module()
    assert torch.equal(embed(IDS), embed(IDS))


def test_a_new_token_is_normalised_over_its_vector():
    out = module()(IDS)
    close(out.mean(-1), torch.zeros(2, 5).double())
    close(out.var(-1, correction=0), torch.ones(2, 5).double())


def test_two_freedoms_of_the_tables_change_no_output():
    embed, ids = module(), (IDS, (IDS > 4).long())
    before = embed(*ids)
    u, v = torch.randn(2, 12).double()
    with torch.no_grad():
        embed.word_embeddings.weight += u + 3
        embed.token_type_embeddings.weight += v
        embed.position_embeddings.weight -= u + v
    close(embed(*ids), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS + 36}, r"input_ids holds 45; .* 39 .*vocab_size=40"),
        ({"input_ids": IDS - 1}, r"input_ids holds -1; expected 0 to 39"),
        (
            {"input_ids": IDS, "token_type_ids": IDS.clamp(max=2)},
            r"token_type_ids holds 2; .* 0 to 1 .*type_vocab_size=2",
        ),
        (
            {"input_ids": IDS, "token_type_ids": -(IDS > 4).long()},
            r"token_type_ids holds -1; expected 0 to 1",
        ),
        (
            {"input_ids": IDS.repeat(1, 4)},
            r"position_ids holds 19; .*max_position_embeddings=16",
        ),
        (
            {"input_ids": IDS, "token_type_ids": torch.zeros(2, 1).long()},
            r"token_type_ids has shape \(2, 1\); expected \(2, 5\)",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.arange(4)},
            r"position_ids has shape \(4,\); .*\(2, 5\).* or \(5,\)",
        ),
    ],
)
def test_wrong_ids_are_named_with_the_limit(arguments, message):
    with pytest.raises(ValueError, match=message):
        module()(**arguments)


@pytest.mark.parametrize(
    "name", ["input_ids", "token_type_ids", "position_ids"]
)
def test_ids_that_are_not_whole_numbers_are_named(name):
    arguments = {"input_ids": IDS, name: torch.zeros(2, 5)}
    with pytest.raises(TypeError, match=f"{name} has dtype torch.float32"):
        module()(**arguments)


def test_int32_ids_are_as_good():
    assert torch.equal(module()(IDS.int()), module()(IDS))
