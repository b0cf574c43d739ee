"""What must hold for masking, the head and the loss, whatever the numbers."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertnb.configuration import BertConfig
from bertnb.masked_lm import (
    IGNORE,
    BertForMaskedLM,
    MaskedLMHead,
    check_targets,
    continuation_table,
    draw_positions,
    draw_words,
    mask_tokens,
    masked_lm_loss,
    mean_cross_entropy,
    pseudo_log_likelihood,
    replace_tokens,
)
from bertnb.tokenization import WordPieceTokenizer

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
PAD, CLS, SEP, MASK = 0, 2, 3, 4


def rows(seed, batch=4, length=24, words=90):
    """[CLS] a [SEP] b [SEP] and padding; ordinary ids are 5 to 99."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 5 + words, (batch, length), generator=generator)
    ids[:, 0] = CLS
    for row in range(batch):
        n = int(torch.randint(3, length + 1, (), generator=generator))
        ids[row, n // 2] = SEP
        ids[row, n - 1] = SEP
        ids[row, n:] = PAD
    return ids, (ids == PAD) | (ids == CLS) | (ids == SEP)


def mask(ids, special, seed=0, **options):
    options = {"vocab_size": 100, "mask_token_id": MASK, **options}
    generator = torch.Generator().manual_seed(seed)
    return mask_tokens(ids, special, generator=generator, **options)


# what mask_tokens promises


@few
@given(
    seeds,
    st.floats(0.01, 1.0),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_places_are_ordinary_tokens_in_order_and_targets_are_theirs(
    seed, rate, limit
):
    ids, special = rows(seed)
    before = ids.clone()
    masked, positions, targets = mask(
        ids, special, seed, mlm_probability=rate, max_predictions=limit
    )
    assert torch.equal(ids, before)
    slots = limit or max(1, round(rate * 24))
    assert positions.shape == targets.shape == (4, slots)  # P is static
    assert masked.shape == ids.shape
    assert masked.dtype == positions.dtype == targets.dtype == torch.int64
    for row in range(4):
        real = targets[row] != IGNORE
        k = int(real.sum())
        assert real[:k].all()  # the real ones first, then the filling
        assert (positions[row, k:] == 0).all()
        chosen = positions[row, :k].tolist()
        assert chosen == sorted(set(chosen))
        assert not special[row, chosen].any()
        assert torch.equal(targets[row, :k], ids[row, chosen])
        n = int((ids[row] != PAD).sum())
        ordinary = int((~special[row]).sum())
        assert k == min(max(1, round(rate * n)), slots, ordinary)
        rest = [i for i in range(24) if i not in chosen]
        assert torch.equal(masked[row, rest], ids[row, rest])
    assert (masked >= 0).all()
    assert (masked < 100).all()


def test_a_row_of_special_tokens_is_left_alone():
    ids = torch.tensor([[CLS, SEP, SEP, PAD], [CLS, 9, SEP, PAD]])
    masked, positions, targets = mask(ids, ids != 9, max_predictions=2)
    assert torch.equal(masked[0], ids[0])
    assert positions.tolist() == [[0, 0], [1, 0]]
    assert targets.tolist() == [[IGNORE, IGNORE], [9, IGNORE]]


def test_more_places_than_tokens_are_filled():
    ids = torch.tensor([[CLS, 7, 8, SEP]])
    options = {"mlm_probability": 1.0, "max_predictions": 9}
    _, positions, targets = mask(ids, ids < 5, **options)
    assert positions.tolist() == [[1, 2] + [0] * 7]
    assert targets.tolist() == [[7, 8] + [IGNORE] * 7]


def test_the_same_generator_gives_the_same_masks_and_another_others():
    ids, special = rows(1)
    first, again, other = (mask(ids, special, s) for s in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_without_a_generator_torchs_own_seed_counts():
    ids, special = rows(2)
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(
            mask_tokens(ids, special, vocab_size=100, mask_token_id=MASK)
        )
    first, again = results
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def within(count, total, share, sigmas=4.5):
    return abs(count / total - share) < sigmas * math.sqrt(
        share * (1 - share) / total
    )


def test_shares_are_80_10_10_and_random_words_cover_the_vocabulary():
    """The batch holds one word only; random ones come from the whole vocabulary."""
    size, word = 40, 5
    ids = torch.full((64, 512), word)
    masked, positions, targets = mask(
        ids, ids == 0, vocab_size=size, mlm_probability=0.25
    )
    assert (targets == word).all()
    assert targets.shape == (64, 128)
    shown = masked.gather(1, positions).flatten()
    n = len(shown)
    count = torch.bincount(shown, minlength=size)
    assert within(int(count[MASK]), n, 0.8 + 0.1 / size)
    assert within(int(count[word]), n, 0.1 + 0.1 / size)
    for other in range(size):
        if other not in (MASK, word):
            assert within(int(count[other]), n, 0.1 / size)


def test_every_ordinary_token_is_chosen_equally_often():
    ids = torch.arange(5, 25).expand(3000, 20)
    special = (ids == 5) | (ids == 24)
    _, positions, targets = mask(ids, special, mlm_probability=0.15)
    count = torch.bincount(positions[targets != IGNORE], minlength=20)
    assert count.sum() == 3 * 3000
    assert count[0] == count[19] == 0
    for place in range(1, 19):
        assert within(int(count[place]), 3000, 3 / 18)


def test_only_special_tokens_with_the_padding_id_are_padding():
    ids = torch.full((1, 20), PAD)  # an ordinary word that has the id 0
    none = torch.zeros_like(ids)
    _, _, targets = mask(ids, none, mlm_probability=0.5)
    assert (targets == PAD).sum() == 10
    half = none.clone()
    half[0, 10:] = 1
    _, _, targets = mask(ids, half, mlm_probability=0.5)
    assert (targets == PAD).sum() == 5
    _, _, targets = mask(ids, half, mlm_probability=0.5, pad_token_id=1)
    assert (targets == PAD).sum() == 10  # special, but tokens


def test_masks_of_0_and_1_are_masks():
    ids, special = rows(3)
    a, b = mask(ids, special), mask(ids, special.int())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@few
@given(seeds, st.integers(1, 12), st.integers(0, 12), st.integers(1, 16))
def test_draw_positions_keeps_its_count(seed, length, count, slots):
    generator = torch.Generator().manual_seed(seed)
    special = torch.rand(2, length, generator=generator) < 0.3
    places = draw_positions(
        special, torch.tensor([[count], [1]]), slots, generator
    )
    assert places.shape == (2, slots)
    assert torch.equal(places, places.sort().values)
    found = (places < length).sum(1)
    free = (~special).sum(1)
    expected = [min(count, slots, int(free[0])), min(1, slots, int(free[1]))]
    assert found.tolist() == expected


# several documents in a row


def documents(seed, length=60):
    """Rows of up to 4 documents of 3 or more tokens, then padding."""
    dice = random.Random(seed)
    ids = torch.full((4, length), PAD)
    homes = torch.zeros_like(ids)
    for row in range(4):
        start = 0
        for number in range(1, dice.randint(2, 5)):
            end = start + dice.randint(3, 14)
            ids[row, start:end] = torch.tensor(
                [
                    CLS,
                    *(dice.randint(5, 99) for _ in range(end - start - 2)),
                    SEP,
                ]
            )
            homes[row, start:end] = number
            start = end
    return ids, (ids == PAD) | (ids == CLS) | (ids == SEP), homes


@pytest.mark.equation("8.3")
@few
@given(seeds, st.floats(0.01, 1.0))
def test_each_document_of_a_row_gets_what_it_would_get_as_a_row(seed, rate):
    ids, special, homes = documents(seed)
    masked, positions, targets = mask(
        ids,
        special,
        seed,
        mlm_probability=rate,
        max_predictions=60,
        document_ids=homes,
    )
    assert positions.shape == (4, 60)
    for row in range(4):
        real = targets[row] != IGNORE
        chosen = positions[row][real]
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert torch.equal(targets[row][real], ids[row, chosen])
        assert not special[row, chosen].any()
        for number in range(1, int(homes[row].max()) + 1):
            here = homes[row] == number
            n, ordinary = int(here.sum()), int((here & ~special[row]).sum())
            found = int((homes[row, chosen] == number).sum())
            assert found == min(max(1, round(rate * n)), ordinary)
        kept = torch.ones(60, dtype=torch.bool)
        kept[chosen] = False
        assert torch.equal(masked[row][kept], ids[row][kept])


def test_every_token_of_a_document_is_chosen_equally_often():
    ids = torch.full((3000, 30), 9)
    homes = torch.tensor([3] * 10 + [1] * 20).expand(3000, 30)
    options = {"mlm_probability": 0.15, "max_predictions": 6}
    _, positions, targets = mask(ids, ids == PAD, document_ids=homes, **options)
    count = torch.bincount(positions[targets != IGNORE], minlength=30)
    assert count[:10].sum() == 2 * 3000  # round(1.5) is even
    assert count[10:].sum() == 3 * 3000
    for place in range(30):
        share = 2 / 10 if place < 10 else 3 / 20
        assert within(int(count[place]), 3000, share)


def test_a_row_that_is_one_document_is_masked_as_without_numbers():
    ids, special = rows(4)
    plain = mask(ids, special, max_predictions=5)
    one = torch.full_like(ids, 7)  # padding does not count, whatever its number
    again = mask(ids, special, max_predictions=5, document_ids=one)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_documents_that_need_more_than_p_share_what_there_is():
    ids = torch.full((2000, 20), 9)
    homes = torch.arange(20).expand(2000, 20) // 5
    _, positions, targets = mask(
        ids, ids == PAD, max_predictions=2, document_ids=homes
    )
    assert (targets != IGNORE).all()  # 2 of the 4 that are wanted
    assert (
        homes.gather(1, positions)[:, 0] < homes.gather(1, positions)[:, 1]
    ).all()
    count = torch.bincount(homes.gather(1, positions).flatten(), minlength=4)
    assert all(within(int(c), 2000, 0.5) for c in count)


@pytest.mark.parametrize(
    "more", [{}, {"max_predictions": 3, "continuation_mask": torch.zeros(1, 9)}]
)
def test_documents_need_a_p_and_no_whole_words(more):
    ids = torch.full((1, 9), 9)
    with pytest.raises(ValueError, match="document_ids needs max_predictions"):
        mask(ids, ids == PAD, document_ids=torch.zeros_like(ids), **more)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"special": torch.zeros(2, 3)}, r"special_tokens_mask \(2, 3\)"),
        ({"ids": torch.zeros(4).long()}, r"input_ids has shape \(4,\)"),
        ({"mlm_probability": 0.0}, "mlm_probability=0.0"),
        ({"mlm_probability": 1.1}, "mlm_probability=1.1"),
        ({"mask_token_id": 100}, "mask_token_id=100.*vocab_size=100"),
        ({"mask_token_id": -1}, "mask_token_id=-1"),
        ({"max_predictions": 0}, "max_predictions=0"),
        (
            {"continuation_mask": torch.zeros(4)},
            r"input_ids has shape \(2, 4\) and continuation_mask \(4,\)",
        ),
        (
            {"document_ids": torch.zeros(4).long(), "max_predictions": 1},
            r"input_ids has shape \(2, 4\) and document_ids \(4,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(change, words):
    ids = change.pop("ids", torch.full((2, 4), 9))
    special = change.pop("special", torch.zeros_like(ids))
    with pytest.raises(ValueError, match=words):
        mask(ids, special, **change)


@pytest.mark.equation("8.4")
def test_a_million_words_are_replaced_80_10_10():
    """One draw decides: 81/10/9 of two independent ones would be seen."""
    words, size = 1_000_000, 50
    ids = torch.full((words,), 7)
    generator = torch.Generator().manual_seed(0)
    shown = replace_tokens(ids, size, MASK, generator)
    count = torch.bincount(shown, minlength=size)
    assert within(int(count[MASK]), words, 0.8 + 0.1 / size)
    assert within(int(count[7]), words, 0.1 + 0.1 / size)
    for other in set(range(size)) - {MASK, 7}:  # specials and [unused] too
        assert within(int(count[other]), words, 0.1 / size)
    assert not within(int(count[MASK]), words, 0.81)
    assert not within(int(count[7]), words, 0.09)


@pytest.mark.equation("8.10")
def test_a_visible_word_is_to_be_trusted_as_far_as_bayes_says():
    size, q = 12, torch.tensor([0.5, 0.3, 0.15, 0.05])  # of the words 5 to 8
    generator = torch.Generator().manual_seed(1)
    words = 5 + q.multinomial(1_000_000, replacement=True, generator=generator)
    shown = replace_tokens(words, size, MASK, generator)
    for i in range(4):
        seen = shown == 5 + i
        kept = int((words[seen] == 5 + i).sum())
        p = (size + 1) * q[i].item() / (size * q[i].item() + 1)
        assert within(kept, int(seen.sum()), p)


@pytest.mark.parametrize("whole", [False, True])
def test_of_a_million_positions_no_special_one_is_chosen(whole):
    ids = torch.cat([rows(seed, 2000, 128)[0] for seed in range(4)])
    assert ids.numel() > 1_000_000
    special = ids < 5
    continues = (ids % 3 == 0) if whole else None
    masked, positions, targets = mask(ids, special, continuation_mask=continues)
    real = targets != IGNORE
    assert not (targets[real] < 5).any()
    assert not special.gather(1, positions)[real].any()
    assert torch.equal(masked[special], ids[special])
    tokens = (ids != PAD).sum(1).tolist()
    wanted = torch.tensor([max(1, round(0.15 * n)) for n in tokens])
    ordinary = (~special).sum(1)
    chosen = real.sum(1)
    if whole:
        assert (chosen <= wanted).all()
    else:
        assert torch.equal(chosen, wanted.minimum(ordinary))
    n = int(real.sum())
    shown = masked.gather(1, positions)[real]
    assert within(int((shown == MASK).sum()), n, 0.8 + 0.1 / 100)
    assert within(int((shown == targets[real]).sum()), n, 0.1 + 0.1 / 100)


def test_random_words_are_not_drawn_from_the_batch():
    """The batch holds the ids 5 to 9; what replaces them has all 100."""
    ids = torch.randint(5, 10, (64, 512))
    masked, positions, targets = mask(ids, ids == 0, mlm_probability=0.9)
    shown = masked.gather(1, positions)
    new = shown[(shown != targets) & (shown != MASK)]
    assert set(new.tolist()) == set(range(100)) - {MASK}


def test_the_share_of_real_tokens_is_a_little_over_15_percent():
    """The frame counts for n, but is never hidden: 15.2 to 15.4 %."""
    ids = torch.full((1, 128), 9)
    ids[0, 0], ids[0, 60], ids[0, 127] = CLS, SEP, SEP
    _, _, targets = mask(ids, ids < 5)
    share = int((targets != IGNORE).sum()) / 125
    assert 0.152 <= share <= 0.154


# whole words


def words_of(continues, special):
    """The places of each word of a row, in plain Python."""
    words = []
    for i in range(len(special)):
        if special[i]:
            continue
        if words and continues[i]:
            words[-1].append(i)
        else:
            words.append([i])
    return words


@few
@given(
    seeds,
    st.floats(0.0, 0.9),
    st.floats(0.01, 1.0),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_words_are_whole_and_as_many_as_fit(seed, long, rate, limit):
    ids, special = rows(seed)
    generator = torch.Generator().manual_seed(seed)
    continues = torch.rand(ids.shape, generator=generator) < long
    options = {"mlm_probability": rate, "max_predictions": limit}
    result = mask(ids, special, seed, continuation_mask=continues, **options)
    again = mask(
        ids, special, seed, continuation_mask=continues.int(), **options
    )
    for one, two in zip(result, again, strict=True):
        assert torch.equal(one, two)
    masked, positions, targets = result
    slots = limit or max(1, round(rate * 24))
    assert positions.shape == targets.shape == (4, slots)
    for row in range(4):
        k = int((targets[row] != IGNORE).sum())
        chosen = positions[row, :k].tolist()
        assert chosen == sorted(set(chosen))
        assert torch.equal(targets[row, :k], ids[row, chosen])
        rest = [i for i in range(24) if i not in chosen]
        assert torch.equal(masked[row, rest], ids[row, rest])
        n = int((ids[row] != PAD).sum())
        budget = min(max(1, round(rate * n)), slots)
        assert k <= budget
        for word in words_of(continues[row], special[row]):
            inside = sum(i in chosen for i in word)
            assert inside in (0, len(word))  # whole, or not at all
            if not inside:
                assert len(word) > budget - k  # it would not have fitted


def test_words_of_one_token_are_chosen_to_the_exact_count():
    ids, special = rows(5)
    alone = torch.zeros_like(ids)
    for rate in (0.15, 0.5, 1.0):
        _, _, tokens = mask(ids, special, mlm_probability=rate)
        _, _, words = mask(
            ids, special, mlm_probability=rate, continuation_mask=alone
        )
        counts = [(t != IGNORE).sum(1) for t in (tokens, words)]
        assert torch.equal(*counts)


def test_every_word_has_the_same_chance_where_all_are_alike():
    special = torch.zeros(6000, 12, dtype=torch.bool)
    special[:, [0, 11]] = True
    continues = (torch.arange(12) % 2 == 0).expand(6000, 12)  # pairs
    places = draw_words(
        special,
        continues,
        torch.full((6000, 1), 4),
        9,
        torch.Generator().manual_seed(0),
    )
    count = torch.bincount(places.flatten(), minlength=13)
    assert count[0] == count[11] == 0
    assert count[12] == 6000 * 5  # empty places
    for place in range(1, 11):
        assert within(int(count[place]), 6000, 2 / 5)


def test_each_piece_of_a_word_has_its_own_80_10_10():
    ids = torch.full((20_000, 4), 9)
    ids[:, 0], ids[:, 3] = CLS, SEP  # one word of two pieces
    continues = torch.tensor([[False, False, True, False]]).expand_as(ids)
    masked, _, targets = mask(
        ids, ids < 5, mlm_probability=0.5, continuation_mask=continues
    )
    assert (targets == 9).all()
    both = (masked[:, 1:3] == MASK).all(1).sum()
    assert within(int(both), 20_000, 0.801**2)


def test_a_piece_behind_a_special_token_joins_the_word_before_it():
    """As in the original: only the last word counts, not the frame."""
    ids = torch.tensor([[CLS, 7, SEP, 8, SEP]])
    continues = ids == 8
    for seed in range(10):
        _, positions, targets = mask(
            ids,
            ids < 5,
            seed,
            mlm_probability=0.4,
            continuation_mask=continues,
        )
        assert positions.tolist() == [[1, 3]]
        assert targets.tolist() == [[7, 8]]


def test_a_piece_that_opens_a_row_is_a_word():
    ids = torch.tensor([[CLS, 7, 8, 9, SEP]])
    continues = (ids == 7) | (ids == 8)
    seen = set()
    for seed in range(20):
        _, positions, targets = mask(
            ids, ids < 5, seed, mlm_probability=0.4, continuation_mask=continues
        )
        k = int((targets != IGNORE).sum())
        seen.add(tuple(positions[0, :k].tolist()))
    assert seen == {(1, 2), (3,)}


def test_a_row_whose_words_are_all_too_long_has_nothing_hidden():
    ids = torch.tensor([[CLS, 7, 8, 9, SEP]])
    masked, positions, targets = mask(
        ids, ids < 5, continuation_mask=ids.ge(8), max_predictions=2
    )
    assert torch.equal(masked, ids)
    assert positions.tolist() == [[0, 0]]
    assert (targets == IGNORE).all()
    logits = torch.randn(1, 2, 100, requires_grad=True)
    loss = masked_lm_loss(logits, targets)  # not NaN
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_the_table_of_continuations_is_the_double_sharp():
    vocabulary = {"[PAD]": 0, "a": 1, "##a": 2, "#": 3, "##": 5, "a##": 4}
    table = continuation_table(vocabulary)
    assert table.dtype == torch.bool
    assert table.tolist() == [False, False, True, False, False, True]


def test_chinese_characters_are_words():
    tok = WordPieceTokenizer.train(["自然语言处理 unbelievable"], 60)
    table = continuation_table(tok.vocabulary)
    ids = tok(["自然语言处理"])["input_ids"]
    assert not table[ids].any()
    assert table[tok(["unbelievable believe"])["input_ids"]].any()


# what the loss promises


@pytest.mark.equation("8.5")
@few
@given(seeds)
def test_only_real_targets_count(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 7, generator=generator)
    targets = torch.randint(7, (2, 5), generator=generator)
    empty = torch.rand(2, 5, generator=generator) < 0.5
    empty[0, 0] = False
    targets[empty] = IGNORE
    loss = masked_lm_loss(logits, targets)
    other = logits.clone()
    other[empty] = 50 * torch.randn(int(empty.sum()), 7, generator=generator)
    assert torch.equal(masked_lm_loss(other, targets), loss)
    wider = torch.cat([logits, torch.randn(2, 3, 7, generator=generator)], 1)
    more = torch.nn.functional.pad(targets, (0, 3), value=IGNORE)
    torch.testing.assert_close(masked_lm_loss(wider, more), loss)
    # the mean over the words of the batch, not over rows
    real = targets != IGNORE
    flat = masked_lm_loss(logits[real], targets[real])
    torch.testing.assert_close(flat, loss)


def test_nothing_hidden_is_loss_0_with_gradient_0():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = masked_lm_loss(logits, torch.full((2, 3), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_padded_slots_do_not_teach_the_first_token_to_be_padding():
    """The slots of d2l-en#2582 hold position 0 and target 0, and no weight."""
    net = model()
    ids, special = rows(12)
    masked, positions, targets = mask(ids, special)
    bias = net.masked_lm.bias
    gradients = []
    for empty in (0, 5):
        places = torch.nn.functional.pad(positions, (0, empty))
        words = torch.nn.functional.pad(targets, (0, empty), value=IGNORE)
        loss = net(masked, masked_positions=places, labels=words).loss
        gradients.append(torch.autograd.grad(loss, bias)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0][PAD] > 0  # its score only falls


def test_the_loss_is_the_mean_over_the_batch_and_not_of_the_rows_means():
    torch.manual_seed(3)
    logits = torch.randn(2, 4, 9)
    targets = torch.tensor([[1, 2, 3, 4], [5, -100, -100, -100]])
    rows_means = [masked_lm_loss(logits[b], targets[b]) for b in (0, 1)]
    loss = masked_lm_loss(logits, targets)
    expected = (4 * rows_means[0] + rows_means[1]) / 5
    torch.testing.assert_close(loss, expected)
    assert (loss - sum(rows_means) / 2).abs() > 0.01


def test_any_classes_have_the_same_loss_and_their_own_name():
    torch.manual_seed(4)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 1])
    assert torch.equal(
        mean_cross_entropy(logits, labels, "labels"),
        masked_lm_loss(logits, labels),
    )
    with pytest.raises(ValueError, match="places holds 3; expected 0 to 2"):
        mean_cross_entropy(logits, labels + 1, "places")
    with pytest.raises(ValueError, match=r"places has shape \(4,\)"):
        mean_cross_entropy(logits, labels[:4], "places")
    with pytest.raises(TypeError, match="places has dtype"):
        mean_cross_entropy(logits, labels.int(), "places")


def test_sixteen_bits_are_summed_in_float32_and_float64_is_kept():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    for kind, result in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        loss = masked_lm_loss(logits.to(kind), targets)
        assert loss.dtype == result
        exact = masked_lm_loss(logits.to(kind).to(result), targets)
        assert torch.equal(loss, exact)


def test_the_best_constant_is_the_unigram_and_its_loss_the_entropy():
    words = torch.tensor([0, 0, 0, 1, 1, 2])
    f = torch.bincount(words).double() / 6
    bias = f.log().requires_grad_()
    loss = masked_lm_loss(bias.expand(6, 3), words)
    loss.backward()
    assert loss.item() == pytest.approx(-(f * f.log()).sum().item())
    assert bias.grad.abs().max() < 1e-12


def test_targets_are_checked_by_name():
    logits = torch.zeros(2, 3, 7)
    with pytest.raises(ValueError, match=r"targets has shape \(2, 4\)"):
        masked_lm_loss(logits, torch.zeros(2, 4).long())
    for wrong in (7, -1, -99):
        targets = torch.tensor([[0, 6, IGNORE], [0, 0, wrong]])
        with pytest.raises(ValueError, match=f"targets holds {wrong}; .* 6"):
            masked_lm_loss(logits, targets)
    check_targets(torch.tensor([0, 6, IGNORE]), "labels", 7)
    check_targets(torch.tensor([]).long(), "labels", 7)
    with pytest.raises(TypeError, match="labels has dtype"):
        check_targets(torch.tensor([1.0]), "labels", 7)
    with pytest.raises(ValueError, match="labels holds 7"):
        check_targets(torch.tensor([7]), "labels", 7)


# what the model promises


def model(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
    }
    return BertForMaskedLM(BertConfig(**{**sizes, **changes})).eval()


def test_the_fast_path_is_the_full_path():
    net = model(initializer_range=0.2)
    ids, special = rows(8)
    masked, positions, targets = mask(ids, special, max_predictions=6)
    full = net(masked, ids != PAD)
    fast = net(masked, ids != PAD, masked_positions=positions, labels=targets)
    assert fast.logits.shape == (4, 6, 100)
    assert full.logits.shape == (4, 24, 100)
    assert full.loss is None
    index = positions[..., None].expand(-1, -1, 100)
    torch.testing.assert_close(fast.logits, full.logits.gather(1, index))
    labels = torch.full_like(ids, IGNORE)
    for row in range(4):
        for place, word in zip(positions[row], targets[row], strict=True):
            if word != IGNORE:
                labels[row, place] = word
    whole = net(masked, ids != PAD, labels=labels)
    torch.testing.assert_close(fast.loss, whole.loss)
    grads = [
        torch.autograd.grad(out.loss, list(net.parameters()))
        for out in (fast, whole)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_width_changes_nothing():
    net = model(initializer_range=0.2)
    ids, special = rows(9)
    masked, positions, targets = mask(ids, special)
    wide = torch.nn.functional.pad(masked, (0, 9), value=17)
    narrow_loss = net(
        masked, ids != PAD, masked_positions=positions, labels=targets
    ).loss
    seen = torch.nn.functional.pad(ids != PAD, (0, 9))
    wide_loss = net(wide, seen, masked_positions=positions, labels=targets).loss
    torch.testing.assert_close(wide_loss, narrow_loss)


@pytest.mark.equation("8.7")
def test_the_table_is_one_and_learns_from_both_ends():
    net = model()
    names = [name for name, _ in net.named_parameters()]
    assert sum("word_embeddings" in name for name in names) == 1
    assert not any("decoder" in name for name in names)
    table = net.bert.embeddings.word_embeddings.weight
    ids = torch.tensor([[CLS, 7, MASK, SEP]])
    labels = torch.tensor([[IGNORE, IGNORE, 8, IGNORE]])
    hidden = net.bert(ids).last_hidden_state
    parts = [
        torch.autograd.grad(
            masked_lm_loss(net.masked_lm(h, t), labels),
            table,
            retain_graph=True,
        )[0]
        for h, t in ((hidden.detach(), table), (hidden, table.detach()))
    ]
    both = torch.autograd.grad(net(ids, labels=labels).loss, table)[0]
    torch.testing.assert_close(sum(parts), both)
    assert parts[0].any(1).all()  # as an output, every word
    assert parts[1].any(1).nonzero().flatten().tolist() == [2, 3, 4, 7]


@pytest.mark.equation("8.8")
def test_a_new_model_guesses():
    torch.manual_seed(0)
    net = model(vocab_size=5000, hidden_size=64)
    ids = torch.randint(5, 5000, (16, 40))
    loss = net(ids, labels=ids.roll(1, 1)).loss.item()
    sigma2 = net.bert.embeddings.word_embeddings.weight.var().item()
    assert loss == pytest.approx(math.log(5000) + 32 * sigma2, abs=0.02)


def test_a_new_head_starts_as_the_others_do():
    torch.manual_seed(0)
    head = MaskedLMHead(
        BertConfig(vocab_size=30, hidden_size=96, initializer_range=0.05)
    )
    assert not head.bias.any()
    assert not head.dense.bias.any()
    assert head.dense.weight.abs().max() <= 0.1
    assert 0.04 < head.dense.weight.std() < 0.05
    assert head.bias.shape == (30,)


def test_the_heads_norm_has_the_configured_eps():
    head = MaskedLMHead(
        BertConfig(vocab_size=30, hidden_size=12, layer_norm_eps=0.5)
    )
    assert head.LayerNorm.eps == 0.5


def test_dropout_sleeps_in_eval():
    net = model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    ids, _ = rows(10)
    assert torch.equal(net(ids).logits, net(ids).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masking_and_loss_run_on_the_device():
    ids, special = rows(11)
    generator = torch.Generator("cuda").manual_seed(0)
    masked, positions, targets = mask_tokens(
        ids.cuda(),
        special.cuda(),
        vocab_size=100,
        mask_token_id=MASK,
        generator=generator,
    )
    net = model().cuda()
    loss = net(masked, masked_positions=positions, labels=targets).loss
    assert loss.isfinite()


def test_a_compiled_graph_does_not_look_at_values(monkeypatch):
    bad = torch.tensor([99])
    with pytest.raises(ValueError, match="99"):
        check_targets(bad, "labels", 10)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    check_targets(bad, "labels", 10)


# the score of a sentence


def test_the_score_of_a_row_does_not_depend_on_its_batch():
    net = model(initializer_range=0.2)
    ids, special = rows(13)
    options = {"mask_token_id": MASK, "attention_mask": ids != PAD}
    scores = pseudo_log_likelihood(net, ids, special, **options)
    assert (scores < 0).all()
    assert not scores.requires_grad
    for row in range(4):
        n = int((ids[row] != PAD).sum())
        alone = pseudo_log_likelihood(
            net, ids[row : row + 1, :n], special[row : row + 1, :n],
            mask_token_id=MASK,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], scores[row])


def test_a_score_hides_each_word_from_itself():
    """What stands at a place has no say in its own probability."""
    net = model(initializer_range=0.2)
    ids = torch.tensor([[CLS, 7, 8, SEP]])
    special = torch.tensor([[1, 1, 0, 1]])
    p = [
        pseudo_log_likelihood(
            net, ids.masked_fill(ids == 8, word), special, mask_token_id=MASK
        ).exp()
        for word in range(100)
    ]
    assert sum(p).item() == pytest.approx(1, abs=1e-5)


def test_scoring_sleeps_and_wakes_the_dropout():
    net = model(hidden_dropout_prob=0.5)
    ids, special = rows(14)
    calm = pseudo_log_likelihood(net, ids, special, mask_token_id=MASK)
    assert not net.training
    net.train()
    again = pseudo_log_likelihood(net, ids, special, mask_token_id=MASK)
    assert net.training
    assert torch.equal(calm, again)


def test_segments_and_padding_are_seen_by_the_score():
    net = model(initializer_range=0.2)
    ids, special = rows(15, words=5)
    plain = pseudo_log_likelihood(net, ids, special, mask_token_id=MASK)
    for change in (
        {"token_type_ids": torch.ones_like(ids)},
        {"attention_mask": ids != 9},
    ):
        other = pseudo_log_likelihood(
            net, ids, special, mask_token_id=MASK, **change
        )
        assert not torch.allclose(other, plain)


def test_a_row_without_words_has_score_0():
    net = model()
    ids = torch.tensor([[CLS, SEP]])
    score = pseudo_log_likelihood(net, ids, ids < 5, mask_token_id=MASK)
    assert score.tolist() == [0]


def test_wrong_rows_are_named_by_the_score():
    net = model()
    ids = torch.tensor([[CLS, 7, SEP]])
    with pytest.raises(ValueError, match="input_ids holds 100"):
        pseudo_log_likelihood(net, ids + 93, ids < 5, mask_token_id=MASK)
    with pytest.raises(ValueError, match=r"special_tokens_mask \(3,\)"):
        pseudo_log_likelihood(net, ids, ids[0] < 5, mask_token_id=MASK)
