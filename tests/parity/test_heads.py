"""Every model against `transformers`, both ways: outputs, loss, gradients."""

import json
import tempfile

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bertnb
from bertnb import BertConfig, gather_positions, hf_name
from bertnb.configuration import HIDDEN_ACTS

transformers.utils.logging.disable_progress_bar()
BOUND = 1e-5
CLASSIFIERS = ("BertForSequenceClassification", "BertForTokenClassification")
MODELS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    *CLASSIFIERS,
    "BertForQuestionAnswering",
)
LABELS = "labels next_sentence_label start_positions end_positions".split()
WANTED = {"output_hidden_states": True, "output_attentions": True}
SMALL = BertConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=32,
    max_position_embeddings=16,
)


def close(ours, theirs, bound=BOUND):
    """Equal to `bound`, relative where a tensor has numbers larger than 1."""
    return (ours - theirs).abs().max() <= bound * max(1, theirs.abs().max())


def randomize(model):
    """Give every parameter numbers of its own, so that none can be swapped."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if "orm.weight" in name:
            parameter.data += 1
    return model.eval()


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 4))
    return BertConfig(
        vocab_size=draw(st.integers(5, 60)),
        hidden_size=heads * draw(st.integers(5, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 40)),
        hidden_act=draw(st.sampled_from(HIDDEN_ACTS)),
        max_position_embeddings=draw(st.integers(12, 20)),
        type_vocab_size=draw(st.integers(1, 3)),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5])),
    )


def make_batch(config, rows, length):
    """Ids, segments, and rows that end early.

    Padding has other ids than 0: theirs gives the row of [PAD] no gradient as
    an input, which has a test of its own.
    """
    lengths = torch.randint(1, length + 1, (rows, 1))
    return {
        "input_ids": torch.randint(1, config.vocab_size, (rows, length)),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "token_type_ids": torch.randint(config.type_vocab_size, (rows, length)),
    }


def some(highest, *shape):
    """Labels, most of them -100; theirs is nan without any, so one is real."""
    labels = torch.randint(highest, shape)
    labels[torch.rand(shape) < 0.6] = -100
    labels[(0,) * len(shape)] = highest - 1
    return labels


def make_labels(name, config, rows, length, num_labels):
    words = some(config.vocab_size, rows, length)
    if name == "BertForPreTraining":
        return {"labels": words, "next_sentence_label": some(2, rows)}
    if name == "BertForMaskedLM":
        return {"labels": words}
    if name == "BertForNextSentencePrediction":
        return {"labels": some(2, rows)}
    if name == "BertForTokenClassification":
        return {"labels": some(num_labels, rows, length)}
    if name == "BertForQuestionAnswering":
        start, end = torch.randint(2 * length, (2, rows))  # half: cut off
        start[0], end[-1] = 0, length - 1
        return {"start_positions": start, "end_positions": end}
    if name == "BertForSequenceClassification" and num_labels == 1:
        return {"labels": torch.randn(rows)}
    if name == "BertForSequenceClassification":
        return {"labels": some(num_labels, rows)}
    return {}


def head_arguments(name, num_labels):
    return {"num_labels": num_labels} if name in CLASSIFIERS else {}


def start(name, config, num_labels=2, attention="eager"):
    """Our model and theirs with the same weights, which began with us."""
    head = head_arguments(name, num_labels)
    ours = randomize(getattr(bertnb, name)(config, **head))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = getattr(transformers, name).from_pretrained(
            folder, attn_implementation=attention
        )
    return ours, theirs


def bring_back(name, theirs):
    """Give theirs new weights, and return ours with them."""
    randomize(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return getattr(bertnb, name).from_pretrained(folder)


def compare(ours, theirs, inputs):
    """Every output, the loss, and the gradient of every parameter."""
    a, b = (model(**inputs, **WANTED) for model in (ours, theirs))
    fields = [n for n in vars(a) if getattr(a, n) is not None]
    if "losses" in fields:  # theirs has only the sum
        fields.remove("losses")
        assert a.losses.keys() == inputs.keys() & set(LABELS)
        assert close(sum(a.losses.values()), a.loss)
    for name in fields:
        one, two = getattr(a, name), getattr(b, name)
        if isinstance(one, tuple):
            one, two = torch.stack(one), torch.stack(two)
        assert one.shape == two.shape, name
        assert close(one, two), (name, (one - two).abs().max())
    if isinstance(ours, bertnb.BertModel):  # it has no loss: make one
        towards = torch.randn(a.last_hidden_state.shape)
        losses = [
            (out.last_hidden_state * towards).mean() + out.pooler_output.mean()
            for out in (a, b)
        ]
    else:
        losses = [a.loss, b.loss]
    for model, loss in zip((ours, theirs), losses, strict=True):
        model.zero_grad()
        loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for own, parameter in ours.named_parameters():
        expected = gradients.pop(hf_name(own))
        if parameter.grad is None:
            assert expected is None or not expected.any(), own
        else:
            assert close(parameter.grad, expected), own
    assert not gradients  # theirs has no parameter that ours lacks


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=30, deadline=None)
@given(
    config=configs(),
    rows=st.integers(1, 3),
    length=st.integers(1, 12),
    num_labels=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_outputs_loss_and_gradients_equal_transformers_both_ways(
    name, config, rows, length, num_labels, seed
):
    torch.manual_seed(seed)
    ours, theirs = start(name, config, num_labels)
    inputs = make_batch(config, rows, length)
    inputs |= make_labels(name, config, rows, length, num_labels)
    compare(ours, theirs, inputs)
    compare(bring_back(name, theirs), theirs, inputs)


# named cases


def agree(name, inputs, config=SMALL, attention="eager"):
    torch.manual_seed(0)
    ours, theirs = start(name, config, attention=attention)
    rows, length = inputs["input_ids"].shape
    compare(ours, theirs, inputs | make_labels(name, config, rows, length, 2))


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_rows_of_padding_after_one_token(name):
    inputs = make_batch(SMALL, 3, 9)
    inputs["attention_mask"] = (torch.arange(9) < 1).long().repeat(3, 1)
    agree(name, inputs)


@each_model
def test_rows_of_one_token(name):
    agree(name, make_batch(SMALL, 4, 1))


@each_model
def test_rows_of_512_tokens(name):
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    inputs = make_batch(config, 2, 512)
    inputs["attention_mask"][0] = 1
    agree(name, inputs, config)


@each_model
def test_a_batch_of_one_row(name):
    agree(name, make_batch(SMALL, 1, 9))


@each_model
def test_two_segments_and_padding(name):
    inputs = make_batch(SMALL, 2, 12)
    places, ends = torch.arange(12), torch.tensor([[12], [7]])
    inputs["attention_mask"] = (places < ends).long()
    inputs["token_type_ids"] = ((places > 4) & (places < ends)).long()
    agree(name, inputs)


@each_model
def test_positions_that_are_given(name):
    inputs = make_batch(SMALL, 2, 8)
    agree(name, inputs | {"position_ids": torch.arange(15, 7, -1)[None]})
    restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    agree(name, inputs | {"position_ids": restart})


@each_model
def test_masks_and_segments_that_are_left_out(name):
    ids = make_batch(SMALL, 2, 8)["input_ids"]
    agree(name, {"input_ids": ids})


@each_model
def test_their_fast_attention_is_ours_too(name):
    torch.manual_seed(1)
    ours, theirs = start(name, SMALL, attention="sdpa")
    inputs = make_batch(SMALL, 3, 9)
    with torch.no_grad():
        a, b = ours(**inputs), theirs(**inputs)
    for field, value in b.items():
        assert close(getattr(a, field), value), field


@each_model
def test_a_row_without_a_token_to_attend_to_leaves_the_others_alone(name):
    """Such a row has context 0 here, so its states are those of a single
    token per place; theirs spreads the weights evenly, or does as ours."""
    torch.manual_seed(2)
    ours, eager = start(name, SMALL)
    inputs = make_batch(SMALL, 3, 9)
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        a, b = ours(**inputs, **WANTED), eager(**inputs, **WANTED)
    for field in (n for n in vars(a) if getattr(a, n) is not None):
        one, two = getattr(a, field), getattr(b, field)
        if not isinstance(one, tuple):
            one, two = (one,), (two,)
        for x, y in zip(one, two, strict=True):
            assert close(x[[0, 2]], y[[0, 2]]), field
            assert x.isfinite().all(), field
    assert not any(weights[1].any() for weights in a.attentions)
    for weights in b.attentions:
        torch.testing.assert_close(
            weights[1], torch.full_like(weights[1], 1 / 9)
        )
    assert not close(a.hidden_states[1][1], b.hidden_states[1][1], 1e-3)


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM"])
@settings(max_examples=15, deadline=None)
@given(
    config=configs(),
    rows=st.integers(1, 3),
    length=st.integers(1, 12),
    slots=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_decoding_masked_positions_only_equals_decoding_all(
    name, config, rows, length, slots, seed
):
    torch.manual_seed(seed)
    model = randomize(getattr(bertnb, name)(config))
    batch = make_batch(config, rows, length)
    # the first `count` slots of each row hold different places, the rest none
    order = torch.rand(rows, length).argsort(dim=1)[:, :slots]
    places = torch.zeros(rows, slots, dtype=torch.int64)
    places[:, : order.shape[1]] = order
    count = torch.randint(1, order.shape[1] + 1, (rows, 1))
    used = torch.arange(slots) < count
    places = places * used
    words = torch.randint(config.vocab_size, (rows, length))
    targets = words.gather(1, places).masked_fill(~used, -100)
    labels = torch.full((rows, length), -100)
    for row in range(rows):
        for slot in range(int(count[row])):
            labels[row, places[row, slot]] = targets[row, slot]

    field = "logits" if name == "BertForMaskedLM" else "prediction_logits"
    full = model(**batch, labels=labels)
    fast = model(**batch, labels=targets, masked_positions=places)
    scores = getattr(full, field)
    assert scores.shape == (rows, length, config.vocab_size)
    assert getattr(fast, field).shape == (rows, slots, config.vocab_size)
    assert close(getattr(fast, field), gather_positions(scores, places))
    assert close(fast.loss, full.loss)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = zip(
        torch.autograd.grad(fast.loss, parameters, allow_unused=True),
        torch.autograd.grad(full.loss, parameters, allow_unused=True),
        strict=True,
    )
    for own, (one, two) in zip(names, pairs, strict=True):
        assert (one is None) == (two is None), own
        assert one is None or close(one, two), own


def test_one_kind_of_label_gives_its_own_loss():
    """The sum of the two losses is the loss; theirs is None for one label."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    ours, theirs = start("BertForPreTraining", config)
    batch = make_batch(config, 3, 8)
    labels = make_labels("BertForPreTraining", config, 3, 8, 2)
    with torch.no_grad():
        words, order = (ours(**batch, **{k: labels[k]}).loss for k in labels)
        both, none = ours(**batch, **labels).loss, ours(**batch).loss
        expected = theirs(**batch, **labels).loss
    assert none is None
    for name in labels:
        assert theirs(**batch, **{name: labels[name]}).loss is None
    assert close(words + order, both)
    assert close(both, expected)


def test_label_names_travel_both_ways(tmp_path):
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    labels = [f"class {i}" for i in range(11)]  # "10" sorts before "2"
    ours = bertnb.BertForSequenceClassification(config, labels=labels)
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path
    )
    assert theirs.config.id2label == dict(enumerate(labels))
    theirs.save_pretrained(tmp_path)
    back = bertnb.BertForSequenceClassification.from_pretrained(tmp_path)
    assert back.label_names == labels


# where theirs and ours differ, on purpose


def test_theirs_gives_the_padding_row_no_gradient_as_an_input():
    """Ours follows the original, which has no `padding_idx`."""
    torch.manual_seed(3)
    ours, theirs = start("BertForTokenClassification", SMALL)
    ids = torch.tensor([[2, 0, 7]])  # 0 is [PAD], but may be attended to
    labels = torch.tensor([[1, 0, 1]])
    for model in (ours, theirs):
        model(ids, labels=labels).loss.backward()
    a, b = (
        model.bert.embeddings.word_embeddings.weight.grad
        for model in (ours, theirs)
    )
    assert a[0].any()
    assert not b[0].any()
    assert close(a[1:], b[1:])


@pytest.mark.parametrize("name", MODELS[1:])
def test_without_a_label_that_counts_the_loss_is_0_and_theirs_nan(name):
    torch.manual_seed(4)
    ours, theirs = start(name, SMALL)
    inputs = make_batch(SMALL, 2, 6)
    labels = make_labels(name, SMALL, 2, 6, 2)
    ignored = 6 if "start_positions" in labels else -100
    labels = {n: torch.full_like(v, ignored) for n, v in labels.items()}
    assert theirs(**inputs, **labels).loss.isnan()
    loss = ours(**inputs, **labels).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(
        p.grad.any() for p in ours.parameters() if p.grad is not None
    )


def test_answers_at_minus_100_do_not_count_and_theirs_are_at_0():
    torch.manual_seed(5)
    ours, theirs = start("BertForQuestionAnswering", SMALL)
    inputs = make_batch(SMALL, 2, 6)
    end = {"end_positions": torch.tensor([5, 4])}
    at = {n: torch.tensor([3, n]) for n in (-100, 0, 6)}
    a, b = (
        {n: m(**inputs, start_positions=at[n], **end).loss for n in at}
        for m in (ours, theirs)
    )
    assert close(a[0], b[0])
    assert close(a[6], b[6])
    assert torch.equal(b[-100], b[0])  # clamped to the first token
    assert torch.equal(a[-100], a[6])  # as everywhere: it does not count


def test_one_end_of_an_answer_is_no_label():
    """Theirs returns no loss, and says nothing."""
    ours, theirs = start("BertForQuestionAnswering", SMALL)
    inputs = make_batch(SMALL, 2, 6)
    place = torch.tensor([1, 2])
    assert theirs(**inputs, start_positions=place).loss is None
    for one, lacking in (("start", "end"), ("end", "start")):
        with pytest.raises(ValueError, match=f"{lacking}_positions is missing"):
            ours(**inputs, **{f"{one}_positions": place})


def test_each_order_of_the_segments_trains_and_a_constant_answer_costs():
    """Not so with one loss for both heads that ignores 0, the padding."""
    torch.manual_seed(7)
    model = randomize(bertnb.BertForPreTraining(SMALL))
    inputs = make_batch(SMALL, 4, 6)
    words = torch.full((4, 6), -100)
    head = model.next_sentence
    for label in (0, 1):
        order = torch.full((4,), label)
        loss = model(**inputs, labels=words, next_sentence_label=order).loss
        (gradient,) = torch.autograd.grad(loss, head.weight)
        assert gradient.abs().max() > 1e-3
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([-9.0, 9.0]))  # always "not next"
    mixed = torch.tensor([0, 1, 0, 1])
    loss = model(**inputs, labels=words, next_sentence_label=mixed).loss
    assert loss.item() == pytest.approx(9, abs=0.01)


# problem_type, theirs: what the labels of a classifier mean


@pytest.mark.parametrize(
    ("count", "kind", "right"),
    [
        (1, None, True),
        (1, "regression", True),
        (3, None, True),
        (3, "single_label_classification", True),
        (1, "single_label_classification", False),
        (3, "regression", False),
        (3, "multi_label_classification", False),
        (1, "multi_label_classification", False),
    ],
)
def test_a_problem_type_is_ours_or_refused(tmp_path, count, kind, right):
    torch.manual_seed(6)
    config = transformers.BertConfig(
        **SMALL.to_dict(), num_labels=count, attn_implementation="eager"
    )
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"  # theirs would refuse one of the cases
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"problem_type": kind}))
    theirs.config.problem_type = kind
    load = bertnb.BertForSequenceClassification.from_pretrained
    if not right:
        words = f"problem_type='{kind}' with num_labels={count}"
        with pytest.raises(ValueError, match=words):
            load(tmp_path)
        return
    inputs = make_batch(SMALL, 4, 6)
    labels = torch.tensor([0.5, 2, -1, 0]) if count == 1 else torch.arange(4)
    inputs["labels"] = labels.clamp(max=2)
    compare(load(tmp_path), theirs, inputs)


def test_labels_of_another_kind_are_refused_and_not_guessed():
    inputs = make_batch(SMALL, 4, 6)
    several = bertnb.BertForSequenceClassification(SMALL, num_labels=3)
    with pytest.raises(ValueError, match=r"labels has shape \(4, 3\)"):
        several(**inputs, labels=torch.zeros(4, 3))  # theirs: several at once
    with pytest.raises(TypeError, match=r"labels has dtype torch.float32"):
        several(**inputs, labels=torch.zeros(4))
    number = bertnb.BertForSequenceClassification(SMALL, num_labels=1)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        number(**inputs, labels=torch.zeros(3))
    column, row = (
        number.eval()(**inputs, labels=torch.ones(shape)).loss
        for shape in ((4, 1), (4,))
    )
    assert torch.equal(column, row)


def test_labels_and_positions_outside_their_range_are_named():
    inputs = make_batch(SMALL, 2, 6)
    tokens = bertnb.BertForTokenClassification(SMALL, num_labels=3)
    labels = torch.zeros(2, 6).long()
    with pytest.raises(ValueError, match="labels holds 3; expected 0 to 2"):
        tokens(**inputs, labels=labels + 3)
    with pytest.raises(ValueError, match=r"labels has shape \(2, 5\)"):
        tokens(**inputs, labels=labels[:, 1:])
    answers = bertnb.BertForQuestionAnswering(SMALL)
    good = torch.tensor([0, 5])
    for bad in ("start_positions", "end_positions"):
        places = {"start_positions": good, "end_positions": good}
        with pytest.raises(ValueError, match=f"{bad} holds -1; expected 0 to"):
            answers(**inputs, **places | {bad: torch.tensor([0, -1])})
        with pytest.raises(ValueError, match=rf"{bad} has shape \(1,\)"):
            answers(**inputs, **places | {bad: torch.tensor([0])})
