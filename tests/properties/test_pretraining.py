"""The joint loss, and the score."""

import math
from dataclasses import replace

import pytest
import torch

from bertnb import (
    BertConfig,
    BertForPreTraining,
    PretrainingData,
    WordPieceTokenizer,
    book_model,
    encode_documents,
    evaluate_pretraining,
    load_sotu,
    masked_lm_loss,
    next_sentence_loss,
    split_documents,
)

SMALL = BertConfig(
    vocab_size=90,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)


def labelled_batch():
    torch.manual_seed(0)
    ids = torch.randint(5, 90, (3, 12))
    positions = torch.tensor([[1, 4], [2, 3], [5, 9]])
    targets = torch.tensor([[7, 8], [9, -100], [10, 11]])
    return ids, positions, targets, torch.tensor([0, 1, 1])


@pytest.mark.equation("12.1")
def test_the_loss_is_the_equation_one_row_after_the_other(measured):
    torch.manual_seed(0)
    model = BertForPreTraining(replace(SMALL, initializer_range=0.5)).double()
    ids, positions, targets, order = labelled_batch()
    out = model.eval()(
        ids,
        labels=targets,
        next_sentence_label=order,
        masked_positions=positions,
    )

    def surprise(scores, label):
        exponentials = [math.exp(score) for score in scores]
        return -math.log(exponentials[label] / sum(exponentials))

    words = [
        surprise(out.prediction_logits[row, place].tolist(), word)
        for row, labels in enumerate(targets.tolist())
        for place, word in enumerate(labels)
        if word != -100
    ]
    pairs = [
        surprise(out.seq_relationship_logits[row].tolist(), label)
        for row, label in enumerate(order.tolist())
    ]
    assert (len(words), len(pairs)) == (5, 3)
    expected = sum(words) / 5 + sum(pairs) / 3
    measured(out.loss.item() - expected, 1e-5)  # the loss is float32


@pytest.mark.equation("12.1")
def test_the_loss_is_the_sum_of_the_two_means(measured):
    model = BertForPreTraining(SMALL).eval()
    ids, positions, targets, order = labelled_batch()
    out = model(
        ids,
        labels=targets,
        next_sentence_label=order,
        masked_positions=positions,
    )
    words = masked_lm_loss(out.prediction_logits, targets)
    pairs = next_sentence_loss(out.seq_relationship_logits, order)
    measured(out.loss - (words + pairs), 1e-6)
    only_words = model(ids, labels=targets, masked_positions=positions)
    only_pairs = model(ids, next_sentence_label=order)
    measured(only_words.loss - words, 1e-6)
    measured(only_pairs.loss - pairs, 1e-6)
    assert model(ids).loss is None


def test_decoding_the_hidden_positions_equals_decoding_all():
    model = BertForPreTraining(SMALL).eval()
    ids, positions, targets, _ = labelled_batch()
    some = model(ids, masked_positions=positions).prediction_logits
    every = model(ids).prediction_logits
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(some, every[rows, positions])
    everywhere = torch.full_like(ids, -100)
    everywhere[rows, positions] = targets
    fast = model(ids, labels=targets, masked_positions=positions).loss
    torch.testing.assert_close(fast, model(ids, labels=everywhere).loss)


def test_an_untrained_model_is_as_unsure_as_it_can_be():
    torch.manual_seed(0)
    model = BertForPreTraining(SMALL).eval()
    ids, positions, targets, order = labelled_batch()
    words = model(ids, labels=targets, masked_positions=positions).loss.item()
    pairs = model(ids, next_sentence_label=order).loss.item()
    assert words == pytest.approx(math.log(90), abs=0.1)
    assert pairs == pytest.approx(math.log(2), abs=0.1)


class Fixed:
    """Two batches with 1 and 3 hidden words, to tell kinds of means apart."""

    batches_per_epoch = 2

    def batch(self, step):
        torch.manual_seed(step)
        few = torch.tensor([[6, -100], [-100, -100]])
        targets = few if step == 0 else torch.tensor([[6, 7], [8, -100]])
        return {
            "input_ids": torch.randint(5, 90, (2, 10)),
            "token_type_ids": torch.zeros(2, 10, dtype=torch.long),
            "attention_mask": torch.ones(2, 10, dtype=torch.long),
            "masked_positions": torch.tensor([[1, 2], [3, 4]]),
            "labels": targets,
            "next_sentence_label": torch.tensor([0, 1]),
        }


def test_the_score_is_a_mean_over_words_not_over_batches():
    torch.manual_seed(0)
    model = BertForPreTraining(replace(SMALL, initializer_range=0.5)).train()
    scores = evaluate_pretraining(model, Fixed())
    assert model.training  # left as it was
    assert (scores.masked_tokens, scores.pairs) == (4, 4)
    model.eval()
    total = right_words = right_pairs = 0.0
    for step in range(2):
        batch = Fixed().batch(step)
        order = batch.pop("next_sentence_label")
        labels = batch.pop("labels")
        out = model(**batch)
        for scored, label in zip(
            out.prediction_logits.flatten(0, 1), labels.flatten(), strict=True
        ):
            if label != -100:
                total -= scored.log_softmax(-1)[label].item()
                right_words += (scored.argmax() == label).item()
        right = out.seq_relationship_logits.argmax(-1) == order
        right_pairs += right.sum().item()
    assert scores.masked_lm_loss == pytest.approx(total / 4, rel=1e-5)
    assert scores.masked_lm_accuracy == right_words / 4
    assert scores.next_sentence_accuracy == right_pairs / 4
    assert evaluate_pretraining(model, Fixed(), 1).masked_tokens == 1


class Packed(Fixed):
    """Rows of two pairs, of which the second is missing once."""

    def batch(self, step):
        batch = super().batch(step)
        del batch["attention_mask"]
        return batch | {
            "cls_positions": torch.tensor([[0, 5], [0, 4]]),
            "next_sentence_label": torch.tensor([[0, 1], [1, -100]]),
        }


def test_a_pair_that_is_missing_in_a_packed_row_is_not_scored():
    torch.manual_seed(0)
    model = BertForPreTraining(replace(SMALL, initializer_range=0.5)).eval()
    scores = evaluate_pretraining(model, Packed())
    assert scores.pairs == 6
    right = 0
    for step in range(2):
        batch = Packed().batch(step)
        order = batch.pop("next_sentence_label")
        del batch["labels"]
        chosen = model(**batch).seq_relationship_logits.argmax(-1)
        right += sum((chosen == order).flatten().tolist())
    assert scores.next_sentence_accuracy == pytest.approx(right / 6)


def test_the_books_model_knows_more_than_a_bigram_model():
    """The figures of chapter 12 on a part of the held-out addresses."""
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    _, held_out = split_documents(load_sotu())
    data = PretrainingData(encode_documents(held_out, tokenizer), tokenizer)
    model = BertForPreTraining.from_pretrained(book_model())
    scores = evaluate_pretraining(model, data, 25)
    assert scores.masked_lm_loss < 2.8  # bigram 4.6, unigram 6.0
    assert scores.masked_lm_accuracy > 0.45
    assert scores.next_sentence_accuracy > 0.74  # flipped labels: below 0.26
