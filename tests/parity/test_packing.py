"""Packed rows against rows of one pair: ours, and those of `transformers`."""

import random

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from bertnb import BertConfig, BertForPreTraining
from bertnb.rows import PretrainingData
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

TOKENIZER = WordPieceTokenizer(
    {t: i for i, t in enumerate([*SPECIAL_TOKENS, *map(str, range(295))])}
)
SMALL = BertConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)


def packed_batch():
    dice = random.Random(0)
    documents = [
        [
            [dice.randrange(5, 300) for _ in range(dice.randint(1, 9))]
            for _ in range(dice.randint(2, 12))
        ]
        for _ in range(120)
    ]
    data = PretrainingData(
        documents, TOKENIZER, 48, 8, 0.3, short_seq_prob=1.0, pack=6
    )
    return data.batch(1)


def unpacked(batch):
    """Cut a packed batch into rows of one pair, with the same words hidden."""
    rows = {name: [] for name in ONE_PAIR}
    real = batch["next_sentence_label"] != -100
    for b, d in real.nonzero().tolist():
        start = int(batch["cls_positions"][b, d])
        n = int(batch["attention_mask"][b, start].sum())
        places = batch["masked_positions"][b]
        mine = (batch["labels"][b] != -100) & (places >= start)
        mine &= places < start + n
        rows["input_ids"].append(batch["input_ids"][b, start : start + n])
        segments = batch["token_type_ids"][b, start : start + n]
        rows["token_type_ids"].append(segments)
        rows["attention_mask"].append(torch.ones(n).long())
        rows["masked_positions"].append(places[mine] - start)
        rows["labels"].append(batch["labels"][b][mine])
        rows["next_sentence_label"].append(batch["next_sentence_label"][b, d])
    return {
        name: torch.stack(values)
        if name == "next_sentence_label"
        else pad_sequence(values, True, -100 if name == "labels" else 0)
        for name, values in rows.items()
    }


ONE_PAIR = (
    "input_ids token_type_ids attention_mask masked_positions labels "
    "next_sentence_label"
).split()


def results(model, batch):
    """Return loss, scores of the hidden words, and all gradients."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    words = output.prediction_logits[batch["labels"] != -100]
    real = batch["next_sentence_label"] != -100
    return output.loss, words, output.seq_relationship_logits[real], gradients


@pytest.mark.equation("10.4")
@pytest.mark.parametrize(
    ("kind", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)
def test_packed_and_padded_rows_have_one_loss_and_one_gradient(
    kind, bound, measured
):
    torch.manual_seed(0)
    model = BertForPreTraining(SMALL).to(kind).train()
    batch = packed_batch()
    apart = unpacked(batch)
    assert len(apart["input_ids"]) > 1.5 * len(batch["input_ids"])
    for packed, padded in zip(
        results(model, batch), results(model, apart), strict=True
    ):
        if isinstance(packed, dict):
            worst = max((packed[n] - padded[n]).abs().max() for n in padded)
            measured(worst, bound)
            assert all(
                padded[n].abs().max() > 0 for n in padded if "key.b" not in n
            )
        else:
            measured((packed - padded).abs().max(), bound)


def test_packed_rows_equal_padded_rows_of_hugging_face(tmp_path):
    torch.manual_seed(0)
    ours = BertForPreTraining(SMALL)
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).train()
    batch = packed_batch()
    apart = unpacked(batch)
    loss = ours.train()(**batch).loss
    loss.backward()
    places, words = apart.pop("masked_positions"), apart.pop("labels")
    labels = torch.full_like(apart["input_ids"], -100)
    for row, place, word in zip(labels, places, words, strict=True):
        row[place[word != -100]] = word[word != -100]
    expected = theirs(**apart, labels=labels).loss
    expected.backward()
    assert abs(loss - expected) < 1e-5
    for parameter, name in (
        (ours.bert.embeddings.position_embeddings, "position"),
        (ours.bert.embeddings.word_embeddings, "word"),
    ):
        other = getattr(theirs.bert.embeddings, f"{name}_embeddings")
        ours_grad, other_grad = parameter.weight.grad, other.weight.grad
        assert (ours_grad - other_grad).abs().max() < 1e-5


@pytest.mark.parametrize(
    "harm", ["attention_mask", "position_ids", "cls_positions"]
)
def test_each_of_the_three_is_needed(harm):
    """Without it the loss is another, so the equality above proves it."""
    torch.manual_seed(0)
    model = BertForPreTraining(SMALL).double()
    batch = packed_batch()
    right = model(**batch).loss
    if harm == "attention_mask":
        batch[harm] = batch["attention_mask"].any(1)
    elif harm == "position_ids":
        batch[harm] = torch.arange(48).expand(8, 48)
    else:
        batch[harm] = torch.zeros_like(batch[harm])
    assert abs(model(**batch).loss - right) > 1e-3
