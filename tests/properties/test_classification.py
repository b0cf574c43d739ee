"""Class weights, and the task: from texts to rows, from scores to names."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config_for, tokenizer_of

from bertnb import (
    BertForSequenceClassification,
    BertForTokenClassification,
    FineTuneConfig,
    SequenceClassification,
    TextExample,
    accumulate_gradients,
    class_weights,
    classification_loss,
    evaluate,
    fine_tune,
    predict,
)

NAMES = ["a", "b", "c"]
TOKENIZER = tokenizer_of("good bad fine film a b ##c")
TINY = config_for(
    TOKENIZER,
    vocab_size=40,
    hidden_size=12,
    max_position_embeddings=12,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.mark.equation("17.3")
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_weighted_loss_is_the_formula(measured, seed):
    rng = np.random.default_rng(seed)
    scores, y = rng.normal(size=(7, 3)), rng.integers(3, size=7)
    weights = rng.uniform(0, 4, size=3)
    counts = rng.random(7) < 0.7
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    terms = [weights[y[b]] * -log_p[b, y[b]] for b in range(7) if counts[b]]
    expected = sum(terms) / max(1, len(terms))
    labels = torch.tensor(np.where(counts, y, -100))
    loss = classification_loss(
        torch.tensor(scores), labels, torch.tensor(weights)
    )
    measured(loss.item() - expected, 1e-12)


@pytest.mark.equation("17.4", "17.5")
@given(
    labels=st.lists(st.integers(0, 2), max_size=40),
    wanted=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_weights_have_mean_one_over_the_examples(measured, labels, wanted):
    labels = [*labels, 0, 1, 2]
    counts = np.bincount(labels)
    given_ = class_weights(labels, NAMES, dict(zip(NAMES, wanted, strict=True)))
    balanced = class_weights(labels, NAMES)
    for weights in (given_, balanced):
        measured(weights[labels].double().mean() - 1, 1e-5)
    ratio = given_ / given_[0] - torch.tensor(wanted) / wanted[0]
    measured(ratio / (1 + torch.tensor(wanted) / wanted[0]), 1e-5)
    measured(balanced - len(labels) / (3 * counts), 1e-5)


def test_balanced_is_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0, 0, 0, 1, 2, 2]
    theirs = compute_class_weight(
        "balanced", classes=np.arange(3), y=np.array(labels)
    )
    assert np.allclose(class_weights(labels, NAMES), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0, 0, 1], "balanced", "'c' has no training example"),
        ([], "balanced", "no training example"),
        ([0, 1, 2], "equal", "class_weights='equal'"),
        ([0, 1, 2], {"a": 1.0, "b": 1.0}, "one weight for each of a, b, c"),
        ([0, 1, 2], {"a": 1.0, "b": 1.0, "d": 1.0}, "one weight for each"),
        ([0, 1, 2], {"a": 1.0, "b": -1.0, "c": 1.0}, ">= 0"),
        ([0, 1, 2], {"a": 1.0, "b": math.nan, "c": 1.0}, "finite"),
        ([0, 1, 2], {"a": 1.0, "b": math.inf, "c": 1.0}, "finite"),
        ([0, 0, 1], {"a": 0.0, "b": 0.0, "c": 1.0}, "one above 0"),
    ],
)
def test_bad_weights_are_named(labels, weights, message):
    with pytest.raises(ValueError, match=message):
        class_weights(labels, NAMES, weights)


def problem(cls):
    """Six rows: of one row the class is rare, two rows do not count."""
    torch.manual_seed(0)
    model = cls(TINY, labels=NAMES)
    ids = torch.randint(5, 40, (6, 8))
    y = torch.randint(3, (6, 8) if cls is BertForTokenClassification else (6,))
    y[[1, 5]] = -100
    model.class_weights = torch.tensor([0.3, 1.0, 5.0])
    return model, {"input_ids": ids, "labels": y}


@pytest.mark.equation("17.3")
@pytest.mark.parametrize(
    "cls", [BertForSequenceClassification, BertForTokenClassification]
)
def test_in_parts_the_weighted_gradient_is_that_of_the_batch(cls, measured):
    model, batch = problem(cls)
    whole = accumulate_gradients(model, batch)
    gradients = [p.grad.clone() for p in model.parameters()]
    log_p = model(batch["input_ids"]).logits.log_softmax(-1)
    y = batch["labels"]
    row = -log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    terms = (row * model.class_weights[y.clamp(min=0)])[y >= 0]
    measured(whole - terms.mean(), 1e-6)
    model.zero_grad()
    measured(accumulate_gradients(model, batch, parts=3) - whole, 1e-6)
    for p, expected in zip(model.parameters(), gradients, strict=True):
        measured(p.grad - expected, 1e-6)


def test_weights_of_torch_depend_on_the_neighbours():
    """Why (17.3) divides by the rows: the difference is real."""
    scores, weights = torch.randn(4, 3), torch.tensor([0.3, 1.0, 5.0])
    y = torch.tensor([2, 2, 2, 2])
    theirs = torch.nn.functional.cross_entropy(scores, y, weights)
    plain = classification_loss(scores, y)
    assert torch.isclose(theirs, plain)
    assert torch.isclose(classification_loss(scores, y, weights), 5 * plain)


def test_weights_are_not_saved_and_follow_the_model(tmp_path):
    model, batch = problem(BertForSequenceClassification)
    plain = BertForSequenceClassification(TINY, labels=NAMES)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.class_weights is None
    assert model.double().class_weights.dtype == torch.float64
    assert model(**batch).loss.isfinite()


# from texts to rows, and from scores to names
LABELS = ("bad", "good")


def examples(*texts, label="good"):
    return [TextExample(text, label) for text in texts]


def classifier(labels=LABELS, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(TINY, labels=list(labels))


def test_names_come_from_the_training_examples_in_order():
    training = [TextExample("film", name) for name in ("x", "b", "x", "c")]
    task = SequenceClassification(training)
    assert task.labels == ("b", "c", "x")
    assert task.head_arguments() == {"labels": ["b", "c", "x"]}
    rows = task.rows(training, TOKENIZER, 12)
    assert [row.targets["labels"] for row in rows] == [2, 0, 2, 1]
    assert [row.example for row in rows] == [0, 1, 2, 3]


def test_rows_are_the_tokenizers():
    pair = TextExample("good film", "bad", "bad bad bad")
    (row,) = SequenceClassification(labels=LABELS).rows([pair], TOKENIZER, 12)
    whole = TOKENIZER(["good film"], ["bad bad bad"])
    assert row.input_ids == whole["input_ids"][0].tolist()
    assert row.token_type_ids == whole["token_type_ids"][0].tolist()
    with pytest.warns(UserWarning, match="1 of 1 rows are longer than max_len"):
        (cut,) = SequenceClassification(labels=LABELS).rows(
            [pair], TOKENIZER, 6
        )
    short = TOKENIZER(["good film"], ["bad bad bad"], max_length=6)
    assert cut.input_ids == short["input_ids"][0].tolist()
    assert cut.targets == {"labels": 0}


def test_only_long_rows_are_cut_and_each_keeps_its_place():
    texts = examples("good", "a " * 100_000, "bad")
    task = SequenceClassification(labels=LABELS)
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        rows = task.rows(texts, TOKENIZER, 5)
    assert [len(row.input_ids) for row in rows] == [3, 5, 3]
    assert [row.example for row in rows] == [0, 1, 2]
    assert rows[2].input_ids[1] == TOKENIZER.vocabulary["bad"]


@given(
    texts=st.lists(
        st.one_of(
            st.sampled_from(["", " ", "\x00\x07", "\u200b", "good " * 9]),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=25, deadline=None)
@pytest.mark.filterwarnings("ignore:.*longer than max_length")
def test_every_text_gets_one_sound_answer(texts):
    task = SequenceClassification(labels=LABELS)
    plain = [TextExample(text) for text in texts]
    answers = predict(task, classifier(), TOKENIZER, plain, max_length=12)
    assert len(answers) == len(texts)
    for answer in answers:
        assert list(answer["scores"]) == list(LABELS)
        assert math.isclose(sum(answer["scores"].values()), 1, abs_tol=1e-6)
        assert answer["score"] == max(answer["scores"].values())
        assert answer["scores"][answer["label"]] == answer["score"]


def test_no_text_leaves_the_frame():
    task = SequenceClassification(labels=LABELS)
    plain = [TextExample(text) for text in ("", "   ", "\x00\x01", "\u200b")]
    for row in task.rows(plain, TOKENIZER, 12):
        assert row.input_ids == [2, 3]  # [CLS] [SEP]
        assert row.targets == {}
    assert predict(task, classifier(), TOKENIZER, [], 12) == []


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="text has half a character"):
        TextExample("a\ud800", "bad")


@pytest.mark.parametrize(
    ("label", "pair", "message"),
    [
        ("nice", None, "example 1 has the label 'nice'; .* bad, good"),
        (1.0, None, "example 1 has the label 1.0; .* bad, good"),
        ("good", "b", "example 0 has no text_pair, example 1 has one"),
    ],
)
def test_bad_examples_are_named(label, pair, message):
    some = [TextExample("a", "good"), TextExample("b", label, pair)]
    task = SequenceClassification(labels=LABELS)
    with pytest.raises(ValueError, match=message):
        task.rows(some, TOKENIZER, 12)
    paired = [TextExample("a", "good", "b"), TextExample("b", "bad")]
    with pytest.raises(ValueError, match=r"example 1 has none"):
        task.rows(paired, TOKENIZER, 12)


def test_bad_tasks_are_named():
    with pytest.raises(ValueError, match="two classes or more"):
        SequenceClassification(examples("a", "b"))
    with pytest.raises(ValueError, match="two classes or more"):
        SequenceClassification()
    with pytest.raises(ValueError, match="each once"):
        SequenceClassification(labels=["a", "b", "a"])
    with pytest.raises(ValueError, match=r"metric='f1'.*macro_f1"):
        SequenceClassification(labels=LABELS, metric="f1")
    with pytest.raises(TypeError, match=r"example 1 .* 2.5.*Regression"):
        SequenceClassification([TextExample("a", "x"), TextExample("b", 2.5)])


def test_a_score_needs_every_label():
    task = SequenceClassification(labels=LABELS)
    some = [TextExample("a", "good"), TextExample("b")]
    with pytest.raises(ValueError, match="example 1 has no label"):
        evaluate(task, classifier(), TOKENIZER, some, max_length=12)
    with pytest.raises(ValueError, match="training example 1 has no label"):
        fine_tune(
            SequenceClassification(some, labels=LABELS),
            classifier(),
            TOKENIZER,
            FineTuneConfig(max_length=12, device="cpu"),
            progress=False,
        )


def test_scores_that_are_not_finite_are_no_answer():
    model = classifier()
    torch.nn.init.constant_(model.classifier.bias, math.nan)
    task = SequenceClassification(labels=LABELS)
    with pytest.raises(ValueError, match="example 0: the model gives"):
        predict(task, model, TOKENIZER, examples("a"), max_length=12)


def test_a_class_called_none_is_not_an_unknown_one():
    task = SequenceClassification(labels=["None", "b"])
    (row,) = task.rows([TextExample("a")], TOKENIZER, 12)
    assert row.targets == {}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_the_last_batch_is_not_filled_up(batch_size):
    """Nobody is counted who was not asked, and nobody is left out."""
    texts = ["good film", "bad", "a", "fine a b", "bad film a a"]
    task, model = SequenceClassification(labels=LABELS), classifier()
    some = []
    for text, right in zip(texts, (1, 0, 1, 0, 0), strict=True):
        (a,) = predict(task, model, TOKENIZER, [TextExample(text)], 12)
        other = LABELS[1 - LABELS.index(a["label"])]
        some.append(TextExample(text, a["label"] if right else other))
    scores = evaluate(task, model, TOKENIZER, some, 12, batch_size)
    assert scores == {"accuracy": 2 / 5}


def counted(truth, answers):
    """Return (17.6) and (17.7), in NumPy."""
    names = sorted({*truth, *answers})
    y = np.array([[t == n for n in names] for t in truth], float)
    a = np.array([[t == n for n in names] for t in answers], float)
    both, size = (y * a).sum(0), y.sum(0) + a.sum(0)

    def cov(u, v):
        return ((u - u.mean(0)) * (v - v.mean(0))).sum(1).mean()

    spread = math.sqrt(cov(y, y) * cov(a, a))
    return (2 * both / size).mean(), cov(y, a) / spread if spread else 0.0


@pytest.mark.equation("17.6", "17.7")
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1
    )
)
@settings(max_examples=25, deadline=None)
@pytest.mark.filterwarnings("ignore")  # scikit-learn on a single class
def test_the_metrics_are_the_formulas(measured, pairs):
    truth, answers = zip(*pairs, strict=True)
    some = [TextExample("a", label) for label in truth]
    found = [{"label": label} for label in answers]
    expected = dict(
        zip(("macro_f1", "matthews"), counted(truth, answers), strict=True)
    )
    for metric, value in expected.items():
        scores = SequenceClassification(labels=NAMES, metric=metric).score(
            some, found
        )
        measured(scores[metric] - value, 1e-9)
        right = sum(t == a for t, a in pairs) / len(pairs)
        assert scores["accuracy"] == right


def test_without_scikit_learn_the_accuracy_is_still_there(monkeypatch):
    import sys

    from bertnb import BertnbError

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    some, found = examples("a", "b"), [{"label": "good"}, {"label": "bad"}]
    score = SequenceClassification(labels=LABELS).score(some, found)
    assert score == {"accuracy": 0.5}
    with pytest.raises(BertnbError, match=r"bertnb\[train\]"):
        SequenceClassification(labels=LABELS, metric="matthews").score(
            some, found
        )
    with pytest.raises(BertnbError, match=r"bertnb\[train\]"):
        SequenceClassification(some, some, metric="macro_f1")


def test_class_weights_reach_the_model_and_leave_it():
    training = examples("good", "a", "b") + examples("bad", label="bad")
    model = classifier()
    tokens = (model, TOKENIZER, examples("a"), 12)
    predict(SequenceClassification(training, class_weights="balanced"), *tokens)
    assert torch.allclose(model.class_weights, torch.tensor([2.0, 2 / 3]))
    predict(SequenceClassification(training), *tokens)
    assert model.class_weights is None
    task = SequenceClassification(training, class_weights={"bad": 1.0})
    with pytest.raises(ValueError, match="one weight for each of bad, good"):
        predict(task, *tokens)


def test_a_model_with_other_classes_is_refused():
    task = SequenceClassification(labels=LABELS)
    with pytest.raises(ValueError, match=r"\['good', 'bad'\]"):
        predict(task, classifier(LABELS[::-1]), TOKENIZER, examples("a"), 12)


def test_a_tiny_model_learns_which_word_is_good():
    words = ["good", "bad"]
    texts = [f"{x} {w} {y}" for w in words for x in "ab" for y in ("film", "a")]
    training = [TextExample(t, "good" if "good" in t else "bad") for t in texts]
    task = SequenceClassification(training, training[::3])
    config = FineTuneConfig(
        min_steps=40, eval_every=40, batch_size=8, learning_rate=1e-2, max_length=12,
        device="cpu", precision="float32",
    )  # fmt: skip
    result = fine_tune(task, classifier(), TOKENIZER, config, progress=False)
    assert result.best["accuracy"] == 1.0
    new = [TextExample("a good b film"), TextExample("b bad b")]
    answers = predict(task, result.model, TOKENIZER, new, 12)
    assert [a["label"] for a in answers] == ["good", "bad"]
