"""The tagger's head and loss against their formulas in float64, and its rows,
tags and entities against those of transformers."""

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertnb import BertConfig, BertForMaskedLM, BertForTokenClassification
from bertnb.entities import TokenClassification, spans
from bertnb.examples import TokenExample
from bertnb.named_sets import load_examples
from bertnb.pretraining import book_model
from bertnb.tasks import pad_rows, predict
from bertnb.tokenization import WordPieceTokenizer

DATA = Path(
    os.environ.get("BERTNB_DATA", Path(__file__).parents[3] / "shared/data")
)

TINY = BertConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=20,
    initializer_range=0.3,
)


def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 8))
    labels = torch.randint(4, (3, 8))
    labels[torch.rand(3, 8) < 0.4] = -100
    labels[1] = -100  # a row without a class
    return ids, labels


@pytest.mark.equation("19.2")
def test_every_token_has_the_same_map(measured):
    torch.manual_seed(0)
    model = BertForTokenClassification(TINY, num_labels=4).eval().double()
    ids, _ = batch()
    states = model.bert(ids).last_hidden_state
    weight, bias = model.classifier.weight, model.classifier.bias
    for b, i in ((0, 0), (1, 5), (2, 7)):
        for c in range(4):
            score = sum(
                h * w
                for h, w in zip(
                    states[b, i].tolist(), weight[c].tolist(), strict=True
                )
            )
            found = model(ids).logits[b, i, c]
            measured(found.item() - score - bias[c].item(), 1e-12)


@pytest.mark.equation("19.3")
def test_the_loss_is_the_mean_over_the_tokens_with_a_class(measured):
    torch.manual_seed(0)
    model = BertForTokenClassification(TINY, num_labels=4).eval().double()
    ids, labels = batch()
    out = model(ids, labels=labels)
    terms = []
    for b, i in (labels != -100).nonzero().tolist():
        z = out.logits[b, i].tolist()
        p = math.exp(z[labels[b, i]]) / sum(math.exp(x) for x in z)
        terms.append(-math.log(p))
    measured(out.loss.item() - sum(terms) / len(terms), 1e-12)


def test_without_labels_there_is_no_loss():
    model = BertForTokenClassification(TINY, labels=["O", "B", "I"])
    out = model(batch()[0])
    assert out.loss is None
    assert out.logits.shape == (3, 8, 3)


def test_there_is_no_pooler_and_none_is_missed(tmp_path):
    model = BertForTokenClassification(TINY, labels=["O", "B", "I"])
    assert model.bert.pooler is None
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = BertForTokenClassification.from_pretrained(tmp_path)
    assert back.label_names == ["O", "B", "I"]


def test_a_pretrained_encoder_gets_a_new_head(tmp_path):
    pretrained = BertForMaskedLM(TINY)
    pretrained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier"):
        model = BertForTokenClassification.from_pretrained(
            tmp_path, num_labels=5
        )
    ours, theirs = model.bert.state_dict(), pretrained.bert.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.classifier.weight.shape == (5, 24)


def test_dropout_acts_on_every_token_in_training_only():
    config = replace(
        TINY, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0
    )
    model = BertForTokenClassification(config)
    model.bert.eval()  # only the head's own dropout is left
    ids, _ = batch()
    first, second = model(ids).logits, model(ids).logits
    assert (first != second).any(-1).all()
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


# rows, tags and entities

NAMES = ("O", "B-place", "I-place", "B-person", "I-person")
SENTENCES = [
    "Ulysses Grant , the President , went to Venezuela and Chihuahua".split(),
    ["\x07", "the", "", "naïve", "U.S.A.", "\u200b", "o'clock", "Zürich"],
    [],
    ["x" * 101, "of", "disestablishmentarianism"],
    ["國", "a", "\U0001f600", "\ufffd", "Ångström", " two words "],
]
EXAMPLES = [
    TokenExample(
        tuple(words), ("B-person", "I-person", *["O"] * 20)[: len(words)]
    )
    for words in SENTENCES
]


@pytest.fixture(scope="module")
def book():
    """The book's model with an untrained head that hesitates little."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BertForTokenClassification.from_pretrained(
            book_model(), labels=list(NAMES)
        ).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    return model, WordPieceTokenizer.from_pretrained(book_model())


@pytest.fixture(scope="module")
def folder(book, tmp_path_factory):
    path = tmp_path_factory.mktemp("tagger")
    for part in book:
        part.save_pretrained(path)
    return path


def features(tokenizer, examples, names):
    """Rows as the scripts of transformers make them."""
    found = []
    for example in examples:
        row = tokenizer(list(example.words), is_split_into_words=True)
        labels, before = [], None
        for word in row.word_ids():
            new = word is not None and word != before
            labels.append(names.index(example.tags[word]) if new else -100)
            before = word
        found.append({"input_ids": row["input_ids"], "labels": labels})
    return found


def assert_same_batches(tokenizer, peer, examples, task):
    from transformers import DataCollatorForTokenClassification

    rows = task.rows(examples, tokenizer, 512)
    assert [row.example for row in rows] == list(range(len(examples)))
    ours = pad_rows(rows, tokenizer.pad_token_id)
    collate = DataCollatorForTokenClassification(peer)
    theirs = collate(features(peer, examples, task.labels))
    for name in ("input_ids", "labels"):
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["attention_mask"].long(), theirs["attention_mask"])


@pytest.mark.equation("19.4")
def test_rows_are_those_of_transformers(book, folder):
    from transformers import BertTokenizerFast

    peer = BertTokenizerFast.from_pretrained(folder)
    task = TokenClassification(labels=NAMES)
    assert_same_batches(book[1], peer, EXAMPLES, task)


@pytest.mark.parametrize(
    ("name", "split", "vocabulary"),
    [
        ("wnut17", "test", "uncased"),
        ("wikigold", "test", "cased"),
        ("cluener", "validation", "chinese"),
    ],
)
def test_rows_of_real_text_are_those_of_transformers(
    name, split, vocabulary, monkeypatch
):
    from transformers import BertTokenizerFast

    file = DATA / "vocabs" / f"bert-base-{vocabulary}-vocab.txt"
    if not file.exists():
        pytest.skip(f"no {file}: set BERTNB_DATA to the folder of real data")
    monkeypatch.setenv("BERTNB_DATA", str(DATA))
    lower = vocabulary != "cased"
    lines = file.read_text("utf-8").removesuffix("\n").split("\n")
    ours = WordPieceTokenizer({p: i for i, p in enumerate(lines)}, lower)
    theirs = BertTokenizerFast(vocab=ours.vocabulary, do_lower_case=lower)
    examples = load_examples(name, split)
    task = TokenClassification(examples)
    assert_same_batches(ours, theirs, examples[:300], task)


@pytest.mark.equation("19.5")
def test_a_saved_tagger_answers_the_same_in_transformers(
    book, folder, measured
):
    from transformers import pipeline

    model, tokenizer = book
    tag = pipeline(
        "token-classification", model=str(folder), aggregation_strategy="first"
    )
    assert list(tag.model.config.id2label.values()) == list(NAMES)
    examples = [  # whose words are no two for the pipeline
        TokenExample(tuple(word for word in words if word.isalpha()))
        for words in (
            SENTENCES[0],
            SENTENCES[3][1:],
            ["we", "trade", "with", "Peru"],
        )
    ]
    answers = predict(
        TokenClassification(labels=NAMES), model, tokenizer, examples
    )
    for example, answer in zip(examples, answers, strict=True):
        (theirs,) = tag([list(example.words)], is_split_into_words=True)
        begin = [len(" ".join(example.words[:w])) + (w > 0) for w in range(20)]
        assert len(theirs) == len(answer["entities"])
        for mine, other in zip(answer["entities"], theirs, strict=True):
            assert mine["type"] == other["entity_group"]
            assert begin[mine["start"]] == other["start"]
            assert begin[mine["end"]] - 1 == other["end"]
            measured(mine["score"] - float(other["score"]), 1e-6)
    assert sum(len(answer["entities"]) for answer in answers) > 3


def test_a_tagger_of_transformers_answers_the_same_here(book, tmp_path):
    from transformers import BertForTokenClassification as Peer
    from transformers import BertTokenizerFast

    folder = book_model()
    torch.manual_seed(0)
    theirs = Peer.from_pretrained(
        folder,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    ).eval()
    torch.nn.init.normal_(theirs.classifier.weight, std=0.5)
    peer = BertTokenizerFast.from_pretrained(folder)
    theirs.save_pretrained(tmp_path)
    peer.save_pretrained(tmp_path)
    model = BertForTokenClassification.from_pretrained(tmp_path)
    task = TokenClassification(labels=model.label_names)
    assert task.labels == NAMES
    tokenizer = WordPieceTokenizer.from_pretrained(tmp_path)
    answers = predict(task, model, tokenizer, EXAMPLES)
    for example, answer in zip(EXAMPLES, answers, strict=True):
        row = peer(
            list(example.words), is_split_into_words=True, return_tensors="pt"
        )
        with torch.no_grad():
            best = theirs(**row).logits[0].argmax(-1).tolist()
        tags, places = ["O"] * len(example.words), row.word_ids()
        for k, word in zip(reversed(best), reversed(places), strict=True):
            if word is not None:  # the first piece comes last
                tags[word] = NAMES[k]
        assert answer["tags"] == tags
    assert any(spans(answer["tags"]) for answer in answers)
