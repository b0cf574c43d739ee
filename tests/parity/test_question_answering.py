"""Question answering in float64, by the official scores, by Hugging Face's rules."""

import math
import os
import re
import string
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    QuestionAnswering,
    QuestionExample,
    WordPieceTokenizer,
    best_windows,
    context_windows,
    exact_match,
    normalize_answer,
    predict,
    read_questions,
    span_candidates,
    span_losses,
    token_f1,
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


@pytest.mark.equation("20.1")
def test_every_token_has_two_scores(measured):
    torch.manual_seed(0)
    model = BertForQuestionAnswering(TINY).eval().double()
    ids = torch.randint(5, 50, (2, 8))
    out = model(ids)
    assert out.loss is None
    assert out.start_logits.shape == out.end_logits.shape == (2, 8)
    states = model.bert(ids).last_hidden_state
    weight, bias = model.qa_outputs.weight, model.qa_outputs.bias
    for column, found in enumerate((out.start_logits, out.end_logits)):
        scores = (states * weight[column]).sum(-1) + bias[column]
        measured(found - scores, 1e-12)


@pytest.mark.equation("20.2", "20.3")
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 999))
def test_the_loss_is_its_formula(measured, rows, length, seed):
    torch.manual_seed(seed)
    scores = torch.randn(2, rows, length, dtype=torch.float64)
    places = torch.randint(2 * length, (2, rows))  # some behind the end
    places[torch.rand(2, rows) < 0.2] = -100
    total = 0.0
    for kind in range(2):
        terms = []
        for b in range(rows):
            right = int(places[kind, b])
            if 0 <= right < length:
                s = scores[kind, b].tolist()
                p = math.exp(s[right]) / sum(math.exp(x) for x in s)
                terms.append(-math.log(p))
        total += sum(terms) / max(1, len(terms)) / 2
    losses = span_losses(*scores, *places)
    measured(sum(losses.values()).item() - total, 1e-12)


def test_padding_takes_part_as_in_the_original():
    torch.manual_seed(0)
    model = BertForQuestionAnswering(TINY).eval()
    ids = torch.randint(5, 50, (1, 8))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    place = {"start_positions": torch.tensor([2])}
    place["end_positions"] = torch.tensor([3])
    long = model(ids, mask, **place).loss
    short = model(ids[:, :5], mask[:, :5], **place).loss
    assert (long - short).abs() > 1e-3


def test_a_new_head_is_small_and_has_no_bias():
    torch.manual_seed(0)
    head = BertForQuestionAnswering(TINY).qa_outputs
    assert head.weight.shape == (2, 24)
    assert 0 < head.weight.abs().max() <= 2 * TINY.initializer_range
    assert not head.bias.any()


def test_a_pretrained_encoder_gets_a_new_head(tmp_path):
    pretrained = BertForMaskedLM(TINY)
    pretrained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="qa_outputs"):
        model = BertForQuestionAnswering.from_pretrained(tmp_path)
    ours, theirs = model.bert.state_dict(), pretrained.bert.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = BertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(back.qa_outputs.weight, model.qa_outputs.weight)


# The official definition of the scores, written down once more.


def official_words(text):
    lowered = text.lower()
    for sign in string.punctuation:
        lowered = lowered.replace(sign, "")
    return re.sub("(?<!\\w)(?:the|an|a)(?!\\w)", " ", lowered).split()


def official_scores(prediction, golds):
    """Return EM and F1 of SQuAD 2.0."""
    golds = [g for g in golds if official_words(g)] or [""]
    best = [0.0, 0.0]
    for gold in golds:
        p, g = official_words(prediction), official_words(gold)
        same = sum(min(p.count(w), g.count(w)) for w in set(p))
        f1 = float(p == g)
        if p and g and same:
            precision, recall = same / len(p), same / len(g)
            f1 = 2 * precision * recall / (precision + recall)
        elif p and g:
            f1 = 0.0
        best = [max(best[0], float(p == g)), max(best[1], f1)]
    return best


NASTY = [
    *"The the a AN an aa Theo A. U.S. U.S.A $5 5% it's its re-do redo".split(),
    "—", "“quoted”", ",", "...", "\u202f", "\u00a0", "\t", "\u3000", "　a　",
    "ＦＵＬＬ", "full", "café", "cafe\u0301", "İ", "ß", "ss", "北京", "京", "。",
    "_", "a_b", "\u200b", "é", "1.000,5", "10005", "a\u0301", "the\u0301",
]  # fmt: skip
texts = st.lists(st.sampled_from(NASTY), max_size=4).flatmap(
    lambda words: st.sampled_from([" ", "", "\u202f"]).map(
        lambda glue: glue.join(words)
    )
)


@pytest.mark.equation("20.5", "20.6")
@settings(max_examples=200, deadline=None)
@given(texts | st.text(max_size=6), st.lists(texts, max_size=3))
def test_the_scores_are_the_official_ones(measured, prediction, golds):
    exact, f1 = official_scores(prediction, golds)
    assert exact_match(prediction, golds) == exact
    measured(token_f1(prediction, golds) - f1, 1e-12)


@pytest.mark.parametrize(
    ("said", "golds", "exact", "f1"),
    [
        ("the White House.", ["White house"], 1, 1),
        ("in the White House", ["the White House", "D.C."], 0, 0.8),
        ("D.C", ["the White House", "D.C."], 1, 1),
        ("", [], 1, 1),
        ("The", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["a", "."], 1, 1),
        ("the", ["a", "Paris"], 0, 0),
        ("to be or to be", ["to be"], 0, 4 / 7),
        ("ＮＡＴＯ", ["NATO"], 0, 0),
        ("café", ["cafe\u0301"], 0, 0),
        ("10\u202f000", ["10 000"], 1, 1),
        ("“NATO”", ["NATO"], 0, 0),
        ("anthem", ["them"], 0, 0),
    ],
)
def test_scores_of_single_answers(said, golds, exact, f1):
    assert exact_match(said, golds) == exact
    assert token_f1(said, golds) == pytest.approx(f1)


def test_in_chinese_characters_are_words():
    """As in MLQA's script: punctuation of all of Unicode goes, articles stay."""
    signs = string.punctuation
    for text in ("《北京》市，中国。", "a 3.5米 (the) “长城”", "CNN　电视", ""):
        words, word = [], ""
        for c in text.lower():
            if "\u4e00" <= c <= "\u9fa5":
                words += [*word.split(), c]
                word = ""
            elif unicodedata.category(c)[0] != "P" and c not in signs:
                word += c
        words += word.split()
        assert normalize_answer(text, chinese=True) == " ".join(words)
    assert token_f1("北京市", ["北京"]) == 0
    assert token_f1("北京市", ["北京"], chinese=True) == 0.8
    assert exact_match("北京。", ["北京"], chinese=True) == 1


# Windows, in the words of the original's loop.


@pytest.mark.equation("20.7", "20.8")
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 25))
def test_windows_are_those_of_the_original(tokens, room, stride):
    spans, start = [], 0
    while start < tokens:
        length = min(room, tokens - start)
        spans.append((start, length))
        if start + length == tokens:
            break
        start += min(length, stride)
    windows = context_windows(tokens, room, stride)
    assert windows == [range(s, s + n) for s, n in spans] or not tokens
    assert sum(map(len, windows)) >= tokens
    best = best_windows(windows)
    assert len(best) == tokens
    for place in range(tokens):
        scores = [
            min(place - s, s + n - 1 - place) + 0.01 * n
            if s <= place < s + n
            else -math.inf
            for s, n in spans
        ]
        assert best[place] == scores.index(max(scores))


# Hugging Face's choice among the windows of an example (utils_qa.py of its
# examples, with token_is_max_context), written down once more.


def their_choice(features, null_threshold, longest, n_best):
    """Return character span, probability and null difference."""
    null, found = math.inf, []
    for start_logits, end_logits, offsets, is_best in features:
        null = min(null, start_logits[0] + end_logits[0])
        starts = np.argsort(-start_logits, kind="stable")[:n_best]
        ends = np.argsort(-end_logits, kind="stable")[:n_best]
        found += [
            (start_logits[i] + end_logits[j], (offsets[i][0], offsets[j][1]))
            for i in starts
            for j in ends
            if offsets[i] and offsets[j] and i <= j < i + longest and is_best[i]
        ]
    found = sorted(found, key=lambda f: f[0], reverse=True)[:n_best]
    difference = null - found[0][0] if found else math.inf
    chosen = 0
    if null_threshold is not None:
        found.append((null, (0, 0)))
        if difference > null_threshold:
            chosen = len(found) - 1
    weights = np.exp(np.array([f[0] for f in found]) - found[0][0])
    return found[chosen][1], weights[chosen] / weights.sum(), difference


WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] who where is was the of in , . ?".split()
)
WORDS += [*"abcdefgh", *("##" + c for c in "abcdefgh")]
TOKENIZER = WordPieceTokenizer({word: i for i, word in enumerate(WORDS)})
CONTEXT = (
    "abc is in  the\u202fbad  cage , of Ed.\nHe was  fed ; the face (bad)."
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same weights and vocabulary, here and there."""
    torch.manual_seed(0)
    config = BertConfig(**{**vars(TINY), "max_position_embeddings": 40})
    ours = BertForQuestionAnswering(config).eval()
    folder = tmp_path_factory.mktemp("model")
    ours.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return (
        ours,
        transformers.BertForQuestionAnswering.from_pretrained(folder).eval(),
        transformers.BertTokenizerFast.from_pretrained(folder),
    )


@pytest.mark.equation("20.7", "20.8", "20.9", "20.10", "20.11")
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["who is he ?", "who", "where was the bad cage?"]),
    st.integers(16, 40),
    st.integers(1, 12),
    st.sampled_from([None, -1.0, 0.0, 1.0]),
)
def test_answers_are_those_of_hugging_face(
    measured, both, question, max_length, stride, threshold
):
    ours, peer, theirs = both
    task = QuestionAnswering(
        stride=stride,
        n_best=2000,
        max_answer_length=7,
        null_threshold=threshold,
    )
    example = QuestionExample(question, CONTEXT)
    (found,) = predict(task, ours, TOKENIZER, [example], max_length, 3)
    room = max_length - len(TOKENIZER.tokenize(question)) - 3
    encoded = theirs(
        question,
        CONTEXT,
        truncation="only_second",
        max_length=max_length,
        stride=room - min(stride, room),  # theirs is what two windows share
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = task.rows([example], TOKENIZER, max_length)
    assert [row.input_ids for row in rows] == encoded["input_ids"]
    assert [row.token_type_ids for row in rows] == encoded["token_type_ids"]
    features = []
    for row, ids in enumerate(encoded["input_ids"]):
        kinds = encoded["token_type_ids"][row]
        with torch.no_grad():
            output = peer(
                torch.tensor([ids]), token_type_ids=torch.tensor([kinds])
            )
        offsets = [
            offset if source == 1 else None
            for offset, source in zip(
                encoded["offset_mapping"][row],
                encoded.sequence_ids(row),
                strict=True,
            )
        ]
        logits = output.start_logits[0].numpy(), output.end_logits[0].numpy()
        features.append([*logits, offsets, None])
    places = [[o for o in f[2] if o] for f in features]
    for number, feature in enumerate(features):
        feature[3] = [
            bool(o) and their_best_window(o, places) == number
            for o in feature[2]
        ]
    span, probability, difference = their_choice(features, threshold, 7, 2000)
    assert (found["start"], found["end"]) == span
    assert found["answer"] == CONTEXT[span[0] : span[1]]
    measured(found["score"] - probability, 1e-5)
    measured(found["null_margin"] - difference, 1e-4)


def their_best_window(offset, places):
    """Return which window's token list holds a token best."""
    scores = []
    for tokens in places:
        if offset in tokens:
            i, n = tokens.index(offset), len(tokens)
            scores.append(min(i, n - 1 - i) + 0.01 * n)
        else:
            scores.append(-1.0)
    return scores.index(max(scores))


def test_the_search_is_complete_where_twenty_by_twenty_is_not():
    """The best pair may have an end that is only the 21st of all ends."""
    scores = torch.zeros(50, 2)
    scores[:30, 1] = torch.arange(30) * 0.01 + 1  # ends before the start
    scores[40, 0], scores[41, 1] = 9, 0.5
    origins = [(i, i + 1, True) for i in range(50)]
    (best, start, end), *_ = span_candidates(scores, origins, 5, 20)
    assert (best, start, end) == (9.5, 40, 42)
    features = [(*scores.numpy().T, [o[:2] for o in origins], [True] * 50)]
    assert their_choice(features, None, 5, 20)[0] != (40, 42)
    assert their_choice(features, None, 5, 50)[0] == (40, 42)


DATA = Path(
    os.environ.get("BERTNB_DATA", Path(__file__).parents[3] / "shared/data")
)


@pytest.mark.parametrize(
    ("language", "vocabulary", "longest", "lost"),
    [("en", "bert-base-uncased", 30, 1), ("zh", "bert-base-chinese", 99, 0)],
)
def test_marked_answers_come_back_as_they_stand(
    language, vocabulary, longest, lost
):
    """Through rows, windows and offsets; one English answer ends in a token."""
    file = DATA / "xquad" / f"xquad.{language}.json"
    pieces = DATA / "vocabs" / f"{vocabulary}-vocab.txt"
    if not file.is_file() or not pieces.is_file():
        pytest.skip(f"no {file}: set BERTNB_DATA to the folder of real data")
    words = pieces.read_text("utf-8").removesuffix("\n").split("\n")
    tokenizer = WordPieceTokenizer({word: i for i, word in enumerate(words)})
    examples = read_questions(file)
    task = QuestionAnswering(max_answer_length=longest)
    rows = task.rows(examples, tokenizer, 256)
    logits = [torch.zeros(len(row.input_ids), 2) for row in rows]
    for row, scores in zip(rows, logits, strict=True):
        scores[row.targets["start_positions"], 0] = 9
        scores[row.targets["end_positions"], 1] = 9
    found = task.decode(examples, rows, logits)
    wrong = [
        (answer["answer"], example.answers[0].text)
        for answer, example in zip(found, examples, strict=True)
        if answer["answer"] != example.answers[0].text
    ]
    assert len(examples) == 1190
    assert len(wrong) == lost, wrong
