"""The joint loss, the score, and the run that can be stopped and continued."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bertnb import (
    BertConfig,
    BertForPreTraining,
    BertnbError,
    PretrainConfig,
    PretrainingData,
    PretrainingRun,
    WordPieceTokenizer,
    book_model,
    encode_documents,
    evaluate_pretraining,
    load_folder,
    load_sotu,
    masked_lm_loss,
    next_sentence_loss,
    pick_size,
    pretrain,
    run_facts,
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twenty short documents, each about one animal."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        animal = ("cat", "dog", "owl", "fox")[number % 4]
        lines = [f"The {animal} saw {n} birds on a tree." for n in range(9)]
        (folder / f"{number:02}.txt").write_text(" ".join(lines))
    return folder


def config_for(folder, corpus, **changes):
    base = PretrainConfig(
        str(folder),
        SMALL,
        corpus=str(corpus),
        sequence_length=24,
        batch_size=4,
        total_steps=6,
        eval_every=3,
        eval_batches=1,
        mlm_probability=0.3,
        device="cpu",
        precision="float32",
    )
    return replace(base, **changes)


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


def test_a_run_that_was_killed_ends_with_the_same_weights(
    tmp_path, corpus, monkeypatch
):
    whole = pretrain(config_for(tmp_path / "whole", corpus))
    save = PretrainingRun.save

    def save_and_die(run):
        save(run)
        raise KeyboardInterrupt

    config = config_for(tmp_path / "broken", corpus)
    with monkeypatch.context() as patch:
        patch.setattr(PretrainingRun, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    torch.manual_seed(999)  # nothing may depend on where the generator stands
    again = pretrain(config)
    assert [r["step"] for r in again.records] == [3, 6]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert again.tokenizer.vocabulary == whole.tokenizer.vocabulary


def test_a_run_learns_and_writes_its_record(tmp_path, corpus):
    config = config_for(
        tmp_path, corpus, total_steps=60, eval_every=30, learning_rate=1e-2
    )
    result = pretrain(config)
    head, first, last = map(
        json.loads, (tmp_path / "log.jsonl").read_text().splitlines()
    )
    assert result.records == [first, last]
    assert last["step"] == 60
    assert last["training_loss"] < first["training_loss"] < 5.2
    assert head["config"]["total_steps"] == 60
    assert set(head) == {"config", "hardware", "versions", "commit"}
    assert head["hardware"]["threads"] == torch.get_num_threads()
    loaded = BertForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded.masked_lm.bias, result.model.masked_lm.bias.cpu())
    assert WordPieceTokenizer.from_pretrained(tmp_path).vocab_size <= 90
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_of_another_run_is_refused(tmp_path, corpus):
    pretrain(config_for(tmp_path, corpus))
    with pytest.raises(BertnbError, match="another configuration"):
        pretrain(config_for(tmp_path, corpus, seed=1))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="vocab_size=90"):
        pretrain(config_for(tmp_path, corpus, tokenizer=str(book_model())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5"),
        ({"sequence_length": 33}, "max_position_embeddings=32"),
        ({"sequence_length": 4}, "sequence_length=4"),
        ({"precision": "float16"}, "precision='float16'"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, corpus, change, message):
    with pytest.raises(ValueError, match=message):
        config_for(tmp_path, corpus, **change)


def test_the_learning_rate_rises_and_falls_and_is_never_zero(tmp_path, corpus):
    config = config_for(tmp_path, corpus, total_steps=100, learning_rate=2.0)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)  # one tenth of the ten warm-up steps
    assert rates[9] == pytest.approx(2.0) == max(rates)
    assert rates[-1] == pytest.approx(2.0 / 91) == min(rates)


def test_a_record_says_what_made_it(tmp_path, corpus):
    facts = run_facts(config_for(tmp_path, corpus))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hardware"]["cpu"]
    json.dumps(facts)


def test_a_record_holds_the_mean_loss_since_the_last_one(tmp_path, corpus):
    run = PretrainingRun(config_for(tmp_path / "steps", corpus))
    losses = [report.loss for report in run.steps()]
    records = pretrain(config_for(tmp_path / "run", corpus)).records
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [r["training_loss"] for r in records] == pytest.approx(means)


@pytest.mark.parametrize(("gib", "size"), [(15, "colab"), (79, "full")])
def test_a_large_gpu_does_the_full_work(monkeypatch, gib, size):
    class Gpu:
        total_memory = gib * 2**30

    monkeypatch.delenv("BERTNB_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    assert pick_size() == size


def test_the_size_of_the_work_follows_the_machine(monkeypatch):
    monkeypatch.delenv("BERTNB_SIZE", raising=False)
    if not torch.cuda.is_available():
        assert pick_size() == "tiny"
    monkeypatch.setenv("BERTNB_SIZE", "colab")
    assert pick_size() == "colab"
    monkeypatch.setenv("BERTNB_SIZE", "huge")
    with pytest.raises(ValueError, match="BERTNB_SIZE='huge'"):
        pick_size()


def test_the_books_model_knows_more_than_a_bigram_model():
    """The figures of chapter 12 on a part of the held-out addresses."""
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    _, held_out = split_documents(load_sotu())
    data = PretrainingData(encode_documents(held_out, tokenizer), tokenizer)
    model = BertForPreTraining.from_pretrained(book_model())
    scores = evaluate_pretraining(model, data, 25)
    assert scores.masked_lm_loss < 4.2  # bigram 5.0, unigram 6.5
    assert scores.masked_lm_accuracy > 0.28
    assert scores.next_sentence_accuracy > 0.58  # flipped labels: below 0.42


def test_documents_of_a_folder_are_split_like_the_corpus(corpus):
    learn, hold = split_documents(load_folder(corpus))
    assert (len(learn), len(hold)) == (18, 2)
