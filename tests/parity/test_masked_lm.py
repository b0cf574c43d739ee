"""The masked language model against transcriptions and `transformers`."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bertnb.configuration import BertConfig
from bertnb.folders import hf_name
from bertnb.masked_lm import (
    IGNORE,
    BertForMaskedLM,
    MaskedLMHead,
    draw_words,
    mask_tokens,
    masked_lm_loss,
    pseudo_log_likelihood,
)

few = settings(max_examples=12, deadline=None)


def small(act="gelu", heads=2, layers=2):
    return BertConfig(
        vocab_size=61,
        hidden_size=8 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=24,
        hidden_act=act,
        max_position_embeddings=20,
        initializer_range=0.2,
    )


def shaken(model, seed):
    """No bias stays at 0 and no weight of a LayerNorm at 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def batch(seed, rows=3, length=11):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 61, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    kinds = torch.zeros_like(ids)
    kinds[:, 4:8] = 1
    labels = torch.full_like(ids, IGNORE)
    labels[0, 2], labels[1, [1, 5]], labels[2, 10] = 7, torch.tensor([9, 0]), 60
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": kinds,
        "labels": labels,
    }


def assert_same(ours, theirs, inputs):
    a, b = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-5)
    for model, output in ((ours, a), (theirs, b)):
        model.zero_grad()
        output.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            p.grad, gradients[hf_name(name)], rtol=0, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (2, 2), (3, 1)])
def test_logits_loss_and_gradients_are_those_of_transformers(
    tmp_path, act, heads, layers
):
    ours = shaken(BertForMaskedLM(small(act, heads, layers)), heads)
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert_same(ours, theirs, batch(layers))


def test_weights_come_back_from_transformers(tmp_path):
    config = transformers.BertConfig(**small().to_dict())
    theirs = shaken(transformers.BertForMaskedLM(config), 3)
    theirs.save_pretrained(tmp_path)
    ours = BertForMaskedLM.from_pretrained(tmp_path)
    assert_same(ours, theirs, batch(3))


def test_a_pretraining_checkpoint_gives_its_masked_lm(tmp_path):
    config = transformers.BertConfig(**small().to_dict())
    theirs = shaken(transformers.BertForPreTraining(config), 4)
    theirs.save_pretrained(tmp_path)  # with pooler and next-sentence head
    ours = BertForMaskedLM.from_pretrained(tmp_path)
    inputs = batch(4)
    inputs.pop("labels")
    torch.testing.assert_close(
        ours(**inputs).logits,
        theirs(**inputs).prediction_logits,
        rtol=0,
        atol=1e-5,
    )


def test_hidden_states_and_attentions_come_on_request():
    ours = shaken(BertForMaskedLM(small()), 5)
    inputs = batch(5)
    plain = ours(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None
    more = ours(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(more.hidden_states) == 3
    assert len(more.attentions) == 2
    torch.testing.assert_close(more.logits, plain.logits, rtol=0, atol=1e-5)
    positions = torch.arange(11).flip(0)
    moved = ours(**inputs, position_ids=positions)
    assert (moved.logits - plain.logits).abs().max() > 1e-3


# transcriptions in float64


@pytest.mark.equation("8.2")
def test_the_head_is_its_formula(measured):
    config = small()
    head = shaken(MaskedLMHead(config).double(), 6)
    torch.manual_seed(6)
    hidden = torch.randn(2, 3, 16, dtype=torch.float64)
    table = torch.randn(61, 16, dtype=torch.float64)
    weights = {k: v.numpy() for k, v in head.state_dict().items()}
    # (8.2), in NumPy
    x = hidden.numpy() @ weights["dense.weight"].T + weights["dense.bias"]
    erf = np.vectorize(math.erf)
    x = x * 0.5 * (1 + erf(x / math.sqrt(2)))
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    x = x * weights["LayerNorm.weight"] + weights["LayerNorm.bias"]
    scores = x @ table.numpy().T + weights["bias"]
    found = head(hidden, table).detach().numpy()
    measured(found - scores, 1e-12)


@pytest.mark.equation("8.1", "8.2")
def test_the_articles_fraction_is_the_softmax_of_the_tied_head(measured):
    """exp s(w_i) over the sum of exp s(w), term by term, in float64."""
    model = shaken(BertForMaskedLM(small()).double(), 7)
    inputs = batch(7)
    del inputs["labels"]
    hidden = model.bert(**inputs).last_hidden_state[1, 5]
    head, table = model.masked_lm, model.bert.embeddings.word_embeddings.weight
    t = head.LayerNorm(head.act(head.dense(hidden)))
    scores = [
        sum(a * b for a, b in zip(t.tolist(), row.tolist(), strict=True))
        + bias.item()
        for row, bias in zip(table, head.bias, strict=True)
    ]
    total = sum(math.exp(s) for s in scores)
    fractions = torch.tensor([math.exp(s) / total for s in scores])
    p = model(**inputs).logits[1, 5].softmax(-1)
    measured(p.double() - fractions.double(), 1e-7)
    assert p.sum().item() == pytest.approx(1)


@pytest.mark.equation("8.1", "8.5")
@few
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(2, 9))
def test_the_loss_is_its_formula(measured, seed, places, words):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(
        2, places, words, generator=generator, dtype=torch.float64
    )
    targets = torch.randint(words, (2, places), generator=generator)
    targets[torch.rand(2, places, generator=generator) < 0.4] = IGNORE
    targets[0, 0] = words - 1
    # (8.1) and (8.5), in loops
    terms = []
    for row in range(2):
        for i in range(places):
            if targets[row, i] != IGNORE:
                s = logits[row, i].tolist()
                total = sum(math.exp(x) for x in s)
                terms.append(-math.log(math.exp(s[targets[row, i]]) / total))
    loss = masked_lm_loss(logits, targets)
    measured(loss.item() - sum(terms) / len(terms), 1e-12)
    other = nn.CrossEntropyLoss()(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, other)


@pytest.mark.equation("8.6")
def test_the_gradient_is_probability_minus_one_hot(measured):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, -100, 3, 0], [4, 4, -100, 2], [-100] * 4])
    masked_lm_loss(logits, targets).backward()
    real = targets != IGNORE
    expected = logits.detach().softmax(-1)  # (8.6)
    expected -= nn.functional.one_hot(targets.clamp(min=0), 5)
    expected *= real[..., None].double() / real.sum()
    measured(logits.grad - expected, 1e-12)
    assert torch.autograd.gradcheck(
        lambda s: masked_lm_loss(s, targets), logits
    )


@pytest.mark.equation("8.3")
@few
@given(
    st.integers(1, 200), st.floats(0.01, 1.0), st.one_of(st.none(), st.just(20))
)
def test_the_count_is_that_of_the_original(tokens, rate, limit):
    """Count as create_pretraining_data.py:369 does, Python's round included."""
    ids = torch.full((1, 200), 9)
    ids[0, tokens:] = 0
    _, _, targets = mask_tokens(
        ids,
        ids == 0,
        vocab_size=61,
        mask_token_id=4,
        mlm_probability=rate,
        max_predictions=limit or 200,
    )
    count = min(limit or 200, max(1, round(tokens * rate)))
    assert (targets != IGNORE).sum() == count


@pytest.mark.equation("8.3")
@pytest.mark.parametrize("rate", [0.15, 0.3, 0.45, 0.5, 0.25, 0.05])
def test_halves_go_to_the_even_neighbour(rate):
    tokens = torch.arange(1, 513)
    ids = (torch.arange(512) < tokens[:, None]) * 9
    _, _, targets = mask_tokens(
        ids,
        ids == 0,
        vocab_size=61,
        mask_token_id=4,
        mlm_probability=rate,
    )
    counts = (targets != IGNORE).sum(1).tolist()
    assert counts == [max(1, round(rate * n)) for n in tokens.tolist()]


# whole words, against a transcription of the original's rule


def originals_choice(tokens, order, count):
    """What create_pretraining_data.py:348-391 chooses, its words in `order`.

    Candidates are numbered as they begin; `order` is the shuffled numbers.
    """
    candidates = []
    for i, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if candidates and token.startswith("##"):
            candidates[-1].append(i)
        else:
            candidates.append([i])
    hidden = []
    for number in order:
        if number >= len(candidates):
            continue
        if len(hidden) >= count:
            break
        if len(hidden) + len(candidates[number]) > count:
            continue
        hidden += candidates[number]
    return sorted(hidden)


tokens_of_a_row = st.lists(
    st.sampled_from(["a", "b", "##c", "##d", "##e", "[SEP]"]),
    min_size=1,
    max_size=24,
)


@settings(max_examples=200, deadline=None)
@given(tokens_of_a_row, st.integers(1, 12), st.integers(0, 999))
def test_whole_words_are_chosen_by_the_originals_rule(tokens, count, seed):
    tokens = ["[CLS]", *tokens, "[SEP]"]
    special = torch.tensor([[t in ("[CLS]", "[SEP]") for t in tokens]])
    continues = torch.tensor([[t.startswith("##") for t in tokens]])
    generator = torch.Generator().manual_seed(seed)
    places = draw_words(
        special, continues, torch.tensor([[count]]), 12, generator
    )[0].tolist()
    # the same lottery; ours numbers from 1, unless `##` opens the row
    generator.manual_seed(seed)
    order = torch.rand(1, len(tokens) + 1, generator=generator).argsort(-1)
    first = next(
        (t for t in tokens if t not in ("[CLS]", "[SEP]")), "none"
    ).startswith("##")
    numbers = [n - (not first) for n in order[0].tolist()]
    numbers = [n for n in numbers if n >= 0]
    expected = originals_choice(tokens, numbers, count)
    assert [p for p in places if p < len(tokens)] == expected
    filler = [len(tokens)] * (12 - len(expected))
    assert places[len(expected) :] == filler


# the pseudo-log-likelihood


@pytest.mark.equation("8.9")
@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_pseudo_log_likelihood_is_its_loop(measured, size):
    model = shaken(BertForMaskedLM(small()), 8)
    inputs = batch(8)
    del inputs["labels"]
    ids, special = inputs["input_ids"], inputs["attention_mask"] == 0
    special[:, 0] = special[2, 6] = True
    found = pseudo_log_likelihood(
        model,
        special_tokens_mask=special,
        mask_token_id=4,
        batch_size=size,
        **inputs,
    )
    assert found.shape == (3,)
    for row in range(3):
        total = 0.0
        for i in range(ids.shape[1]):
            if not special[row, i]:
                one = {n: v[row : row + 1].clone() for n, v in inputs.items()}
                one["input_ids"][0, i] = 4
                p = model(**one).logits[0, i].detach().double().softmax(-1)
                total += math.log(p[ids[row, i]])
        measured(found[row].item() - total, 1e-4)
