"""What must hold of tags, entities, and the rows that a tagger reads."""

from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb import BertConfig, BertForTokenClassification, entities
from bertnb.entities import (
    TokenClassification,
    entity_scores,
    fitting_ranges,
    inner_tag,
    spans,
)
from bertnb.examples import TokenExample, to_iob2
from bertnb.fine_tuning import fine_tune
from bertnb.masked_lm import IGNORE
from bertnb.tasks import FineTuneConfig, evaluate, predict
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

NAMES = ("O", "B-group", "I-group", "B-person", "I-person")
PIECES = (*SPECIAL_TOKENS, *"abc", *(f"##{c}" for c in "abc"), ",", "国")
TOKENIZER = WordPieceTokenizer({p: i for i, p in enumerate(PIECES)})
CONFIG = BertConfig(
    vocab_size=len(PIECES),
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=128,
    initializer_range=0.3,
)

tag_lists = st.lists(st.sampled_from([*NAMES, "I-a-b", "B-a-b"]), max_size=9)
two_taggings = st.lists(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))),
    min_size=1,
    max_size=5,
)
words = st.one_of(
    st.text("abc,", max_size=6),
    st.sampled_from(["", "\x07", "\u200b", " ", "国a", "zz", "a b", "[CLS]"]),
    st.characters(codec="utf-8"),
)
sentences = st.lists(st.tuples(words, st.sampled_from(NAMES)), max_size=12).map(
    lambda pairs: TokenExample(
        tuple(w for w, _ in pairs), to_iob2([t for _, t in pairs])
    )
)


def tagger():
    torch.manual_seed(0)
    return BertForTokenClassification(CONFIG, labels=list(NAMES)).eval()


# tags and entities


@settings(max_examples=25, deadline=None)
@given(tag_lists)
def test_spans_are_those_of_seqeval(tags):
    from seqeval.metrics.sequence_labeling import get_entities

    theirs = [
        (kind, first, last + 1) for kind, first, last in get_entities(tags)
    ]
    assert spans(tags) == theirs


def test_an_i_without_b_opens_an_entity():
    assert spans(["O", "I-x", "I-x", "B-x", "I-y"]) == [
        ("x", 1, 3),
        ("x", 3, 4),
        ("y", 4, 5),
    ]


@pytest.mark.equation("19.1")
@settings(max_examples=25, deadline=None)
@given(two_taggings)
@pytest.mark.filterwarnings("ignore:.*ill-defined")
def test_scores_are_those_of_seqeval(measured, sentences):
    from seqeval.metrics import classification_report

    gold = [[a for a, _ in sentence] for sentence in sentences]
    found = [[b for _, b in sentence] for sentence in sentences]
    ours = entity_scores(gold, found)
    kinds = {kind for tags in gold + found for kind, _, _ in spans(tags)}
    names = {"precision", "recall", "f1", *(f"f1.{kind}" for kind in kinds)}
    assert set(ours) == names
    if not kinds:
        assert set(ours.values()) == {0.0}
        return
    theirs = classification_report(gold, found, output_dict=True)
    overall = theirs["micro avg"]
    measured(ours["precision"] - overall["precision"], 1e-12)
    measured(ours["recall"] - overall["recall"], 1e-12)
    measured(ours["f1"] - overall["f1-score"], 1e-12)
    for kind in kinds:
        measured(ours[f"f1.{kind}"] - theirs[kind]["f1-score"], 1e-12)


def test_scores_of_nothing_are_zero():
    assert entity_scores([], []) == {"precision": 0, "recall": 0, "f1": 0}
    assert entity_scores([["O"]], [["B-x"]])["recall"] == 0


def test_scores_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match="1 sentences, gold 2"):
        entity_scores([["O"], ["O"]], [["O"]])
    with pytest.raises(
        ValueError, match=r"found\[1\] has 2 tags, gold\[1\] has 1"
    ):
        entity_scores([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ValueError, match="tag 'S-x'"):
        entity_scores([["S-x"]], [["O"]])


# rows


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(5, 9))
def test_ranges_hold_each_word_once_and_fit(counts, room):
    ranges = fitting_ranges(counts, room)
    assert [i for start, end in ranges for i in range(start, end)] == list(
        range(len(counts))
    )
    for (start, end), (_, after) in pairwise(ranges):
        assert sum(counts[start:end]) <= room < sum(counts[start : end + 1])
        assert end < after
    start, end = ranges[-1]
    assert sum(counts[start:end]) <= room


@pytest.mark.equation("19.4")
@settings(max_examples=25, deadline=None)
@given(st.lists(sentences, max_size=4), st.integers(3, 12), st.booleans())
def test_each_word_is_labelled_at_its_first_piece(examples, length, every):
    task = TokenClassification(labels=NAMES, label_all_pieces=every)
    rows = task.rows(examples, TOKENIZER, length)
    for number, example in enumerate(examples):
        ids, classes, origins = [], [], []
        for row in (row for row in rows if row.example == number):
            assert len(row.input_ids) <= length
            assert row.token_type_ids == [0] * len(row.input_ids)
            ends = row.input_ids[0], row.input_ids[-1]
            assert ends == (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id)
            labels = row.targets["labels"]
            assert (labels[0], labels[-1]) == (IGNORE, IGNORE)
            assert (row.origins[0], row.origins[-1]) == (None, None)
            ids += row.input_ids[1:-1]
            classes += labels[1:-1]
            origins += row.origins[1:-1]
        expected = []  # of each piece: id, class, word
        for word, tag in enumerate(example.tags):
            for k, i in enumerate(TOKENIZER.ids([example.words[word]])[0]):
                if k < length - 2:
                    inner = NAMES.index("I" + tag[1:]) if tag != "O" else 0
                    later = inner if every else IGNORE
                    first = k == 0
                    expected.append(
                        (
                            i,
                            NAMES.index(tag) if first else later,
                            word if first else None,
                        )
                    )
        assert list(zip(ids, classes, origins, strict=True)) == expected


@pytest.mark.equation("19.4")
@settings(max_examples=25, deadline=None)
@given(st.lists(sentences, max_size=4), st.integers(3, 12))
def test_scores_at_first_pieces_come_back_as_tags(examples, length):
    task = TokenClassification(labels=NAMES)
    rows = task.rows(examples, TOKENIZER, length)
    logits = [
        torch.nn.functional.one_hot(
            torch.tensor(row.targets["labels"]).clamp(min=0), len(NAMES)
        ).float()
        for row in rows
    ]
    for example, answer in zip(
        examples, task.decode(examples, rows, logits), strict=True
    ):
        seen = [len(ids) > 0 for ids in TOKENIZER.ids(example.words)]
        assert answer["tags"] == [
            tag if there else "O"
            for tag, there in zip(example.tags, seen, strict=True)
        ]
        found = [(e["type"], e["start"], e["end"]) for e in answer["entities"]]
        assert found == spans(answer["tags"])


@pytest.mark.equation("19.5")
def test_an_entity_scores_the_mean_of_its_first_pieces(measured):
    model, task = tagger(), TokenClassification(labels=NAMES)
    example = TokenExample(("ab", "c", "a", "cc"))
    (answer,) = predict(task, model, TOKENIZER, [example])
    (row,) = task.rows([example], TOKENIZER, 40)
    p = model(torch.tensor([row.input_ids])).logits[0].softmax(-1)
    first = [1, 3, 4, 5]
    assert answer["tags"] == [NAMES[p[i].argmax()] for i in first]
    assert answer["entities"]
    for entity in answer["entities"]:
        places = first[entity["start"] : entity["end"]]
        mean = fmean(p[i].max().item() for i in places)
        measured(entity["score"] - mean, 1e-6)
        text = " ".join(example.words[entity["start"] : entity["end"]])
        assert entity["text"] == text


def test_characters_are_joined_without_spaces():
    task = TokenClassification(labels=NAMES)
    example = TokenExample(tuple("国a国"), ("O", "B-group", "I-group"))
    rows = task.rows([example], TOKENIZER, 8)
    logits = torch.eye(5)[torch.tensor([0, 0, 1, 2, 0])]
    (answer,) = task.decode([example], rows, [logits])
    assert [entity["text"] for entity in answer["entities"]] == ["a国"]


def test_a_word_that_alone_is_too_long_keeps_its_first_pieces():
    task = TokenClassification(labels=NAMES)
    example = TokenExample(("a", "b," * 50_000, "c"), ("O", "B-group", "O"))
    rows = task.rows([example], TOKENIZER, 8)
    assert [len(row.input_ids) for row in rows] == [3, 8, 3]
    assert [row.targets["labels"] for row in rows] == [
        [IGNORE, 0, IGNORE],
        [IGNORE, 1, *[IGNORE] * 6],
        [IGNORE, 0, IGNORE],
    ]


# the task


def test_labels_are_those_of_the_training_and_an_i_for_each_b():
    examples = [TokenExample(("a", "b"), ("B-x", "O")), TokenExample(("c",))]
    assert TokenClassification(examples).labels == ("O", "B-x", "I-x")
    assert TokenClassification().labels == ("O",)


def test_wrong_tags_are_named():
    task = TokenClassification(labels=NAMES)
    good = TokenExample(("a",), ("O",))
    bad = TokenExample(("a", "b"), ("O", "B-nmae"))
    with pytest.raises(
        ValueError, match=r"example 1, word 1 \('b'\).*'B-nmae'"
    ):
        task.rows([good, bad], TOKENIZER, 8)
    with pytest.raises(ValueError, match="example 1 has no tags"):
        task.score([good, TokenExample(("a",))], [{"tags": ["O"]}] * 2)


def test_labels_are_checked():
    with pytest.raises(ValueError, match="'LABEL_0'"):
        TokenClassification(labels=["O", "LABEL_0"])
    with pytest.raises(ValueError, match="'O' twice"):
        TokenClassification(labels=["O", "B-x", "O"])
    TokenClassification(labels=["O", "B-x"])
    with pytest.raises(ValueError, match="lacks 'I-x'"):
        TokenClassification(labels=["O", "B-x"], label_all_pieces=True)


def test_the_model_must_have_the_labels_of_the_task():
    model = tagger()
    other = TokenClassification(labels=("O", *reversed(NAMES[1:])))
    with pytest.raises(ValueError, match=r"labels=model\.label_names"):
        predict(other, model, TOKENIZER, [TokenExample(("a",))])
    task = TokenClassification(labels=model.label_names)
    assert len(predict(task, model, TOKENIZER, [TokenExample(("a",))])) == 1


def test_words_without_tags_have_no_targets():
    task = TokenClassification(labels=NAMES)
    (row,) = task.rows([TokenExample(("a", "bc"))], TOKENIZER, 8)
    assert row.targets == {}
    assert row.origins == (None, 0, 1, None, None)


def test_no_row_without_room_for_a_word():
    with pytest.raises(ValueError, match="max_length=2"):
        TokenClassification(labels=NAMES).rows([], TOKENIZER, 2)


@settings(max_examples=10, deadline=None)
@given(st.lists(sentences, min_size=1, max_size=5))
def test_answers_do_not_depend_on_the_batch(examples):
    model, task = tagger(), TokenClassification(labels=NAMES)
    together = predict(task, model, TOKENIZER, examples, 12)
    alone = [predict(task, model, TOKENIZER, [e], 12, 1)[0] for e in examples]
    for one, other, example in zip(together, alone, examples, strict=True):
        assert len(one["tags"]) == len(example.words)
        assert one["tags"] == other["tags"]


@pytest.mark.parametrize("every", [False, True])
def test_a_tagger_learns_its_examples(every):
    """A name is what follows c; the last word has no piece."""
    examples = [
        TokenExample(
            ("c", name, "b", "a", "\x07"), ("O", "B-group", "I-group", "O", "O")
        )
        for name in ("a", "ab", "aab")
    ]
    task = TokenClassification(examples, examples, label_all_pieces=every)
    torch.manual_seed(0)
    model = BertForTokenClassification(
        replace(CONFIG, hidden_dropout_prob=0.0), **task.head_arguments()
    )
    config = FineTuneConfig(
        epochs=1, min_steps=40, learning_rate=1e-2, max_length=32, device="cpu"
    )
    result = fine_tune(task, model, TOKENIZER, config, progress=False)
    assert result.best["f1"] == result.best["f1.group"] == 1.0
    assert evaluate(task, result.model, TOKENIZER)["f1"] == 1.0


def test_inner_tags():
    assert list(map(inner_tag, ("O", "B-x", "I-x"))) == ["O", "I-x", "I-x"]


def test_scores_that_are_not_finite_are_no_answer():
    model = tagger()
    torch.nn.init.constant_(model.classifier.bias, torch.nan)
    task = TokenClassification(labels=NAMES)
    with pytest.raises(ValueError, match="example 0: the model gives a score"):
        predict(task, model, TOKENIZER, [TokenExample(("a", "b"))], 8)


def test_chinese_is_joined_without_spaces():
    words = ("他", "2020", "北", "京", "A", "B", "C")
    tags = ("O", "O", "B-group", "I-group", "B-person", "I-person", "O")
    found = entities._entities(words, tags, [1.0] * 7)
    assert [entity["text"] for entity in found] == ["北京", "A B"]
    found = entities._entities(words[-3:], tags[-3:], [1.0] * 3)
    assert [entity["text"] for entity in found] == ["AB"]  # all are characters
