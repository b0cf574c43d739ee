"""The model of pretraining, fast: packed rows, 16 bits, compiled, by terms."""

import pytest
import torch
from torch import nn

from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LayerNorm,
    gather_positions,
)

SMALL = BertConfig(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=32,
    max_position_embeddings=16,
    initializer_range=0.2,
)


def build(kind=BertForPreTraining, config=SMALL, **head):
    torch.manual_seed(0)
    return kind(config, **head).eval()


def one_pair_a_row():
    """Four pairs of 5, 7, 8 and 4 tokens; the second hides one word less."""
    torch.manual_seed(1)
    sizes = torch.tensor([5, 7, 8, 4])
    mask = torch.arange(8) < sizes[:, None]
    ids = torch.randint(1, 60, (4, 8)) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": ((torch.arange(8) > 2) & mask).long(),
        "masked_positions": torch.tensor([[1, 4], [6, 0], [2, 7], [3, 1]]),
        "labels": torch.tensor([[9, 8], [7, -100], [6, 5], [4, 3]]),
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }


def two_pairs_a_row():
    """The same four in two rows of 12, with slots for five words, three pairs."""
    one = one_pair_a_row()
    rows = [[(0, 5), (1, 7)], [(2, 8), (3, 4)]]
    batch = {
        "input_ids": torch.zeros(2, 12).long(),
        "token_type_ids": torch.zeros(2, 12).long(),
        "position_ids": torch.zeros(2, 12).long(),
        "attention_mask": torch.zeros(2, 12, 12).bool(),
        "masked_positions": torch.zeros(2, 5).long(),
        "labels": torch.full((2, 5), -100),
        "cls_positions": torch.zeros(2, 3).long(),
        "next_sentence_label": torch.full((2, 3), -100),
    }
    for row, pairs in enumerate(rows):
        start = 0
        for slot, (pair, size) in enumerate(pairs):
            here = slice(start, start + size)
            for name in ("input_ids", "token_type_ids"):
                batch[name][row, here] = one[name][pair, :size]
            batch["position_ids"][row, here] = torch.arange(size)
            batch["attention_mask"][row, here, here] = True
            places = slice(2 * slot, 2 * slot + 2)
            shifted = one["masked_positions"][pair] + start
            batch["masked_positions"][row, places] = shifted
            batch["labels"][row, places] = one["labels"][pair]
            batch["cls_positions"][row, slot] = start
            label = one["next_sentence_label"][pair]
            batch["next_sentence_label"][row, slot] = label
            start += size
    return batch


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)
def test_packed_rows_give_the_loss_and_gradients_of_unpacked_ones(dtype, bound):
    model = build().to(dtype)
    one, two = model(**one_pair_a_row()), model(**two_pairs_a_row())
    assert one.seq_relationship_logits.shape == (4, 2)
    assert two.seq_relationship_logits.shape == (2, 3, 2)
    for name in ("labels", "next_sentence_label"):
        assert (one.losses[name] - two.losses[name]).abs() < bound
    a, b = gradients(model, one.loss), gradients(model, two.loss)
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() < bound * max(1, x.abs().max())


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_the_head_scores_the_same_words_with_and_without_the_fast_path(kind):
    model = build(kind).double()
    batch = two_pairs_a_row()
    places = batch["masked_positions"]
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    field = "logits" if kind is BertForMaskedLM else "prediction_logits"
    with torch.no_grad():
        every = getattr(model(**inputs), field)
        some = getattr(model(**inputs, masked_positions=places), field)
        slow = model(
            **inputs, masked_positions=places, output_hidden_states=True
        )
    expected = gather_positions(every, places)
    assert (some - expected).abs().max() < 1e-12
    assert (getattr(slow, field) - expected).abs().max() < 1e-12
    assert slow.hidden_states[-1].shape == (2, 12, 24)


# the terms of the loss


def labelled(kind):
    words, rows = torch.tensor([[1, -100, 0]] * 2), torch.tensor([1, 0])
    return {
        BertForMaskedLM: {"labels": words},
        BertForPreTraining: {"labels": words, "next_sentence_label": rows},
        BertForNextSentencePrediction: {"labels": rows},
        BertForSequenceClassification: {"labels": rows},
        BertForTokenClassification: {"labels": words},
        BertForQuestionAnswering: {
            "start_positions": rows,
            "end_positions": rows + 1,
        },
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        BertForMaskedLM,
        BertForPreTraining,
        BertForNextSentencePrediction,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
    ],
)
def test_the_loss_is_the_sum_of_its_terms_under_the_names_of_labels(kind):
    model, labels = build(kind), labelled(kind)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model(ids, **labels)
    assert list(out.losses) == list(labels)
    assert torch.equal(torch.stack([*out.losses.values()]).sum(), out.loss)
    for loss in out.losses.values():
        assert loss > 0
        assert loss.requires_grad
    assert model(ids).loss is None
    assert model(ids).losses is None


def test_only_the_terms_whose_labels_are_given_are_there():
    model, labels = build(), labelled(BertForPreTraining)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    both = model(ids, **labels).losses
    for name, label in labels.items():
        out = model(ids, **{name: label})
        assert list(out.losses) == [name]
        assert torch.equal(out.losses[name], both[name])


# 16 bits


def stream(model, batch, dtype):
    with torch.autocast("cpu", dtype), torch.no_grad():
        return model(**batch, output_hidden_states=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_states_between_the_layers_have_16_bits(dtype):
    model, batch = build(), two_pairs_a_row()
    with torch.no_grad():
        exact = model(**batch)
    out = stream(model, batch, dtype)
    assert len(out.hidden_states) == 4
    assert {x.dtype for x in out.hidden_states} == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert out.loss.dtype == torch.float32
    assert (out.loss - exact.loss).abs() < 1e-2 * exact.loss
    assert out.loss != exact.loss


def test_every_norm_is_ours():
    """On a GPU torch's would return float32; on a CPU nothing tells."""
    norms = [m for m in build().modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 + 2 * SMALL.num_hidden_layers
    assert {type(norm) for norm in norms} == {LayerNorm}


def test_gradients_of_the_16_bit_stream_are_float32_and_near():
    model, batch = build(), two_pairs_a_row()
    exact = gradients(model, model(**batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    for one, two in zip(exact, gradients(model, loss), strict=True):
        assert two.dtype == torch.float32
        assert (one - two).norm() <= 0.1 * one.norm() + 1e-3


# compiled


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)


@pytest.mark.parametrize("pack", [one_pair_a_row, two_pairs_a_row])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_forward_compiles_into_one_graph(pack, dtype):
    model, batch = build(), pack()
    with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
        expected, out = model(**batch), compiled(model)(**batch)
    assert torch.equal(out.loss, expected.loss)
    assert list(out.losses) == ["labels", "next_sentence_label"]
    a, b = gradients(model, expected.loss), gradients(model, out.loss)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_a_second_batch_of_the_same_shape_compiles_nothing():
    model, batch = build(), two_pairs_a_row()
    counter = torch._dynamo.testing.CompileCounter()
    run = compiled(model.train(), counter)
    for _ in range(3):
        batch["input_ids"] = batch["input_ids"].roll(1, 0)
        batch["masked_positions"] = batch["masked_positions"].roll(1, 0)
        run(**batch).loss.backward()
    assert counter.frame_count == 1
