"""Every model with a head against transformers, both ways, over random shapes."""

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
HEADS = (
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
)
WANTED = {"output_hidden_states": True, "output_attentions": True}


def close(ours, theirs, bound=1e-5):
    """Equal to `bound`, relative where a number is larger than 1."""
    return torch.allclose(ours, theirs, rtol=bound, atol=bound)


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
    """Ids (never 0, the padding), segments, and rows that end early."""
    lengths = torch.randint(1, length + 1, (rows, 1))
    keep = torch.arange(length) < lengths
    ids = torch.randint(1, config.vocab_size, (rows, length))
    return {
        "input_ids": ids * keep,
        "attention_mask": keep.long(),
        "token_type_ids": torch.randint(config.type_vocab_size, (rows, length)),
    }


def make_labels(name, config, rows, length, num_labels):
    words = torch.randint(config.vocab_size, (rows, length))
    words[torch.rand(rows, length) < 0.6] = -100
    words[0, 0] = 1  # theirs is nan without any label
    order = torch.randint(2, (rows,))
    if name == "BertForPreTraining":
        return {"labels": words, "next_sentence_label": order}
    if name == "BertForMaskedLM":
        return {"labels": words}
    if name == "BertForNextSentencePrediction":
        return {"labels": order}
    if num_labels == 1:
        return {"labels": torch.randn(rows)}
    return {"labels": torch.randint(num_labels, (rows,))}


def start(name, config, num_labels):
    """Our model and theirs with the same weights, which began with us."""
    head = {}
    if name == "BertForSequenceClassification":
        head = {"num_labels": num_labels}
    ours = randomize(getattr(bertnb, name)(config, **head))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = getattr(transformers, name).from_pretrained(
            folder, attn_implementation="eager"
        )
    return ours, theirs


def compare(a, b):
    """Each field of our output against theirs of the same name."""
    fields = [n for n in vars(a) if getattr(a, n) is not None]
    assert "loss" in fields
    for name in fields:
        one, two = getattr(a, name), getattr(b, name)
        if isinstance(one, tuple):
            one, two = torch.stack(one), torch.stack(two)
        assert one.shape == two.shape, name
        assert close(one, two), (name, (one - two).abs().max())


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=15, deadline=None)
@given(
    config=configs(),
    rows=st.integers(1, 3),
    length=st.integers(1, 12),
    num_labels=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_outputs_and_loss_equal_transformers_both_ways(
    name, config, rows, length, num_labels, seed
):
    torch.manual_seed(seed)
    ours, theirs = start(name, config, num_labels)
    batch = make_batch(config, rows, length)
    labels = make_labels(name, config, rows, length, num_labels)
    with torch.no_grad():
        a, b = (m(**batch, **labels, **WANTED) for m in (ours, theirs))
    compare(a, b)

    randomize(theirs)  # now their weights come to us
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        back = type(ours).from_pretrained(folder)
    with torch.no_grad():
        a, b = (m(**batch, **labels, **WANTED) for m in (back, theirs))
    compare(a, b)


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=10, deadline=None)
@given(
    config=configs(),
    rows=st.integers(1, 3),
    length=st.integers(2, 12),
    num_labels=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_every_gradient_equals_transformers(
    name, config, rows, length, num_labels, seed
):
    torch.manual_seed(seed)
    ours, theirs = start(name, config, num_labels)
    batch = make_batch(config, rows, length)
    labels = make_labels(name, config, rows, length, num_labels)
    if "labels" in labels and labels["labels"].dim() == 2:
        # what stands on padding does not count
        hidden = batch["attention_mask"] == 0
        labels["labels"] = labels["labels"].masked_fill(hidden, -100)
    for model in (ours, theirs):
        model(**batch, **labels).loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for own, parameter in ours.named_parameters():
        expected = gradients[hf_name(own)]
        if parameter.grad is None:
            assert expected is None or not expected.any(), own
        else:
            assert close(parameter.grad, expected, 2e-5), own


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
        assert one is None or close(one, two, 2e-5), own


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
    ours, theirs = start("BertForPreTraining", config, 2)
    batch = make_batch(config, 3, 8)
    labels = make_labels("BertForPreTraining", config, 3, 8, 2)
    with torch.no_grad():
        words, order = (ours(**batch, **{k: labels[k]}).loss for k in labels)
        both, none = ours(**batch, **labels).loss, ours(**batch).loss
        expected = theirs(**batch, **labels).loss
    assert none is None
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
