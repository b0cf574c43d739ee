"""Two passes that agree: the price, the loss, and all five heads."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config_for, tokenizer_of
from torch import nn

from bertnb import (
    Answer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    FineTuneConfig,
    QuestionAnswering,
    QuestionExample,
    ReadTwice,
    SequenceClassification,
    SequenceRegression,
    TextExample,
    TokenClassification,
    TokenExample,
    accumulate_gradients,
    disagreement,
    dropping,
    fine_tune,
    load_for_task,
    pad_rows,
    worth_packing,
)

TOKENIZER = tokenizer_of("good bad fine film was the")
CONFIG = config_for(TOKENIZER, num_hidden_layers=2)
STILL = replace(
    CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
SCORES = st.lists(st.floats(-6, 6), min_size=2, max_size=5)


def by_hand(first, again):
    """(16.15) of two lists of scores, without PyTorch."""
    p_all, q_all = (
        [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        for scores in (first, again)
    )

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    return (kl(p_all, q_all) + kl(q_all, p_all)) / 2


@pytest.mark.equation("16.15")
@given(first=SCORES, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_price_is_the_mean_of_both_directions(measured, first, seed):
    chance = torch.Generator().manual_seed(seed)
    again = torch.randn(len(first), generator=chance)
    one, two = torch.tensor([first]), again[None]
    target = torch.tensor([1])
    found = disagreement(one, two, target)
    measured(found - by_hand(first, again.tolist()), 1e-5)
    assert found >= 0
    assert torch.equal(found, disagreement(two, one, target))
    assert disagreement(one, one + 3, target) < 1e-6  # the same answer


@pytest.mark.equation("16.16")
@given(scores=SCORES, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_small_differences_cost_half_their_variance(measured, scores, seed):
    chance = torch.Generator().manual_seed(seed)
    apart = torch.randn(len(scores), generator=chance) * 1e-2
    one = torch.tensor([scores])
    weights = one[0].softmax(-1)
    half = (weights * (apart - (weights * apart).sum()) ** 2).sum() / 2
    found = disagreement(one, one + apart, torch.tensor([0]))
    measured(found - half, 3e-6)  # the third order


def test_only_targets_that_count_have_a_price():
    one, two = torch.randn(2, 3, 4, 5)
    targets = torch.tensor([[0, -100, 4, 5], [-100] * 4, [2, 1, -100, 3]])
    counted = [(0, 0), (0, 2), (2, 0), (2, 1), (2, 3)]  # 5 is cut off
    expected = [by_hand(one[i].tolist(), two[i].tolist()) for i in counted]
    found = disagreement(one, two, targets)
    assert found.item() == pytest.approx(sum(expected) / 5, rel=1e-4)
    assert disagreement(one, two, torch.full((3, 4), -100)) == 0


def test_numbers_pay_the_square():
    one, two = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]])
    assert disagreement(one, two, torch.tensor([0.5, 0.5])) == 4.5


@pytest.mark.parametrize(
    ("first", "again", "targets"),
    [((3, 2), (2, 2), 3), ((3, 2), (3, 3), 3), ((3, 2), (3, 2), 2)],
)
def test_shapes_that_do_not_fit_are_named(first, again, targets):
    labels = torch.zeros(targets, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and .*, targets"):
        disagreement(torch.zeros(first), torch.zeros(again), labels)


TEXTS = ["good film", "the film was bad", "fine", "bad bad film the good"]
TASKS = {
    "classes": (
        SequenceClassification(
            [TextExample(t, "+" if "good" in t else "-") for t in TEXTS]
        ),
        BertForSequenceClassification(CONFIG, labels=["+", "-"]),
    ),
    "numbers": (
        SequenceRegression([TextExample(t, float(len(t))) for t in TEXTS]),
        BertForSequenceClassification(CONFIG, num_labels=1),
    ),
    "tags": (
        TokenClassification(
            [
                TokenExample(
                    tuple(t.split()),
                    tuple("B-X" if w == "film" else "O" for w in t.split()),
                )
                for t in TEXTS
            ]
        ),
        BertForTokenClassification(CONFIG, labels=["B-X", "O"]),
    ),
    "answers": (
        QuestionAnswering(
            [
                QuestionExample(
                    "the film", t, (Answer(t.split()[-1], t.rindex(" ") + 1),)
                )
                for t in TEXTS
                if " " in t
            ]
        ),
        BertForQuestionAnswering(CONFIG),
    ),
}


@pytest.mark.equation("16.17")
@pytest.mark.parametrize("kind", TASKS)
def test_the_loss_is_that_of_both_passes_and_their_price(measured, kind):
    task, model = TASKS[kind]
    batch = pad_rows(task.rows(task.training, TOKENIZER, 16), 0)
    twice = {name: torch.cat([t, t]) for name, t in batch.items()}
    reader = ReadTwice(model, 0.7).train()
    torch.manual_seed(3)
    found = reader(**batch)
    torch.manual_seed(3)
    passes = model(**twice)  # the same numbers are dropped
    prices = [
        disagreement(*scores.chunk(2), batch[name])
        for name, scores in (
            ("labels", getattr(passes, "logits", None)),
            ("start_positions", getattr(passes, "start_logits", None)),
            ("end_positions", getattr(passes, "end_logits", None)),
        )
        if scores is not None
    ]
    assert all(price > 0 for price in prices)
    expected = passes.loss + 0.7 * sum(prices) / len(prices)
    measured(found.loss - expected, 1e-6)
    measured(found.loss - sum(found.losses.values()), 1e-6)
    assert set(found.losses) == set(passes.losses)


@dataclass(frozen=True)
class Said:
    logits: torch.Tensor
    losses: dict[str, torch.Tensor]
    loss: torch.Tensor | None = None


class Odd(nn.Module):
    """A model whose second pass is another one, without chance."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, input_ids, labels):
        halves = zip(input_ids.chunk(2), self.weight, strict=True)
        logits = torch.cat([half @ weight for half, weight in halves])
        loss = nn.functional.cross_entropy(logits, labels)
        return Said(logits, {"labels": loss})


def test_in_parts_the_gradient_is_that_of_the_whole():
    batch = {
        "input_ids": torch.randn(8, 3),
        "labels": torch.tensor([0, 1, -100, 3, -100, -100, 2, 1]),
    }
    slopes = []
    for parts in (1, 3):
        model = Odd()
        loss = accumulate_gradients(ReadTwice(model, 2.0), batch, parts)
        slopes.append((loss, model.weight.grad))
    for whole, sum_of_parts in zip(*slopes, strict=True):
        assert torch.allclose(whole, sum_of_parts, atol=1e-6)
    copy = model.weight.detach().clone().requires_grad_()
    first, again = (batch["input_ids"] @ weight for weight in copy)
    labels = batch["labels"]
    expected = 2 * disagreement(first, again, labels) + sum(
        nn.functional.cross_entropy(scores, labels) / 2
        for scores in (first, again)
    )
    assert torch.allclose(slopes[0][0], expected, atol=1e-6)
    expected.backward()  # through both passes
    assert torch.allclose(slopes[0][1], copy.grad, atol=1e-6)


@pytest.mark.parametrize(
    "cls", [BertForSequenceClassification, BertForTokenClassification]
)
def test_packed_rows_are_read_twice_too(cls):
    config = replace(CONFIG, max_position_embeddings=32)
    model = cls(config, num_labels=2)
    reader = ReadTwice(model, 0.5).train()
    lengths = torch.tensor([30] + [3] * 11)
    mask = torch.arange(30) < lengths[:, None]
    batch = {
        "input_ids": torch.randint(5, CONFIG.vocab_size, (12, 30)),
        "attention_mask": mask,
        "labels": torch.randint(2, (12, 30)).where(mask, -100),
    }
    if cls is BertForSequenceClassification:
        batch["labels"] = batch["labels"][:, 0]
    assert worth_packing(mask)
    with dropping(model, 0.0):  # two equal passes: nothing to pay
        found, alone = reader(**batch).loss, model(**batch).loss
    assert torch.allclose(found, alone, atol=1e-6)


def test_a_model_that_drops_nothing_is_refused():
    still = BertForSequenceClassification(STILL)
    with pytest.raises(ValueError, match=r"r_drop=0.5: .* set dropout"):
        ReadTwice(still, 0.5)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        some = replace(STILL, **{name: 0.1})
        ReadTwice(BertForSequenceClassification(some), 0.5)
    config = FineTuneConfig(r_drop=0.5, dropout=0.0, max_length=16, min_steps=1)
    task, model = TASKS["classes"]
    with pytest.raises(ValueError, match=r"r_drop=0.5: .* set dropout"):
        fine_tune(task, model, TOKENIZER, config, progress=False)


def test_fine_tuning_pays_the_price_and_learns_to_agree(tmp_path):
    task, model = TASKS["classes"]
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    rows = pad_rows(task.rows(task.training, TOKENIZER, 16), 0)
    prices = []
    for weight in (0.0, 50.0):
        config = FineTuneConfig(
            r_drop=weight,
            learning_rate=1e-2,
            max_length=16,
            min_steps=40,
            batch_size=4,
            device="cpu",
            precision="float32",
        )
        model, _ = load_for_task(task, tmp_path)
        fine_tune(task, model, TOKENIZER, config, progress=False)
        torch.manual_seed(0)
        one, two = (
            torch.cat([model.train()(**rows).logits for _ in range(50)])
            for _ in range(2)
        )
        labels = rows["labels"].repeat(50)
        prices.append(disagreement(one, two, labels).item())
    assert prices[1] < prices[0] / 2
