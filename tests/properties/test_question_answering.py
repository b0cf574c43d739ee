"""Question answering: passages to rows and back, and what has no answer."""

import json
import math
import warnings

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertnb import (
    Answer,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    FineTuneConfig,
    QuestionAnswering,
    QuestionExample,
    WordPieceTokenizer,
    answer,
    context_windows,
    evaluate,
    exact_match,
    fine_tune,
    predict,
    span_candidates,
)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] who where is in ? . ,".split()
WORDS += [*"abcdefghijklmnopqrstuvwxyz0123456789"]
WORDS += ["##" + c for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
TOKENIZER = WordPieceTokenizer({word: i for i, word in enumerate(WORDS)})
TINY = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=48,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BertForQuestionAnswering(TINY).eval()


def scores_with(rows, places, value=9.0):
    """Return scores that are 0 but at (row, first, last)."""
    logits = [torch.zeros(len(row.input_ids), 2) for row in rows]
    for row, first, last in places:
        logits[row][first, 0] = logits[row][last, 1] = value
    return logits


LETTERS = "ab ,.\u202f\n\u3000\u200b\u00e9\u5317Ω😀"
contexts = st.text(LETTERS, min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(contexts, st.data(), st.integers(7, 30), st.integers(1, 9))
def test_every_answer_is_found_again_in_its_own_characters(
    context, data, max_length, stride
):
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    question = QuestionExample(
        "who?", context, (Answer(context[start:end], start),)
    )
    task = QuestionAnswering(stride=stride, max_answer_length=99)
    plain = QuestionExample("who?", context)
    (whole,) = QuestionAnswering().rows([plain], TOKENIZER, 99)
    tokens = [o[:2] for o in whole.origins if o]
    if not any(a < end and start < b for a, b in tokens):
        with pytest.raises(ValueError, match="has no token"):
            task.rows([question], TOKENIZER, max_length)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = task.rows([question], TOKENIZER, max_length)
    lost = not any(row.targets["start_positions"] for row in rows)
    assert bool(told) == lost  # a learner hears of it
    owned = [o[:2] for row in rows for o in row.origins if o and o[2]]
    assert sorted(owned) == tokens  # once each
    for number, row in enumerate(rows):
        first = row.targets["start_positions"]
        last = row.targets["end_positions"]
        assert len(row.input_ids) == len(row.origins) <= max_length
        assert len(row.token_type_ids) == len(row.origins)
        if (first, last) == (0, 0):
            continue
        begin, behind = row.origins[first][0], row.origins[last][1]
        assert not TOKENIZER.tokenize(context[start:begin])
        assert not TOKENIZER.tokenize(context[behind:end])
        assert row.origins[first][1] > start  # and no token more
        assert row.origins[last][0] < end
        if row.origins[first][2]:  # else another window may give it
            logits = scores_with(rows, [(number, first, last)])
            (found,) = task.decode([question], rows, logits)
            assert (found["start"], found["end"]) == (begin, behind)
            assert found["answer"] == context[begin:behind]


def test_windows_without_the_whole_answer_learn_cls():
    context = "a b c d e f g h i j k l"
    known = QuestionExample("who?", context, (Answer("f g", 10),))
    absent = QuestionExample("who?", context, ())
    unknown = QuestionExample("who?", context)
    task = QuestionAnswering(stride=3)
    rows = task.rows([known, absent, unknown], TOKENIZER, 11)  # room for 6
    found = [
        (row.example, *row.targets.values(), row.origins[4][0] // 2)
        for row in rows
        if row.targets
    ]
    assert found == [
        (0, 0, 0, 0),  # a to f, without the g
        (0, 4 + 2, 4 + 3, 3),  # d to i
        (0, 0, 0, 6),  # g to l, without the f
        (1, 0, 0, 0),
        (1, 0, 0, 3),
        (1, 0, 0, 6),
    ]
    assert [row.example for row in rows if not row.targets] == [2, 2, 2]


def test_of_several_answers_the_first_is_learnt_and_each_is_right():
    context = "a b c b"
    answers = (Answer("b", 6), Answer("b c", 2), Answer("b", 2))
    question = QuestionExample("who?", context, answers)
    task = QuestionAnswering()
    (row,) = task.rows([question], TOKENIZER, 20)
    assert row.origins[row.targets["start_positions"]][:2] == (6, 7)
    for said, f1 in (("b", 100), ("b c", 100), ("c", 200 / 3), ("", 0)):
        scores = task.score([question], [{"answer": said}])
        assert scores["f1"] == pytest.approx(f1)
        assert scores["exact_match"] == (100 if f1 == 100 else 0)


@pytest.mark.equation("20.10")
def test_one_window_can_veto_that_there_is_no_answer():
    context = "a b c d e f g h i j k l"
    question = QuestionExample("who?", context)
    rows = QuestionAnswering(stride=6).rows([question], TOKENIZER, 11)
    logits = scores_with(rows, [(0, 0, 0)])  # the first window: 18 for none
    logits[1][5] = torch.tensor([1.0, 3.0])  # the second: 4 for h, 0 for none
    for threshold, expected in ((None, "h"), (0, "h"), (-4.5, ""), (-3.5, "h")):
        task = QuestionAnswering(stride=6, null_threshold=threshold)
        (found,) = task.decode([question], rows, logits)
        assert found["answer"] == expected
        assert found["null_margin"] == 0 - 4
        assert context[found["start"] : found["end"]] == expected
    task = QuestionAnswering(stride=6, null_threshold=0, n_best=1)
    (found,) = task.decode([question], rows, logits)
    assert found["score"] == pytest.approx(1 / (1 + math.exp(-4)))


@pytest.mark.parametrize("threshold", [None, -1e9, 0.0, 1e9])
@pytest.mark.parametrize("context", ["", " ", "\n\u202f \u3000", "\u200b\x00"])
def test_only_no_answer_left_does_not_crash(model, context, threshold):
    found = answer(model, TOKENIZER, "who?", context, null_threshold=threshold)
    assert found == {"answer": "", "score": 1.0, "start": 0, "end": 0}
    examples = [QuestionExample("who?", context, ())]
    scores = evaluate(
        QuestionAnswering(null_threshold=threshold),
        model,
        TOKENIZER,
        examples,
        48,
    )
    assert scores == {"exact_match": 100, "f1": 100}


@settings(max_examples=20, deadline=None)
@given(
    st.text(max_size=40) | st.text(LETTERS, min_size=60, max_size=200),
    st.sampled_from([None, 0.0]),
)
@example("ab, cd. " * 12_500, None)  # 100,000 characters
def test_an_answer_is_always_a_piece_of_its_context(model, context, threshold):
    found = answer(
        model,
        TOKENIZER,
        "who?",
        context,
        max_answer_length=5,
        null_threshold=threshold,
    )
    assert context[found["start"] : found["end"]] == found["answer"]
    assert 0 < found["score"] <= 1
    assert len(TOKENIZER.tokenize(found["answer"])) <= 5
    if threshold is None:
        assert bool(found["answer"]) == bool(TOKENIZER.tokenize(context))


def test_the_order_of_the_batch_changes_nothing(model):
    examples = [
        QuestionExample("who?", context)
        for context in ("a b c " * 20, "d", "e f " * 9, "", "g h i")
    ]
    task = QuestionAnswering(stride=20)
    whole = predict(task, model, TOKENIZER, examples, 48)
    for question, found in zip(examples, whole, strict=True):
        (alone,) = predict(task, model, TOKENIZER, [question], 48, 1)
        assert alone["answer"] == found["answer"]
        assert alone["score"] == pytest.approx(found["score"], abs=1e-5)


def test_a_long_question_is_cut_with_a_warning(model):
    question = QuestionExample("who " * 70 + "?", "a b")
    with pytest.warns(UserWarning, match="1 of 2 questions have more than"):
        rows = QuestionAnswering(max_query_length=5).rows(
            [question, QuestionExample("where?", "a")], TOKENIZER, 12
        )
    assert TOKENIZER.decode(rows[0].input_ids) == "who who who who who a b"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QuestionAnswering().rows([QuestionExample("?", "a")], TOKENIZER, 5)
    with pytest.raises(
        ValueError, match=r"max_length=8: example 0 .* 9 or more"
    ):
        QuestionAnswering(max_query_length=5).rows([question], TOKENIZER, 8)


def test_what_is_wrong_is_named(model):
    task = QuestionAnswering()
    good = QuestionExample("who?", "a", (Answer("a", 0),))
    for question in ("", "  ", "\u200b"):
        bad = QuestionExample(question, "a")
        with pytest.raises(
            ValueError, match=r"example 1: the question .* has no"
        ):
            task.rows([good, bad], TOKENIZER, 20)
    bad = QuestionExample("who?", "a  b", (Answer(" ", 1),))
    with pytest.raises(ValueError, match="example 1: the answer ' ' has no"):
        task.rows([good, bad], TOKENIZER, 20)
    with pytest.raises(ValueError, match=r"example 1 \('who\?'\) has answers"):
        task.score([good, QuestionExample("who?", "a")], [{"answer": "a"}] * 2)
    (row,) = task.rows([good], TOKENIZER, 20)
    logits = torch.full((len(row.input_ids), 2), math.nan)
    with pytest.raises(FloatingPointError, match="example 0 are not finite"):
        task.decode([good], [row], [logits])
    for name in "stride max_query_length max_answer_length n_best".split():
        with pytest.raises(ValueError, match=f"{name}=0: expected 1 or more"):
            QuestionAnswering(**{name: 0})
    with pytest.raises(ValueError, match="metric='F1': expected 'f1'"):
        QuestionAnswering(metric="F1")
    with pytest.raises(ValueError, match="room=0"):
        context_windows(5, 0, 1)
    with pytest.raises(TypeError, match=r"answers='a' is one text.*\['a'\]"):
        exact_match("a", "a")
    with pytest.raises(TypeError, match="BertForQuestionAnswering"):
        answer(BertModel(TINY), TOKENIZER, "who?", "a")
    with pytest.raises(TypeError, match="expected a text"):
        answer(model, TOKENIZER, None, "a")
    with pytest.raises(ValueError, match="max_position_embeddings"):
        answer(model, TOKENIZER, "who?", "a", max_length=49)
    assert task.rows([], TOKENIZER, 20) == []
    assert predict(task, model, TOKENIZER, [], 20) == []


def test_spans_stay_inside_and_start_where_the_window_is_best():
    origins = [None, None, (0, 1, False), (1, 2, True), (3, 5, True), None]
    scores = torch.tensor([[9.0, 9], [9, 9], [8, 0], [1, 0], [0, 5], [9, 9]])
    assert span_candidates(scores, origins) == [
        (6.0, 1, 5),
        (5.0, 3, 5),
        (1.0, 1, 2),
    ]
    assert span_candidates(scores, origins, 1) == [(5.0, 3, 5), (1.0, 1, 2)]
    assert span_candidates(scores, origins, 30, 1) == [(6.0, 1, 5)]
    assert span_candidates(scores, [None] * 6) == []


def test_fine_tuned_saved_and_read_by_transformers(tmp_path):
    contexts = ["a b c 7 d", "e 4 f g", "h i j 9", "5 k l m n o"]
    examples = [
        QuestionExample("who?", c, (Answer(d, c.index(d)),))
        for c, d in zip(contexts, "7495", strict=True)
    ]
    examples += [
        QuestionExample("where is?", c, ()) for c in contexts
    ]  # never in the text
    task = QuestionAnswering(examples, examples, null_threshold=0.0)
    torch.manual_seed(0)
    config = FineTuneConfig(
        str(tmp_path),
        min_steps=80,
        batch_size=8,
        learning_rate=1e-2,
        max_length=24,
        eval_every=80,
    )
    result = fine_tune(
        task, BertForQuestionAnswering(TINY), TOKENIZER, config, progress=False
    )
    assert result.best["f1"] == result.best["exact_match"] == 100
    found = answer(result.model, TOKENIZER, "who?", contexts[0])
    assert found["answer"] == "7"
    json.dumps(found)
    nothing = answer(
        result.model, TOKENIZER, "where is?", contexts[0], null_threshold=0.0
    )
    assert nothing["answer"] == ""
    peer = transformers.BertForQuestionAnswering.from_pretrained(tmp_path)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    inputs = theirs("who?", contexts[0], return_tensors="pt")
    with torch.no_grad():
        output = peer.eval()(**inputs)
    first, last = output.start_logits.argmax(), output.end_logits.argmax()
    assert theirs.decode(inputs["input_ids"][0, first : last + 1]) == "7"


def test_an_answer_that_no_window_holds_is_counted():
    passage = " ".join("abcdefghijklmnopqrstuvwxyz")
    # room for 11 of its tokens: windows end behind k, v, z
    lost = QuestionExample("who?", passage, (Answer("k l", 20),))
    kept = QuestionExample("who?", passage, (Answer("b c", 2),))
    none = QuestionExample("who?", passage, ())
    with pytest.warns(
        UserWarning,
        match="1 of 2 answers are whole in no window, the first is that of "
        "example 1:",
    ):
        QuestionAnswering(stride=11).rows([kept, lost, none], TOKENIZER, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = QuestionAnswering().rows([kept, lost, none], TOKENIZER, 16)
    whole = {r.example for r in rows if r.targets["start_positions"]}
    assert whole == {0, 1}


@pytest.mark.parametrize(
    ("length", "stride"), [(16, 5), (261, 128), (400, 128)]
)
def test_windows_of_short_rows_share_half(length, stride):
    asked = QuestionExample("who?", " ".join("a" * 1000))
    rows = QuestionAnswering().rows([asked], TOKENIZER, length)
    wanted = QuestionAnswering(stride=stride).rows([asked], TOKENIZER, length)
    assert rows == wanted
    assert len(rows) > 1
