"""No step of training looks at a value on the device: what reads one makes
the host wait. The CPU stands for a GPU here."""

import pytest
import torch
from tiny import config_for, tokenizer_of
from torch.utils._python_dispatch import TorchDispatchMode

from bertnb import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    adamw,
    may_look,
    move,
)
from bertnb.optimization import train

CONFIG = config_for(tokenizer_of("a b c"))
WHERE = (2, 5)
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


class NoLook(TorchDispatchMode):
    """Whatever depends on a value is an error."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::").split(".")[0]
        chosen = args[1] if name == "index" else ()
        masks = [i for i in chosen if i is not None and i.dtype == torch.bool]
        if name in LOOKS or masks:
            raise AssertionError(f"{op} looks at the device")
        return op(*args, **(kwargs or {}))


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


HEADS = {
    "classes": (
        lambda: BertForSequenceClassification(CONFIG, num_labels=3),
        {"labels": integers(2)},
    ),
    "a number": (
        lambda: BertForSequenceClassification(CONFIG, num_labels=1),
        {"labels": torch.zeros(2)},
    ),
    "a class a token": (
        lambda: BertForTokenClassification(CONFIG, num_labels=3),
        {"labels": integers(*WHERE)},
    ),
    "a span": (
        lambda: BertForQuestionAnswering(CONFIG),
        {"start_positions": integers(2), "end_positions": integers(2)},
    ),
    "pretraining": (
        lambda: BertForPreTraining(CONFIG),
        {"labels": integers(*WHERE), "next_sentence_label": integers(2)},
    ),
}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Let the checks decide as for tensors on a GPU."""

    def may(values):
        return not torch.is_grad_enabled() and may_look(values)

    def tolist(self):
        raise AssertionError("tolist looks at the device")

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)  # is no operation
    monkeypatch.setattr("bertnb.positions.may_look", may)
    monkeypatch.setattr("bertnb.masked_lm.may_look", may)
    monkeypatch.setattr("bertnb.packing.may_look", may)
    monkeypatch.setattr("bertnb.optimization._patience", lambda device: 16)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_do_not_wait(name, parts, on_a_gpu):
    build, targets = HEADS[name]
    model = build()
    batch = {
        "input_ids": integers(*WHERE),
        "token_type_ids": integers(*WHERE),
        "attention_mask": torch.ones(WHERE, dtype=torch.int64),
        **targets,
    }
    steps = train(
        model, adamw(model), [batch] * 3, lambda step: 1e-3, parts=parts
    )
    with NoLook():
        assert [next(steps).step for _ in range(3)] == [0, 1, 2]
    with torch.no_grad(), NoLook(), pytest.raises(AssertionError, match="look"):
        model(input_ids=batch["input_ids"])  # nobody waits for speed here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", HEADS)
def test_steps_do_not_wait_for_a_gpu(name):
    build, targets = HEADS[name]
    model = build().cuda()
    batch = {"input_ids": integers(*WHERE), **targets}
    steps = train(model, adamw(model), [batch] * 9, lambda step: 1e-3)
    [next(steps) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        [next(steps) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_a_check_may_look_at(monkeypatch):
    ids = integers(2)
    assert may_look(ids)
    assert not may_look(ids[:0])
    fake = type("Ids", (), {"is_cuda": True, "numel": ids.numel})()
    assert not may_look(fake)
    with torch.no_grad():
        assert may_look(fake)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not may_look(fake)


def test_a_tensor_that_is_there_is_not_copied():
    here = torch.zeros(2)
    assert move(here, torch.device("cpu")) is here


def test_a_tensor_is_pinned_once_before_it_goes_to_a_gpu(monkeypatch):
    done = []

    class Stub:
        def __init__(self, is_cuda):
            self.is_cuda = is_cuda

        def pin_memory(self):
            done.append("pin")
            return self

        def to(self, device, non_blocking):
            done.append(non_blocking)

    move(Stub(False), torch.device("cuda"))
    move(Stub(True), torch.device("cuda"))
    move(Stub(True), torch.device("cpu"))  # must have arrived before it is read
    assert done == ["pin", True, True, False]
