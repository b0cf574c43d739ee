import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb.configuration import BertConfig
from bertnb.next_sentence import (
    IS_NEXT,
    NOT_NEXT,
    BertForNextSentencePrediction,
    accuracy_interval,
    next_sentence_loss,
    sample_pairs,
    truncate_pair,
)

LN2 = 0.6931472
sizes = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    min_size=2,
    max_size=6,
)


def painted(sizes):
    """Documents whose tokens say their document and their place in it."""
    documents = []
    for number, lengths in enumerate(sizes):
        places = iter(range(number * 10_000, (number + 1) * 10_000))
        documents.append([[next(places) for _ in range(n)] for n in lengths])
    return documents


def home(token):
    return token // 10_000


def consecutive(segment):
    return segment == list(range(segment[0], segment[0] + len(segment)))


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(2, 40), st.integers(0, 99))
def test_half_are_strangers_from_another_document_and_all_fit(
    sizes, max_tokens, seed
):
    pairs = sample_pairs(painted(sizes), max_tokens, random.Random(seed))
    labels = Counter(p.label for p in pairs)
    assert labels[NOT_NEXT] == len(pairs) // 2
    assert labels[IS_NEXT] == len(pairs) - len(pairs) // 2
    for p in pairs:
        assert p.first
        assert p.second
        assert len(p.first) + len(p.second) <= max_tokens
        assert consecutive(p.first)
        assert consecutive(p.second)
        same = home(p.first[0]) == home(p.second[0])
        assert same == (p.label == IS_NEXT)
        if p.label == IS_NEXT:
            assert p.first[-1] < p.second[0]


def test_without_a_limit_a_document_is_one_pair_cut_between_sentences():
    documents = painted([[2, 3, 4], [5, 1]])
    starts = {s[0] for d in documents for s in d}
    cuts = set()
    for seed in range(40):
        pairs = sample_pairs(documents, 1000, random.Random(seed))
        assert len(pairs) == 2
        (p,) = (p for p in pairs if p.label == IS_NEXT)
        document = documents[home(p.first[0])]
        assert p.first + p.second == [t for s in document for t in s]
        assert p.second[0] in starts
        cuts.add(p.second[0])
    assert cuts == {2, 5, 10_005}  # every place between two sentences


def test_groups_end_when_the_row_is_full_and_use_every_sentence_once():
    documents = painted([[3] * 10, [3] * 10])  # groups of 12, 12 and 6 tokens
    pairs = sample_pairs(documents, 12, random.Random(0))
    assert len(pairs) == 6
    firsts = sorted(p.first[0] % 10_000 for p in pairs)
    assert firsts == [0, 0, 12, 12, 24, 24]


def test_a_stranger_fills_the_row_and_leaves_the_first_segment_whole():
    documents = painted([[1] * 60, [1] * 400])
    for seed in range(10):
        for p in sample_pairs(documents, 10, random.Random(seed)):
            assert p.first[0] % 10 == 0  # nothing was cut off
            at_the_end = p.second[-1] in (59, 10_399)
            assert len(p.first) + len(p.second) == 10 or at_the_end


def test_strangers_come_from_every_other_document_and_every_sentence():
    documents = painted([[1] * 9, [1] * 9, [1] * 9])
    routes, starts = set(), set()
    for seed in range(150):
        for p in sample_pairs(documents, 3, random.Random(seed)):
            if p.label == NOT_NEXT:
                routes.add((home(p.first[0]), home(p.second[0])))
                starts.add(p.second[0])
    assert routes == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert starts == {token for d in documents for (token,) in d}


def test_lengths_do_not_betray_the_label():
    dice = random.Random(0)
    documents = [
        [[0] * dice.randint(4, 40) for _ in range(100)] for _ in range(60)
    ]
    pairs = sample_pairs(documents, 61, random.Random(1))
    seen = Counter((len(p.first) // 8, p.label) for p in pairs[::2])
    said = [
        seen[len(p.first) // 8, 1] > seen[len(p.first) // 8, 0] for p in pairs
    ]
    right = sum(g == p.label for g, p in zip(said, pairs, strict=True))
    assert right / len(pairs) < 0.56


def test_labels_and_documents_are_shuffled():
    pairs = sample_pairs(painted([[1] * 400] * 2), 4, random.Random(0))
    labels = [p.label for p in pairs]
    changes = sum(a != b for a, b in pairwise(labels))
    assert 0.35 < changes / len(labels) < 0.65
    first_half = [home(p.first[0]) for p in pairs[: len(pairs) // 2]]
    assert 0.3 < sum(first_half) / len(first_half) < 0.7


def test_the_strangers_are_drawn_from_all_documents():
    pairs = sample_pairs(painted([[1] * 400] * 2), 4, random.Random(0))
    replaced = [home(p.first[0]) for p in pairs if p.label == NOT_NEXT]
    assert 0.35 < sum(replaced) / len(replaced) < 0.65


def test_the_generator_decides_everything():
    documents = painted([[3, 4, 5, 6]] * 5)
    one, same, other = (
        sample_pairs(documents, 12, random.Random(s)) for s in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_sampling_leaves_the_documents_as_they_are():
    documents = painted([[9, 9], [9, 9, 9]])
    sample_pairs(documents, 5, random.Random(0))
    assert documents == painted([[9, 9], [9, 9, 9]])


def test_empty_sentences_and_documents_are_left_out():
    documents = painted([[2, 2], [2, 2]])
    holed = [[], [documents[0][0], [], documents[0][1]], documents[1], [[]]]
    for seed in range(5):
        expected = sample_pairs(documents, 8, random.Random(seed))
        found = sample_pairs(holed, 8, random.Random(seed))
        assert [replace(p, documents=None) for p in found] == [
            replace(p, documents=None) for p in expected
        ]
        for p in found:  # numbers of the documents as they were given
            for segment, number in zip(
                (p.first, p.second), p.documents, strict=True
            ):
                assert segment[0] in [t for s in holed[number] for t in s]


@pytest.mark.parametrize(
    "documents", [[], [[[1], [2]]], [[[1], [2]], [], [[]]]]
)
def test_one_document_is_an_error_that_says_why(documents):
    with pytest.raises(
        ValueError, match=r"documents has [01] .*at least 2.*anoth"
    ):
        sample_pairs(documents, 8, random.Random(0))


def test_no_room_for_two_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"max_tokens=1: expected at least 2"):
        sample_pairs(painted([[1], [1]]), 1, random.Random(0))
    assert sample_pairs(painted([[1, 1]] * 2), 2, random.Random(0))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(2, 40),
    st.integers(0, 9),
)
def test_truncation_takes_from_the_longer_segment_only(a, b, room, seed):
    first, second = list(range(a)), list(range(100, 100 + b))
    short, other = truncate_pair(first, second, room, random.Random(seed))
    assert (first, second) == (list(range(a)), list(range(100, 100 + b)))
    assert consecutive(short)
    assert consecutive(other)
    assert len(short) + len(other) == min(a + b, room)
    assert len(short) >= min(a, room // 2)
    assert len(other) >= min(b, room // 2)


def test_truncation_takes_from_both_ends():
    fronts = [
        truncate_pair(list(range(100)), [0], 51, random.Random(s))[0][0]
        for s in range(50)
    ]
    assert 20 < sum(fronts) / len(fronts) < 30  # half of the 50 that went
    assert len(set(fronts)) > 5


def test_not_looking_costs_ln_2_and_certainty_costs_more():
    labels = torch.tensor([IS_NEXT, NOT_NEXT] * 8)
    undecided = next_sentence_loss(torch.zeros(16, 2), labels)
    assert undecided.item() == pytest.approx(LN2)
    for constant in ([-9.0, 9.0], [9.0, -9.0], [0.0, 1.0], [1.0, 0.0]):
        logits = torch.tensor([constant]).expand(16, 2)
        assert next_sentence_loss(logits, labels) > LN2 + 0.05


@pytest.mark.parametrize("label", [IS_NEXT, NOT_NEXT])
def test_each_label_sends_a_gradient(label):
    logits = torch.zeros(3, 2, requires_grad=True)
    next_sentence_loss(logits, torch.full((3,), label)).backward()
    assert (logits.grad.abs() > 0.1).all()


def test_zero_means_that_the_second_segment_follows():
    assert (IS_NEXT, NOT_NEXT) == (0, 1)
    sure_it_follows = torch.tensor([[9.0, -9.0]])
    assert next_sentence_loss(sure_it_follows, torch.tensor([0])) < 0.01
    assert next_sentence_loss(sure_it_follows, torch.tensor([1])) > 17


def test_a_label_of_minus_100_does_not_count():
    logits = torch.randn(3, 2, requires_grad=True)
    one = next_sentence_loss(logits, torch.tensor([-100, 1, -100]))
    assert torch.equal(one, next_sentence_loss(logits[1:2], torch.tensor([1])))
    none = next_sentence_loss(logits, torch.full((3,), -100))
    none.backward()
    assert none == 0
    assert not logits.grad.any()


def test_the_loss_is_float32_where_the_logits_are_not():
    logits = torch.randn(4, 2).bfloat16()
    labels = torch.tensor([0, 1, 0, 1])
    loss = next_sentence_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, next_sentence_loss(logits.float(), labels))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((3, 2), (2,)), ((3, 3), (3,)), ((3, 2, 2), (3, 2)), ((2,), ())],
)
def test_wrong_shapes_are_an_error_that_names_both(logits, labels):
    with pytest.raises(
        ValueError, match=r"logits has shape .*labels .*\(B, 2\)"
    ):
        next_sentence_loss(torch.zeros(logits), torch.zeros(labels).long())


@pytest.mark.parametrize("wrong", [2, -1])
def test_a_label_that_is_neither_is_an_error(wrong):
    with pytest.raises(
        ValueError, match=f"labels holds {wrong}; expected 0 to 1"
    ):
        next_sentence_loss(torch.zeros(2, 2), torch.tensor([0, wrong]))


def model():
    torch.manual_seed(0)
    return BertForNextSentencePrediction(
        BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
        )
    ).eval()


def test_padding_width_changes_nothing():
    bert = model()
    ids = torch.randint(1, 30, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    wide = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    wide_mask = torch.cat([mask, torch.zeros(2, 5, dtype=torch.long)], 1)
    a, b = bert(ids, mask).logits, bert(wide, wide_mask).logits
    assert torch.allclose(a, b, atol=1e-6)


def test_the_arguments_reach_the_encoder_in_their_order():
    bert = model()
    ids = torch.randint(1, 30, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    segments = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    places = torch.tensor([[3, 1, 2, 0, 5, 4]] * 2)
    output = bert(ids, mask, segments, places, None, True, True)
    assert output.loss is None
    encoded = bert.bert(ids, mask, segments, places, True, True)
    logits = bert.next_sentence(encoded.pooler_output)
    assert torch.equal(output.logits, logits)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert torch.equal(output.hidden_states[-1], encoded.last_hidden_state)
    assert torch.equal(output.attentions[0], encoded.attentions[0])
    assert bert(ids).hidden_states is None
    assert bert(ids).attentions is None


def test_the_head_starts_small_and_without_bias():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.05,
    )
    head = BertForNextSentencePrediction(config).next_sentence
    assert head.weight.shape == (2, 256)
    assert not head.bias.any()
    assert head.weight.abs().max() <= 0.1 + 1e-6  # cut at two deviations
    assert 0.035 < head.weight.std() < 0.05


def test_a_checkpoint_without_the_head_warns_and_loads(tmp_path):
    bert = model()
    bert.bert.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="cls.seq_relationship"):
        again = BertForNextSentencePrediction.from_pretrained(tmp_path)
    for a, b in zip(
        bert.bert.parameters(), again.bert.parameters(), strict=True
    ):
        assert torch.equal(a, b)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(1, 10_000))
def test_the_interval_holds_the_accuracy_and_stays_in_0_to_1(accuracy, trials):
    low, high = accuracy_interval(accuracy, trials)
    assert 0 <= low <= accuracy + 1e-12
    assert accuracy - 1e-12 <= high <= 1
    assert high - low > 0


def test_the_interval_of_all_or_nothing_ends_at_the_edge():
    for trials in range(1, 300):
        assert accuracy_interval(0.0, trials)[0] >= 0
        assert accuracy_interval(1.0, trials)[1] <= 1


def test_four_times_the_trials_halve_the_interval():
    narrow, wide = accuracy_interval(0.7, 4000), accuracy_interval(0.7, 1000)
    ratio = (wide[1] - wide[0]) / (narrow[1] - narrow[0])
    assert ratio == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("accuracy", "trials"), [(1.1, 5), (-0.1, 5), (0.5, 0)]
)
def test_an_impossible_accuracy_is_an_error(accuracy, trials):
    with pytest.raises(
        ValueError, match=f"accuracy={accuracy}, trials={trials}"
    ):
        accuracy_interval(accuracy, trials)
