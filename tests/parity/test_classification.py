"""The classifier against `transformers` and against the formula."""

import json
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertnb import (
    BertClassifier,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    SequenceClassification,
    SequenceRegression,
    TextExample,
    WordPieceTokenizer,
    classification_loss,
    predict,
)

TINY = BertConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=20,
    initializer_range=0.1,
)


def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (4, 15))
    lengths = torch.tensor([[15], [9], [3], [1]])
    mask = (torch.arange(15) < lengths).long()
    segments = (torch.arange(15) > 5).long().expand(4, 15).contiguous()
    return ids, mask, segments


@pytest.mark.equation("17.1", "17.2")
@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_equal_to_transformers_in_both_directions(
    tmp_path, num_labels, measured
):
    torch.manual_seed(num_labels)
    ours = BertForSequenceClassification(TINY, num_labels=num_labels).eval()
    ours.save_pretrained(tmp_path / "ours")
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    back = BertForSequenceClassification.from_pretrained(tmp_path / "theirs")
    assert back.num_labels == num_labels
    ids, mask, segments = batch()
    labels = torch.randint(num_labels, (4,))
    if num_labels == 1:
        labels = torch.randn(4)
    theirs = peer.eval()(ids, mask, segments, labels=labels)
    for model in (ours, back):
        mine = model(ids, mask, segments, labels=labels)
        assert mine.logits.shape == theirs.logits.shape
        measured(mine.logits - theirs.logits, 1e-5)
        measured(mine.loss - theirs.loss, 1e-5)
    mine = ours(ids, mask, segments, labels=labels)
    mine.loss.backward()
    theirs.loss.backward()
    pairs = [
        (ours.classifier.weight, peer.classifier.weight),
        (ours.bert.pooler.dense.weight, peer.bert.pooler.dense.weight),
    ]
    for a, b in pairs:
        measured(a.grad - b.grad, 1e-5)


def test_states_and_weights_are_whole_where_they_are_asked_for(tmp_path):
    model = BertForSequenceClassification(TINY, num_labels=3).eval()
    model.save_pretrained(tmp_path)
    peer = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    ids, mask, segments = batch()
    asked = {"output_hidden_states": True, "output_attentions": True}
    theirs = peer(ids, mask, segments, **asked)
    for shown in (asked, *({name: True} for name in asked)):
        mine = model(ids, mask, segments, **shown)
        for name in shown:
            name = name.removeprefix("output_")
            pairs = zip(getattr(mine, name), getattr(theirs, name), strict=True)
            for a, b in pairs:
                kept = mask.bool()  # what padding computes is nobody's
                a, b = (t.transpose(1, -2)[kept] for t in (a, b))
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.equation("17.1")
def test_the_scores_are_the_formula_in_numpy(measured):
    torch.manual_seed(0)
    model = BertForSequenceClassification(TINY, num_labels=3).double().eval()
    torch.nn.init.normal_(model.classifier.bias)
    ids, mask, segments = batch()
    with torch.no_grad():
        pooled = model.bert(ids, mask, segments).pooler_output.numpy()
        scores = model(ids, mask, segments).logits.numpy()
    weight, bias = (p.detach().numpy() for p in model.classifier.parameters())
    for row in range(4):
        for label in range(3):
            expected = sum(pooled[row] * weight[label]) + bias[label]
            measured(scores[row, label] - expected, 1e-12)


@pytest.mark.equation("17.2")
def test_the_loss_is_the_formula(measured):
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(6, 4)), rng.integers(4, size=6)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = -log_p[np.arange(6), y].mean()
    loss = classification_loss(torch.tensor(scores), torch.tensor(y))
    measured(loss.item() - expected, 1e-6)
    column, target = rng.normal(size=(6, 1)), rng.normal(size=6)
    squared = ((column[:, 0] - target) ** 2).mean()
    loss = classification_loss(torch.tensor(column), torch.tensor(target))
    measured(loss.item() - squared, 1e-6)


def test_labels_keep_their_names(tmp_path):
    model = BertForSequenceClassification(TINY, labels=["sad", "glad", "mad"])
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.label_names == ["sad", "glad", "mad"]
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert peer.config.id2label == {0: "sad", 1: "glad", 2: "mad"}


def test_what_a_config_says_of_the_classes_is_read(tmp_path):
    BertForSequenceClassification(TINY, num_labels=3).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["id2label"], saved["label2id"]
    file.write_text(json.dumps(saved | {"num_labels": 3}))  # as in old files
    assert (
        BertForSequenceClassification.from_pretrained(tmp_path).num_labels == 3
    )
    kind = {"problem_type": "multi_label_classification"}
    file.write_text(json.dumps(saved | kind))
    with pytest.raises(ValueError, match="multi_label_classification"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_the_encoder_of_a_pretrained_model_is_taken_and_the_head_is_new(
    tmp_path,
):
    pretrained = BertForPreTraining(TINY)
    pretrained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier"):
        model = BertForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3
        )
    ours, theirs = model.bert.state_dict(), pretrained.bert.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.classifier.weight.abs().max() <= 2 * TINY.initializer_range
    assert torch.equal(model.classifier.bias, torch.zeros(3))


def test_a_fine_tuned_model_loads_without_a_warning(tmp_path):
    BertForSequenceClassification(TINY, num_labels=3).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_dropout_acts_on_the_pooled_vector_in_training_only():
    from dataclasses import replace

    config = replace(
        TINY, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0
    )
    model = BertForSequenceClassification(config)
    ids, mask, segments = batch()
    model.eval()
    first, second = model(ids, mask, segments), model(ids, mask, segments)
    assert torch.equal(first.logits, second.logits)
    model.train()
    model.bert.eval()  # only the head's own dropout is left
    first, second = model(ids, mask, segments), model(ids, mask, segments)
    assert not torch.equal(first.logits, second.logits)


def test_bad_labels_are_named():
    model = BertForSequenceClassification(TINY, num_labels=3)
    ids, mask, segments = batch()
    with pytest.raises(ValueError, match=r"labels.*3.*0 to 2"):
        model(ids, mask, segments, labels=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"num_labels=2.*labels names 3"):
        BertForSequenceClassification(TINY, 2, labels=["a", "b", "c"])


def test_a_classifier_without_its_own_loss_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        BertClassifier(TINY)


PAIRS = [
    TextExample("good film", text_pair="a b"),
    TextExample("", text_pair="bad"),
    TextExample("a bad, bad film", text_pair="fine a b " * 9),
]


def folder_with_a_tokenizer(folder, **head):
    torch.manual_seed(4)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad fine film a b ,".split()
    model = BertForSequenceClassification(TINY, **head)
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(folder)
    numbers = {word: i for i, word in enumerate(words)}
    WordPieceTokenizer(numbers).save_pretrained(folder)
    return folder


def their_logits(folder, max_length):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    peer = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(
        [e.text for e in PAIRS],
        [e.text_pair for e in PAIRS],
        truncation=True,
        max_length=max_length,
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return peer, peer(**batch).logits


def our_answers(task, folder, max_length):
    model = BertForSequenceClassification.from_pretrained(folder)
    tokenizer = WordPieceTokenizer.from_pretrained(folder)
    return predict(task, model, tokenizer, PAIRS, max_length)


@pytest.mark.filterwarnings("ignore:1 of 3 rows are longer")
@pytest.mark.parametrize("max_length", [9, 20])
def test_answers_are_those_of_transformers_in_both_directions(
    tmp_path, max_length, measured
):
    """From texts on: tokens, cut pairs, padding, probabilities and names."""
    ours = folder_with_a_tokenizer(tmp_path / "ours", labels=["x", "y", "z"])
    peer, logits = their_logits(ours, max_length)
    peer.save_pretrained(tmp_path / "back")
    WordPieceTokenizer.from_pretrained(ours).save_pretrained(tmp_path / "back")
    expected = logits.softmax(-1)
    for folder in (ours, tmp_path / "back"):
        model = BertForSequenceClassification.from_pretrained(folder)
        task = SequenceClassification(labels=model.label_names)
        answers = our_answers(task, folder, max_length)
        found = torch.tensor([list(a["scores"].values()) for a in answers])
        measured(found - expected, 1e-5)
        names = [peer.config.id2label[int(i)] for i in logits.argmax(-1)]
        assert [a["label"] for a in answers] == names


@pytest.mark.filterwarnings("ignore:1 of 3 rows are longer")
def test_numbers_are_those_of_transformers_in_both_directions(
    tmp_path, measured
):
    ours = folder_with_a_tokenizer(tmp_path / "ours", num_labels=1)
    peer, logits = their_logits(ours, 12)
    target = torch.tensor([0.5, -1.0, 2.0])
    peer(torch.ones(3, 4, dtype=torch.long), labels=target)  # sets its kind
    assert peer.config.problem_type == "regression"
    peer.save_pretrained(tmp_path / "back")
    WordPieceTokenizer.from_pretrained(ours).save_pretrained(tmp_path / "back")
    kind = json.loads((tmp_path / "back" / "config.json").read_text())
    assert kind["problem_type"] == "regression"
    for folder in (ours, tmp_path / "back"):
        answers = our_answers(SequenceRegression(), folder, 12)
        measured(torch.tensor(answers) - logits[:, 0], 1e-5)
