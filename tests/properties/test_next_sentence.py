import itertools
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
    SAMPLERS,
    BertForNextSentencePrediction,
    Pair,
    accuracy_interval,
    lint_pairs,
    next_sentence_loss,
    original_pairs,
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


@pytest.mark.equation("9.1")
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


def test_a_stranger_is_the_second_segment_of_another_pair():
    documents = painted([[1] * 60, [1] * 400, [1] * 40])
    for seed in range(10):
        for p in sample_pairs(documents, 10, random.Random(seed)):
            if len(p.first) + len(p.second) < 10:  # nothing was cut off
                assert p.first[0] % 10 == 0  # a group starts
                assert p.second[-1] % 10 == 9  # a group ends


def test_a_stranger_is_about_as_long_as_the_true_second_segment():
    documents = painted([[1] * 3000, [1] * 3000])
    pairs = sample_pairs(documents, 20, random.Random(0))
    totals = [len(p.first) + len(p.second) for p in pairs if p.label]
    assert len(totals) == 150
    assert all(19 <= total <= 20 for total in totals)
    assert sum(total == 20 for total in totals) > 120


def test_strangers_come_from_every_other_document():
    documents = painted([[1] * 9, [1] * 9, [1] * 9])
    routes = set()
    for seed in range(150):
        for p in sample_pairs(documents, 3, random.Random(seed)):
            if p.label == NOT_NEXT:
                routes.add((home(p.first[0]), home(p.second[0])))
    assert routes == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_a_document_of_one_sentence_gives_strangers_only():
    documents = painted([[2] * 40, [3]])
    pairs = sample_pairs(documents, 8, random.Random(0))
    strangers = [p for p in pairs if p.label == NOT_NEXT]
    assert len(pairs) == 10
    assert all(p.second == documents[1][0] for p in strangers)
    assert all(home(p.first[0]) == 0 for p in pairs)


def test_a_segment_follows_as_often_as_it_is_a_stranger():
    dice = random.Random(0)
    documents = painted([[3] * dice.choice([40, 400]) for _ in range(60)])
    drawn = [
        p
        for seed in range(8)
        for p in sample_pairs(documents, 40, random.Random(seed))
    ]
    small = [p for p in drawn if len(documents[p.documents[1]]) == 40]
    assert len(small) > 500
    assert abs(sum(p.label for p in small) / len(small) - 0.5) < 0.07


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(2, 40), st.integers(0, 99))
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pair_says_its_documents(name, sizes, max_tokens, seed):
    documents = [[], *painted(sizes), [[]]]
    for p in SAMPLERS[name](documents, max_tokens, random.Random(seed)):
        assert p.documents == (home(p.first[0]) + 1, home(p.second[0]) + 1)


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


# The sampler of the original


def test_there_are_two_samplers_by_name():
    assert list(SAMPLERS) == ["exact", "original"]
    assert SAMPLERS["exact"] is sample_pairs
    assert SAMPLERS["original"] is original_pairs


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(2, 40), st.integers(0, 99))
def test_the_original_uses_every_first_sentence_once_and_all_fit(
    sizes, max_tokens, seed
):
    documents = painted(sizes)
    pairs = original_pairs(documents, max_tokens, random.Random(seed))
    used = [t for p in pairs for t in p.first]
    used += [t for p in pairs if p.label == IS_NEXT for t in p.second]
    assert len(used) == len(set(used))  # nothing is used twice, but strangers
    for p in pairs:
        assert p.first
        assert p.second
        assert len(p.first) + len(p.second) <= max_tokens
        assert consecutive(p.first)
        assert consecutive(p.second)
        if p.label == IS_NEXT:
            assert home(p.first[0]) == home(p.second[0])
            assert p.first[-1] < p.second[0]


def test_unused_sentences_are_put_back():
    documents = painted([[1] * 2000, [1] * 2000])
    pairs = original_pairs(documents, 10, random.Random(0), 0)
    taken = Counter(t for p in pairs for t in p.first)
    taken.update(t for p in pairs if p.label == IS_NEXT for t in p.second)
    assert taken == Counter(t for d in documents for (t,) in d)


def test_a_chunk_of_one_sentence_is_always_random():
    documents = painted([[9] * 50, [9] * 50])
    pairs = original_pairs(documents, 8, random.Random(0), 0)
    assert [p.label for p in pairs] == [NOT_NEXT] * 100  # google-research#125


def test_a_chunk_of_several_sentences_is_random_by_a_coin():
    documents = painted([[1] * 4000] * 3)
    pairs = original_pairs(documents, 10, random.Random(0), 0)
    share = sum(p.label for p in pairs) / len(pairs)
    assert abs(share - 0.5) < 3.3 * 0.5 / len(pairs) ** 0.5 + 3 / len(pairs)


def test_the_share_of_random_pairs_is_one_plus_the_single_ones_by_two():
    documents = painted([[9, 4, 4] * 500] * 6)  # every third fills the row
    pairs = original_pairs(documents, 8, random.Random(0), 0)
    alone = {t for d in documents for s in d if len(s) == 9 for t in s}
    alone |= {t for d in documents for t in d[-1]}
    single = sum(p.first[0] in alone for p in pairs) / len(pairs)
    share = sum(p.label for p in pairs) / len(pairs)
    assert single > 0.3
    assert abs(share - (1 + single) / 2) < 0.02


def test_the_first_segment_has_any_number_of_sentences_but_all():
    documents = painted([[1] * 5000, [1] * 5000])
    pairs = original_pairs(documents, 5, random.Random(0), 0)
    cuts = Counter(len(p.first) for p in pairs)
    assert set(cuts) == {1, 2, 3, 4}
    assert max(cuts.values()) < 1.2 * min(cuts.values())


def test_one_document_gives_strangers_from_itself_under_label_1():
    documents = painted([[2] * 200])
    pairs = original_pairs(documents, 12, random.Random(0))
    assert 0.3 < sum(p.label for p in pairs) / len(pairs) < 0.8
    assert all(p.documents == (0, 0) for p in pairs)


def test_ten_draws_look_for_another_document():
    documents = painted([[9]] * 2)  # two pairs a run, both random
    own = sum(
        p.documents[0] == p.documents[1]
        for seed in range(4000)
        for p in original_pairs(documents, 9, random.Random(seed), 0)
    )
    assert 1 <= own <= 20  # 8,000 pairs, of which one in 1,024

    class Stubborn(random.Random):
        """Counts the draws, which all give the second of two documents."""

        drawn = 0

        def randrange(self, *bounds):
            self.drawn += bounds == (2,)
            return bounds[0] - 1

    rng = Stubborn(0)
    pairs = original_pairs(documents, 9, rng, 0)
    assert rng.drawn == 11  # ten for the second document, one for the first
    assert sorted(p.documents[0] == p.documents[1] for p in pairs) == [0, 1]


def test_a_short_document_aims_at_2_to_max_tokens():
    documents = painted([[1] * 600] * 80)
    pairs = original_pairs(documents, 30, random.Random(0), 1.0)
    aims = {}
    for p in pairs:
        if p.label == IS_NEXT and p.second[-1] % 10_000 != 599:
            total = len(p.first) + len(p.second)
            assert aims.setdefault(p.documents[0], total) == total
    assert min(aims.values()) <= 4
    assert max(aims.values()) >= 29
    assert 12 < sum(aims.values()) / len(aims) < 20
    full = original_pairs(documents, 30, random.Random(0), 0.0)
    followers = [p for p in full if p.label == IS_NEXT]
    long = [p for p in followers if p.second[-1] % 10_000 != 599]
    assert all(len(p.first) + len(p.second) == 30 for p in long)


def test_one_document_in_ten_is_short_by_default():
    documents = painted([[1] * 40] * 1200)
    pairs = original_pairs(documents, 10, random.Random(0))
    short = {
        p.documents[0]
        for p in pairs
        if p.label == IS_NEXT
        and p.second[-1] % 10_000 != 39
        and len(p.first) + len(p.second) < 10
    }
    assert 0.06 < len(short) / 1200 < 0.12  # 0.1 * 8/9


@pytest.mark.parametrize("short", [-0.1, 1.1])
def test_a_share_of_short_pairs_outside_0_to_1_is_an_error(short):
    with pytest.raises(ValueError, match=f"short_seq_prob={short}: expected 0"):
        original_pairs(painted([[1]]), 4, random.Random(0), short)


def test_the_original_needs_a_text_and_room():
    with pytest.raises(ValueError, match=r"documents has none with text"):
        original_pairs([[], [[]]], 4, random.Random(0))
    with pytest.raises(ValueError, match=r"max_tokens=1: expected at least 2"):
        original_pairs(painted([[1]]), 1, random.Random(0))


def test_a_sentence_of_a_hundred_thousand_tokens_is_cut_in_linear_time():
    documents = [[[i] * 100_000] * 3 for i in range(2)]
    first, _ = truncate_pair([0] * 200_000, [1], 61, random.Random(0))
    assert len(first) == 60
    for sampler in SAMPLERS.values():
        assert sampler(documents, 61, random.Random(0))


# The linter


TOKENS = itertools.count()


def plain(label, first=5, second=5, documents=None):
    segments = ([next(TOKENS) for _ in range(n)] for n in (first, second))
    return Pair(*segments, label, documents)


def healthy(n=2000):
    dice = random.Random(0)
    pairs = []
    for i in range(n):
        a, b = dice.sample(range(9), 2)
        sizes = dice.randint(1, 30), dice.randint(1, 30)
        pairs.append(plain(i % 2, *sizes, (a, b if i % 2 else a)))
    return pairs


def test_healthy_pairs_give_no_warning():
    report = lint_pairs(healthy())
    assert report.warnings == {}
    assert report.pairs == 2000
    assert report.not_next == report.cross_document == 0.5
    assert report.same_document_strangers == 0
    assert report.two_document_followers == 0
    assert report.duplicates == report.empty == 0


@pytest.mark.parametrize("max_tokens", [12, 40])
def test_our_own_sampler_passes_the_linter(max_tokens):
    dice = random.Random(1)
    documents = painted(
        [[dice.randint(1, 20) for _ in range(dice.choice([9, 90, 300]))]] * 1
        + [
            [dice.randint(1, 20) for _ in range(dice.choice([9, 90, 300]))]
            for _ in range(40)
        ]
    )
    report = lint_pairs(sample_pairs(documents, max_tokens, random.Random(0)))
    assert set(report.warnings) <= {"duplicates"}
    assert report.same_document_strangers == 0
    assert abs(report.not_next - 0.5) <= 0.5 / report.pairs


def test_all_labels_equal_is_found():  # google-research/bert#125
    report = lint_pairs([replace(p, label=NOT_NEXT) for p in healthy()])
    assert report.not_next == 1
    assert {"not_next", "same_document_strangers"} == set(report.warnings)
    assert report.length_accuracy is None
    assert report.document_accuracy is None
    followers = lint_pairs([replace(p, label=IS_NEXT) for p in healthy()])
    assert {"not_next", "two_document_followers"} == set(followers.warnings)
    assert followers.two_document_followers == 1000


def test_a_stranger_from_the_same_document_is_found():
    pairs = healthy()
    pairs[1] = replace(pairs[1], documents=(4, 4))
    report = lint_pairs(pairs)
    assert report.same_document_strangers == 1
    assert report.cross_document == 999 / 2000
    assert set(report.warnings) == {"same_document_strangers"}


def test_a_length_that_tells_the_label_is_found():
    tall = [replace(p, second=p.second + p.label * [0] * 8) for p in healthy()]
    report = lint_pairs(tall)
    assert set(report.warnings) == {"length_accuracy"}
    assert 0.6 < report.length_accuracy < 0.7
    long = [replace(p, first=p.first + p.label * [0] * 8) for p in healthy()]
    assert "length_accuracy" in lint_pairs(long).warnings
    sums = [plain(i % 2, 1 + i % 30, 30 - i % 30 - i % 2) for i in range(2000)]
    found = lint_pairs(sums).length_accuracy
    assert found == pytest.approx(1)  # by their sum only


def test_a_document_that_tells_the_label_is_found():
    dice = random.Random(0)
    pairs = [
        replace(p, documents=(9 + dice.randint(0, 1), 5 * p.label))
        if dice.random() < 0.3
        else p
        for p in healthy()
    ]
    report = lint_pairs(pairs)
    assert "document_accuracy" in report.warnings
    assert 0.55 < report.document_accuracy < 0.8
    told = [plain(i % 2, documents=(7, i % 2)) for i in range(100)]
    assert lint_pairs(told).document_accuracy == 1


def test_documents_are_judged_on_pairs_that_did_not_vote():
    pairs = [plain(i % 2, documents=(-1, i)) for i in range(1000)]
    assert lint_pairs(pairs).document_accuracy == 0.5  # never met before


def test_copies_and_empty_segments_are_found():
    pairs = healthy(200)
    copied = lint_pairs(pairs + pairs[:3])
    assert copied.duplicates == 3
    assert set(copied.warnings) == {"duplicates"}
    assert lint_pairs(pairs + pairs[:2]).warnings == {}
    moved = replace(pairs[0], first=[1, 2], second=[3])
    other = replace(pairs[0], first=[1], second=[2, 3])
    assert lint_pairs([moved, other]).duplicates == 0
    holed = [replace(pairs[0], first=[]), replace(pairs[1], second=[])]
    report = lint_pairs(holed + pairs[2:])
    assert report.empty == 2
    assert set(report.warnings) == {"empty"}


def test_a_small_imbalance_is_chance_and_a_large_one_is_not():
    pairs = healthy(1000)
    assert "not_next" not in lint_pairs(pairs + pairs[1:60:2]).warnings
    for label in (0, 1):
        more = [plain(label) for _ in range(130)]
        assert "not_next" in lint_pairs(pairs + more).warnings


def test_pairs_without_documents_are_judged_by_the_rest():
    pairs = [replace(p, documents=None) for p in healthy()]
    report = lint_pairs(pairs)
    assert report.warnings == {}
    assert report.cross_document is None
    assert report.same_document_strangers is None
    assert report.two_document_followers is None
    assert report.document_accuracy is None
    assert report.length_accuracy < 0.55
    assert lint_pairs([healthy()[0], *pairs]).cross_document is None


def test_a_report_reads_as_a_table_with_its_warnings():
    pairs = [replace(p, documents=None, label=1) for p in healthy()]
    lines = str(lint_pairs(pairs)).splitlines()
    assert lines[0].split() == ["pairs", "2,000"]
    assert lines[1].split() == ["not_next", "100.0%"]
    assert lines[2].split() == ["cross_document", "not", "known"]
    assert lines[-1].startswith("WARNING not_next: the labels are not equally")
    assert len(lines) == 10


@pytest.mark.parametrize("pairs", [[], [plain(2)], [plain(0), plain(-100)]])
def test_no_pairs_and_other_labels_are_an_error(pairs):
    with pytest.raises(ValueError, match=rf"pairs has {len(pairs)} .*0 and 1"):
        lint_pairs(pairs)


# The loss and the model


@pytest.mark.equation("9.5")
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


def test_the_pairs_of_packed_rows_count_alike():
    logits, labels = torch.randn(2, 3, 2), torch.tensor([[0, 1, 1], [1, 0, 0]])
    packed = next_sentence_loss(logits, labels)
    plain = next_sentence_loss(logits.flatten(0, 1), labels.flatten())
    assert torch.equal(packed, plain)
    labels[1, 1:] = -100
    packed = next_sentence_loss(logits, labels)
    plain = next_sentence_loss(logits.flatten(0, 1)[:4], labels.flatten()[:4])
    torch.testing.assert_close(packed, plain)


def test_the_loss_is_float32_where_the_logits_are_not():
    logits = torch.randn(4, 2).bfloat16()
    labels = torch.tensor([0, 1, 0, 1])
    loss = next_sentence_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, next_sentence_loss(logits.float(), labels))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ((3, 2), (2,)),
        ((3, 3), (3,)),
        ((3, 4, 2), (3,)),
        ((3, 4, 2), (3, 3)),
        ((1, 3, 4, 2), (1, 3, 4)),
        ((2,), ()),
    ],
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
