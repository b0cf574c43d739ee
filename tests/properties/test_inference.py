"""What holds of embeddings and of filled blanks, whatever the weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL, config_for, tokenizer_of

from bertnb import (
    POOLINGS,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
    cosine_similarity,
    embed,
    evaluating,
    fill_mask,
    inference,
    length_batches,
    next_sentence_probability,
    pool,
)

few = settings(max_examples=15, deadline=None)
WORDS = "the a cat dog sat ran on mat and sun moon over under up down".split()
PIECES = [*SPECIAL, *WORDS, "##s"]
TOKENIZER = tokenizer_of(" ".join([*WORDS, "##s"]))
TINY = config_for(
    TOKENIZER,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    hidden_dropout_prob=0.5,
    attention_probs_dropout_prob=0.5,
)
TEXTS = ["the cat sat on the mat", "dogs", "", "  ", "the sun and the moon"]
sentences = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    min_size=1,
    max_size=7,
)


def seeded(kind, config=TINY):
    torch.manual_seed(0)
    return kind(config).eval()


MODEL = seeded(BertModel).double()  # so that float32 rounds the same way
FILLER = seeded(BertForMaskedLM)


def close(a, b, bound=1e-6):
    torch.testing.assert_close(a, b, atol=bound, rtol=0)


@few
@given(sentences, st.sampled_from(POOLINGS), st.integers(1, 8))
def test_neighbours_and_batch_size_change_nothing(texts, pooling, size):
    alone = torch.cat([embed(MODEL, TOKENIZER, [t], pooling) for t in texts])
    close(embed(MODEL, TOKENIZER, texts, pooling, batch_size=size), alone)


@few
@given(sentences, st.randoms(use_true_random=False))
def test_rows_stand_in_the_order_of_the_texts(texts, random):
    order = random.sample(range(len(texts)), len(texts))
    mixed = embed(MODEL, TOKENIZER, [texts[i] for i in order], batch_size=2)
    close(mixed, embed(MODEL, TOKENIZER, texts)[order])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_stands_in_the_padding_is_not_seen(pooling):
    torch.manual_seed(0)
    states = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for nonsense in (torch.nan, torch.inf, -torch.inf, 1e9):
        spoilt = states.clone()
        spoilt[0, 3:] = nonsense
        close(pool(spoilt, mask, pooling)[1], pool(states, mask, pooling)[1])
        close(
            pool(spoilt, mask, pooling)[:1],
            pool(states[:1, :3], mask[:1, :3], pooling),
        )


def test_special_tokens_count_in_the_mean():
    batch = TOKENIZER("the cat")
    with torch.no_grad():
        states = MODEL(**batch).last_hidden_state.float()
    assert states.shape[1] == 4  # [CLS] the cat [SEP]
    close(embed(MODEL, TOKENIZER, "the cat"), states.mean(1))
    close(embed(MODEL, TOKENIZER, "the cat", "cls"), states[:, 0])
    close(embed(MODEL, TOKENIZER, "the cat", "max"), states.amax(1))


def test_the_mean_is_the_default_everywhere():
    default = embed(MODEL, TOKENIZER, TEXTS)
    assert torch.equal(default, embed(MODEL, TOKENIZER, TEXTS, "mean", (-1,)))
    states, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    assert torch.equal(pool(states, mask), pool(states, mask, "mean"))


def test_layers_lie_side_by_side_in_the_order_asked_for():
    both = embed(MODEL, TOKENIZER, TEXTS, layers=(2, 0))
    assert both.shape == (5, 48)
    close(both[:, :24], embed(MODEL, TOKENIZER, TEXTS))
    close(both[:, 24:], embed(MODEL, TOKENIZER, TEXTS, layers=[-3]))
    close(both[:, :24], embed(MODEL, TOKENIZER, TEXTS, layers=range(2, 3)))
    with torch.no_grad():
        first = MODEL.embeddings(TOKENIZER("dogs")["input_ids"]).float()
    close(both[1:2, 24:], first.mean(1))


def test_normalised_rows_have_the_length_one():
    plain = embed(MODEL, TOKENIZER, TEXTS, layers=(0, 1))
    unit = embed(MODEL, TOKENIZER, TEXTS, layers=(0, 1), normalize=True)
    close(unit.norm(dim=-1), torch.ones(5))
    close(unit, plain / plain.norm(dim=-1, keepdim=True))
    assert not torch.allclose(plain.norm(dim=-1), torch.ones(5), atol=0.1)


def test_spaces_are_a_text_and_no_text_is_no_row():
    rows = embed(MODEL, TOKENIZER, ["", "   ", "\n"])
    assert rows.isfinite().all()
    close(rows[0], rows[1])
    assert embed(MODEL, TOKENIZER, []).shape == (0, 24)
    assert embed(MODEL, TOKENIZER, [], layers=(0, 1, 2)).shape == (0, 72)


def test_one_text_and_a_stream_of_texts_are_taken():
    one = embed(MODEL, TOKENIZER, TEXTS[0])
    assert one.shape == (1, 24)
    close(one, embed(MODEL, TOKENIZER, iter(TEXTS))[:1])


def test_special_tokens_in_a_text_are_ordinary_characters_for_embed():
    vectors = embed(MODEL, TOKENIZER, ["cat [SEP]", "cat"])
    with torch.no_grad():
        special = TOKENIZER("cat [SEP]", allow_special=True)["input_ids"]
        injected = MODEL(special).last_hidden_state.mean(1).float()
    assert not torch.allclose(vectors[:1], injected, atol=1e-3)


def test_the_result_is_float32_without_gradients():
    model = seeded(BertModel).to(torch.bfloat16)
    vectors = embed(model, TOKENIZER, TEXTS)
    assert vectors.dtype == torch.float32
    assert vectors.device.type == "cpu"
    assert not vectors.requires_grad
    assert not vectors.is_inference()  # may be trained on
    close(vectors, embed(MODEL, TOKENIZER, TEXTS), 0.1)


def test_the_mean_is_taken_in_float32():
    model = seeded(BertModel).to(torch.bfloat16)
    batch = TOKENIZER(TEXTS[0])
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    close(embed(model, TOKENIZER, TEXTS[0]), states.float().mean(1), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_on_the_gpu_answers_on_the_cpu():
    model = seeded(BertForMaskedLM).cuda()
    close(
        embed(model, TOKENIZER, TEXTS),
        embed(FILLER, TOKENIZER, TEXTS),
        1e-4,
    )
    ours = fill_mask(model, TOKENIZER, "the [MASK]")
    assert (
        ours[0]["token"]
        == fill_mask(FILLER, TOKENIZER, "the [MASK]")[0]["token"]
    )


def test_a_model_with_a_head_is_embedded_by_its_body():
    model = seeded(BertForNextSentencePrediction)
    ours = embed(model, TOKENIZER, TEXTS)
    assert torch.equal(ours, embed(model.bert, TOKENIZER, TEXTS))


def test_dropout_is_off_and_every_mode_comes_back():
    model = seeded(BertForMaskedLM).train()
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    first, second = (embed(model, TOKENIZER, TEXTS) for _ in range(2))
    assert torch.equal(first, second)
    a, b = (fill_mask(model, TOKENIZER, "the [MASK]") for _ in range(2))
    assert a == b
    assert [module.training for module in model.modules()] == before
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="17 tokens"):
        embed(model, TOKENIZER, "cat " * 15)
    with pytest.raises(RuntimeError), evaluating(model):
        torch.zeros(2) @ torch.zeros(3)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_the_wrong_model_is_named():
    with pytest.raises(TypeError, match=r"model.*Linear.*BertModel"):
        embed(torch.nn.Linear(2, 2), TOKENIZER, TEXTS)
    with pytest.raises(TypeError, match=r"BertModel.*BertForMaskedLM\.from_pr"):
        fill_mask(MODEL, TOKENIZER, "the [MASK]")


def test_a_tokenizer_of_another_model_is_refused():
    small = seeded(BertModel, replace(TINY, vocab_size=10))
    with pytest.raises(ValueError, match=r"tokenizer has 21.*vocab_size=10"):
        embed(small, TOKENIZER, TEXTS)
    small = seeded(BertForMaskedLM, replace(TINY, vocab_size=20))
    with pytest.raises(ValueError, match=r"tokenizer has 21.*vocab_size=20"):
        fill_mask(small, TOKENIZER, "the [MASK]")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pooling": "sum"}, ValueError, r"pooling='sum'.*mean, cls, max"),
        ({"layers": ()}, ValueError, r"layers=\(\).*one or more"),
        ({"layers": (0, 3)}, ValueError, r"layers=\(0, 3\).* to 2"),
        ({"layers": (-4,)}, ValueError, r"layers=\(-4,\).* to -3"),
        ({"layers": -1}, TypeError, r"layers=-1.*\(-1,\)"),
        ({"batch_size": 0}, ValueError, r"batch_size=0.*1 or more"),
        ({"max_length": 17}, ValueError, r"max_length=17.*embeddings=16"),
        ({"max_length": 1}, ValueError, r"max_length=1"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        embed(MODEL, TOKENIZER, TEXTS, **arguments)
    if "max_length" not in arguments or arguments["max_length"] > 1:
        with pytest.raises(error, match=message):
            embed(MODEL, TOKENIZER, [], **arguments)


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match=r"texts\[1\].*int"):
        embed(MODEL, TOKENIZER, ["cat", 7])
    with pytest.raises(TypeError, match=r"texts=7"):
        embed(MODEL, TOKENIZER, 7)
    with pytest.raises(TypeError, match=r"text is of type list.*one text"):
        fill_mask(FILLER, TOKENIZER, ["the [MASK]"])


def test_nothing_is_cut_unless_asked_for():
    fits, long = "cat " * 14, "cat " * 15
    assert embed(MODEL, TOKENIZER, fits).shape == (1, 24)
    with pytest.raises(ValueError, match=r"17 tokens.*embeddings=16.*begins"):
        embed(MODEL, TOKENIZER, ["dog", long])
    cut = embed(MODEL, TOKENIZER, ["dog", long, "sun"], max_length=16)
    close(cut[1:2], embed(MODEL, TOKENIZER, fits))
    close(
        embed(MODEL, TOKENIZER, long, max_length=5),
        embed(MODEL, TOKENIZER, "cat cat cat"),
    )
    with pytest.raises(ValueError, match=r"18 tokens.*embeddings=16"):
        fill_mask(FILLER, TOKENIZER, long + "[MASK]")


@few
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
def test_batches_hold_each_row_once_the_longest_first(lengths, size):
    batches = length_batches(lengths, size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[r] for r in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)


def test_batches_are_no_wider_than_their_longest_row(monkeypatch):
    seen = []
    forward = BertModel.forward

    def spy(self, ids, mask, **options):
        seen.append(tuple(ids.shape))
        return forward(self, ids, mask, **options)

    monkeypatch.setattr(BertModel, "forward", spy)
    embed(MODEL, TOKENIZER, ["a", "the cat sat", "dog", "a a"], batch_size=2)
    assert seen == [(2, 5), (2, 3)]


@few
@given(
    st.lists(st.integers(1, 9), max_size=12),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_batches_hold_no_more_positions_than_asked(lengths, size, positions):
    batches = length_batches(lengths, size, positions)
    rows = [row for batch in batches for row in batch]
    assert [lengths[r] for r in rows] == sorted(lengths, reverse=True)
    assert sorted(rows) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[r] for r in batch)
        assert len(batch) == 1 or len(batch) * width <= positions
        assert len(batch) <= size
        # no row more would have fitted
        full = (len(batch) + 1) * width > positions or len(batch) == size
        assert full or batch is batches[-1]


def test_a_batch_has_room_for_a_position_at_least():
    with pytest.raises(ValueError, match=r"max_positions=0.*1 or more"):
        length_batches([1], 1, 0)


def test_batches_are_filled_by_positions_and_masked_only_where_padded(
    monkeypatch,
):
    seen = []
    forward = BertModel.forward

    def spy(self, ids, mask, **options):
        seen.append((tuple(ids.shape), mask is None))
        return forward(self, ids, mask, **options)

    monkeypatch.setattr(BertModel, "forward", spy)
    monkeypatch.setitem(inference.BATCH_POSITIONS, "cpu", 10)
    texts = ["a", "the cat sat", "dog", "a a", "sun", ""]
    embed(MODEL, TOKENIZER, texts)  # of 3, 5, 3, 4, 3 and 2 tokens
    assert seen == [((2, 5), False), ((3, 3), True), ((1, 2), True)]


def test_only_the_first_place_of_the_last_layer_is_computed_for_cls(
    monkeypatch,
):
    seen = []
    last = MODEL.encoder.layer[-1]
    forward = last.forward

    def spy(*arguments):
        seen.append(forward(*arguments)[0].shape)
        return forward(*arguments)

    monkeypatch.setattr(last, "forward", spy)
    embed(MODEL, TOKENIZER, "the cat sat", "cls")
    embed(MODEL, TOKENIZER, "the cat sat", "cls", layers=(-1, 0))
    assert [shape[1] for shape in seen] == [2, 5]  # to pool, and to return


# what stands in files: letters, spaces, controls, halves of pairs
anything = st.text(
    st.characters() | st.characters(categories=["Cc", "Cs", "Zs", "Co"]),
    max_size=30,
)


@settings(max_examples=25, deadline=None)
@given(anything, st.sampled_from(POOLINGS))
def test_any_text_has_a_vector_or_a_clear_error(text, pooling):
    if any("\ud800" <= c <= "\udfff" for c in text):
        with pytest.raises(ValueError, match=r"texts\[1\].*surrogate"):
            embed(MODEL, TOKENIZER, ["cat", text], max_length=16)
        with pytest.raises(ValueError, match="surrogate"):
            fill_mask(FILLER, TOKENIZER, text + "[MASK]")
        return
    found = embed(MODEL, TOKENIZER, ["cat", text], pooling, max_length=16)
    assert found.isfinite().all()
    close(found[:1], embed(MODEL, TOKENIZER, "cat", pooling))
    if not TOKENIZER.tokenize(text):
        close(found[1:], embed(MODEL, TOKENIZER, "", pooling))
    if len(TOKENIZER.tokenize(text)) <= 13:
        scores = fill_mask(FILLER, TOKENIZER, text + " [MASK]", top_k=2)
        assert 0 < scores[1]["score"] <= scores[0]["score"] < 1


@pytest.mark.parametrize("letter", ["a", "cat ", " ", "\x00", "\u4e00"])
def test_a_hundred_thousand_characters(letter):
    long = letter * (100_000 // len(letter))
    pieces = len(TOKENIZER.tokenize(long))
    if pieces <= 14:  # nothing, or one word that is unknown
        few_tokens = "a" * 200 if pieces else ""
        close(
            embed(MODEL, TOKENIZER, long), embed(MODEL, TOKENIZER, few_tokens)
        )
        return
    with pytest.raises(ValueError, match=rf"{pieces + 2} tokens.*at most"):
        embed(MODEL, TOKENIZER, long)
    assert embed(MODEL, TOKENIZER, long, max_length=16).isfinite().all()
    with pytest.raises(ValueError, match=rf"{pieces + 3} tokens.*at most"):
        fill_mask(FILLER, TOKENIZER, long + " [MASK]")


def test_what_follows_is_scored_pair_by_pair():
    model = seeded(BertForNextSentencePrediction)
    firsts, seconds = ["the cat sat", "dogs", ""], ["on the mat", "", "sun"]
    found = next_sentence_probability(model, TOKENIZER, firsts, seconds)
    for first, second, p in zip(firsts, seconds, found, strict=True):
        batch = TOKENIZER(first, second)
        with torch.no_grad():
            logits = model(**batch).logits
        close(logits.softmax(-1)[0, 0], p)
        one = next_sentence_probability(model, TOKENIZER, first, second)
        close(one[0], p)
    assert found.std() > 1e-3
    both = seeded(BertForPreTraining)
    both.bert.load_state_dict(model.bert.state_dict())
    both.next_sentence.load_state_dict(model.next_sentence.state_dict())
    close(next_sentence_probability(both, TOKENIZER, firsts, seconds), found)
    assert next_sentence_probability(model, TOKENIZER, [], []).shape == (0,)


def test_pairs_that_cannot_be_scored_are_named():
    model = seeded(BertForNextSentencePrediction)
    with pytest.raises(TypeError, match=r"BertModel.*next-sentence head"):
        next_sentence_probability(MODEL, TOKENIZER, "a", "a")
    with pytest.raises(ValueError, match=r"first has 2.*second 1"):
        next_sentence_probability(model, TOKENIZER, ["a", "a"], "a")
    with pytest.raises(ValueError, match=r"17 tokens.*embeddings=16"):
        next_sentence_probability(model, TOKENIZER, "a " * 7, "a " * 7)
    with pytest.raises(TypeError, match=r"second\[0\].*int"):
        next_sentence_probability(model, TOKENIZER, ["a"], [7])


def test_cosines_lie_between_the_extremes():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    expected = [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    close(cosine_similarity(x, x), torch.tensor(expected).float())
    assert cosine_similarity(x, x[:2]).shape == (4, 2)


def test_an_unknown_pooling_is_named():
    with pytest.raises(ValueError, match=r"pooling='CLS'.*mean, cls, max"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "CLS")


def test_one_mask_gives_a_list_several_a_list_of_lists():
    one = fill_mask(FILLER, TOKENIZER, "the [MASK] sat")
    assert len(one) == 5
    assert set(one[0]) == {"score", "token", "token_str", "sequence"}
    scores = [found["score"] for found in one]
    assert scores == sorted(scores, reverse=True)
    assert one[0]["token_str"] == PIECES[one[0]["token"]]
    two = fill_mask(FILLER, TOKENIZER, "the [MASK] [MASK]", top_k=2)
    assert [len(found) for found in two] == [2, 2]
    for place, found in enumerate(two):
        for filled in found:
            row = ["[CLS]", "the", "[MASK]", "[MASK]", "[SEP]"]
            row[2 + place] = filled["token_str"]
            ids = [PIECES.index(piece) for piece in row if piece != "[PAD]"]
            whole = TOKENIZER.decode(ids, skip_special_tokens=False)
            assert filled["sequence"] == whole


def test_both_pretrained_kinds_give_the_same_words():
    both = seeded(BertForPreTraining)
    alone = BertForMaskedLM(TINY).eval()
    alone.bert.load_state_dict(both.bert.state_dict(), strict=False)
    alone.masked_lm.load_state_dict(both.masked_lm.state_dict())
    for text in ("the [MASK]", "[MASK] and [MASK]"):
        a, b = (fill_mask(m, TOKENIZER, text) for m in (both, alone))
        for one, two in zip(np.ravel(a), np.ravel(b), strict=True):
            score = two.pop("score")
            assert one.pop("score") == pytest.approx(score, abs=1e-5)
            assert one == two


def test_only_the_masks_are_decoded(monkeypatch):
    seen = []
    model = seeded(BertForMaskedLM)
    forward = model.masked_lm.forward
    monkeypatch.setattr(
        model.masked_lm,
        "forward",
        lambda states, table: (
            seen.append(states.shape) or forward(states, table)
        ),
    )
    fill_mask(model, TOKENIZER, "the [MASK] sat on the [MASK]")
    assert seen == [(1, 2, 24)]


def test_rows_of_the_table_beyond_the_vocabulary_are_no_words():
    padded = seeded(BertForMaskedLM, replace(TINY, vocab_size=64))
    with torch.no_grad():
        padded.masked_lm.bias[len(PIECES) :] = 100.0
    found = fill_mask(padded, TOKENIZER, "the [MASK]", top_k=len(PIECES))
    assert sorted(f["token"] for f in found) == list(range(len(PIECES)))
    assert sum(f["score"] for f in found) == pytest.approx(1, abs=1e-5)


def test_a_text_without_a_mask_says_what_to_do():
    with pytest.raises(ValueError, match=r"'the mask'.*write \[MASK\]"):
        fill_mask(FILLER, TOKENIZER, "the mask")


@pytest.mark.parametrize("top_k", [0, -1, 22])
def test_top_k_has_bounds(top_k):
    with pytest.raises(ValueError, match=rf"top_k={top_k}.*1 to 21"):
        fill_mask(FILLER, TOKENIZER, "the [MASK]", top_k=top_k)
