"""Two processes, started by torchrun, do what one would have done."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bertnb import (
    BertConfig,
    BertForPreTraining,
    PretrainConfig,
    PretrainingRun,
    World,
    adamw,
    memory_per_rank,
    train,
)

SMALL = BertConfig(
    vocab_size=96,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CURVE = PretrainConfig(
    "curve",
    SMALL,
    "corpus",
    sequence_length=24,
    batch_size=8,
    total_steps=6,
    eval_every=1,
    eval_batches=1,
    device="cpu",
    precision="float32",
)
LONG = replace(
    CURVE,
    output_dir="calm",
    model=replace(SMALL, hidden_dropout_prob=0.1),
    total_steps=40,
    eval_every=20,
    save_every=2,
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
DOCUMENTS = [[[10 + d] * 7 for _ in range(9)] for d in range(11)]


def torchrun(folder, program, *options):
    """Run a program in two processes, in a folder; return what they printed."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1", "--nproc-per-node=2", *options]
    done = subprocess.run(
        [*command, "program.py"],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ragged(rank):
    """Rows of which those of rank 0 have many targets, of rank 1 few."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, 96, (4, 12), generator=generator)
    positions = torch.arange(1, 9).expand(4, 8)
    targets = ids.gather(1, positions).clone()
    kept = torch.tensor([[8, 7, 6, 5], [1, 2, 1, 0]])[rank]
    targets[torch.arange(8) >= kept[:, None]] = -100
    order = torch.tensor([[0, 1, 1, 0], [1, -100, -100, -100]])[rank]
    return {
        "input_ids": ids,
        "masked_positions": positions,
        "labels": targets,
        "next_sentence_label": order,
    }


def joined(first, second):
    """Return the rows of both ranks as one batch."""
    return {name: torch.cat([first[name], second[name]]) for name in first}


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


WORKER = """
import copy
import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from bertnb import (
    BertConfig,
    BertForPreTraining,
    PretrainConfig,
    PretrainingData,
    WordPieceTokenizer,
    accumulate_gradients,
    adamw,
    full_state,
    pretrain,
    shard_model,
    train,
)

rank = int(os.environ["RANK"])
"""

GRADIENTS = """
dist.init_process_group("gloo")
batch = torch.load("batches.pt")[rank]
plain = BertForPreTraining.from_pretrained("model")
found = {}


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


for parts in (1, 2, 3):
    model = copy.deepcopy(plain)
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    loss = accumulate_gradients(network, batch, parts)
    found[parts] = loss, flat(model)

network.zero_grad()
network(**batch).loss.backward()
found["means"] = flat(model)
"""

SPREAD = """
def held(tensors):
    parts = [t.to_local() for t in tensors]
    return sum(p.numel() * p.element_size() for p in parts)


model = shard_model(copy.deepcopy(plain))
found["units"] = [
    name for name, m in model.named_modules() if isinstance(m, FSDPModule)
]
optimizer = adamw(model)
reports = list(train(model, optimizer, [batch] * 3, lambda step: 1e-2))
found["losses"] = [float(report.loss) for report in reports]
found["norms"] = [float(report.grad_norm) for report in reports]
found["state"] = full_state(model)
found["held"] = {
    "weights": held(model.parameters()),
    "moments": held(
        state[name]
        for state in optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ),
}
torch.save(found, f"{rank}.pt")
"""

ROWS = """
tokenizer = WordPieceTokenizer.train(["abc " * 100], 90)
special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
data = PretrainingData(
    DOCUMENTS, tokenizer, length=32, batch_size=1, rank=rank, ranks=2
)
steps, epochs = data.batches_per_epoch, []
for epoch in range(3):
    seen = set()
    for step in range(epoch * steps, (epoch + 1) * steps):
        batch = {name: tensor[0] for name, tensor in data.batch(step).items()}
        ids, real = batch["input_ids"].clone(), batch["labels"] != -100
        ids[batch["masked_positions"][real]] = batch["labels"][real]
        seen |= set(ids[batch["attention_mask"].bool()].tolist()) - special
    epochs.append(sorted(seen))
Path(f"{rank}.json").write_text(json.dumps([steps, epochs]))
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """What two processes found and trained while nothing disturbed them."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    model = BertForPreTraining(SMALL)
    model.save_pretrained(folder / "model")
    torch.save([ragged(0), ragged(1)], folder / "batches.pt")
    (folder / "corpus").mkdir()
    for number in range(30):
        animal = ("cat", "dog", "owl", "fox")[number % 4]
        lines = [f"The {animal} saw {n} birds on a tree." for n in range(9)]
        (folder / f"corpus/{number:02}.txt").write_text(" ".join(lines))
    runs = "".join(f"pretrain({c!r}, progress=False)\n" for c in (CURVE, LONG))
    rows = f"DOCUMENTS = {DOCUMENTS}\n{ROWS}"
    ending = "dist.destroy_process_group()\n"
    torchrun(folder, WORKER + GRADIENTS + SPREAD + rows + runs + ending)
    found = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    return SimpleNamespace(folder=folder, model=model, found=found)


@pytest.mark.equation("14.1", "14.2")
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gradients_of_two_processes_are_those_of_one(calm, parts, measured):
    model = calm.model
    model.zero_grad()
    loss = model(**joined(ragged(0), ragged(1))).loss
    loss.backward()
    for found in calm.found:
        theirs, gradient = found[parts]
        measured(theirs - loss, 1e-6)
        measured(gradient - flat(model), 1e-6)
    assert calm.found[0][parts][1].equal(calm.found[1][parts][1])
    # with these counts, the mean of the ranks' means is another gradient
    apart = calm.found[0]["means"] - flat(model)
    assert apart.norm() > 0.1 * flat(model).norm()


def test_a_model_that_is_spread_learns_as_one_that_is_not(calm):
    alone = BertForPreTraining(SMALL)
    alone.load_state_dict(calm.model.state_dict())
    batches = [joined(ragged(0), ragged(1))] * 3
    reports = list(train(alone, adamw(alone), batches, lambda step: 1e-2))
    losses = [float(report.loss) for report in reports]
    norms = [float(report.grad_norm) for report in reports]
    for found in calm.found:
        assert found["losses"] == pytest.approx(losses, abs=1e-5)
        assert found["norms"] == pytest.approx(norms, rel=1e-4)
        assert list(found["state"]) == list(alone.state_dict())
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(
                found["state"][name], tensor, atol=1e-4, rtol=0
            )
    assert losses[2] < losses[0] - 0.1


@pytest.mark.equation("14.7")
def test_each_rank_holds_half_of_a_model_that_is_spread(calm, measured):
    count = sum(p.numel() for p in calm.model.parameters())
    paper = memory_per_rank(count, ranks=2, stage=3)
    layers = [f"bert.encoder.layer.{number}" for number in (0, 1)]
    for found in calm.found:
        assert found["units"] == ["", *layers]  # gathered one after the other
        for name, size in found["held"].items():  # all lengths are even here
            measured(size - paper[name], 0)


def test_what_the_processes_read_is_disjoint_and_together_all(calm):
    """Document d holds only the token 10 + d: a row tells what it is from."""
    (steps, first), (their_steps, second) = (
        json.loads((calm.folder / f"{rank}.json").read_text())
        for rank in (0, 1)
    )
    assert steps == their_steps  # else one would wait for ever
    for mine, theirs in zip(first, second, strict=True):
        assert set(mine).isdisjoint(theirs)
        assert sorted(mine + theirs) == [10 + d for d in range(len(DOCUMENTS))]
    assert len({tuple(seen) for seen in first}) > 1  # dealt anew each epoch


def log(folder):
    """Return a run's facts, and its records without their seconds."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    facts, *records = map(json.loads, lines)
    return facts, [{**record, "seconds": 0} for record in records]


def test_a_run_of_two_processes_is_that_of_one_with_their_rows(
    calm, tmp_path, monkeypatch
):
    monkeypatch.chdir(calm.folder)
    cpu = torch.device("cpu")
    config = replace(CURVE, output_dir=str(tmp_path))
    runs = [PretrainingRun(config, World(rank, 2, cpu)) for rank in (0, 1)]
    torch.manual_seed(config.seed)
    model = BertForPreTraining(config.model)
    batches = (
        joined(*(run.batch(step) for run in runs))
        for step in range(config.total_steps)
    )
    reports = train(model, adamw(model), batches, config.learning_rate_at)
    losses = [float(report.loss) for report in reports]
    _, records = log(calm.folder / "curve")
    found = [record["training_loss"] for record in records]
    assert found == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]
    saved = BertForPreTraining.from_pretrained(calm.folder / "curve")
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(
            tensor, model.state_dict()[name], atol=1e-4, rtol=0
        )


KILLED = """
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
checkpoints = Path("killed/checkpoints")
before = set(checkpoints.glob("step-*.pt"))


def die():
    while not set(checkpoints.glob("step-*.pt")) - before:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


print(f"rank {rank}, attempt {attempt}", flush=True)
if attempt + rank == 1:
    threading.Thread(target=die, daemon=True).start()
"""


def test_a_run_outlives_each_of_its_processes(calm):
    """Rank 1 is killed, and after the restart rank 0, which does the saving."""
    call = f"pretrain({replace(LONG, output_dir='killed')!r}, progress=False)"
    printed = torchrun(calm.folder, WORKER + KILLED + call, "--max-restarts=2")
    assert printed.count("rank 0") == printed.count("rank 1") == 3
    facts, records = log(calm.folder / "killed")
    assert len(facts["resumed_at"]) == 2
    assert records == log(calm.folder / "calm")[1]
    undisturbed, survivor = (
        BertForPreTraining.from_pretrained(calm.folder / name).state_dict()
        for name in ("calm", "killed")
    )
    for name, tensor in undisturbed.items():
        assert survivor[name].equal(tensor), name


JOINS = """
from bertnb import World

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
for turn in range(3):
    with World.join("cpu") as world:
        if attempt + rank == 1 and turn == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        met = world.gather((world.rank, turn, attempt))
        assert met == [(0, turn, attempt), (1, turn, attempt)]
        print(f"rank {rank}, attempt {attempt}, turn {turn}", flush=True)
"""


def test_a_group_never_calls_those_of_an_earlier_one(tmp_path):
    """Groups one after the other, and after each process has died once."""
    printed = torchrun(tmp_path, WORKER + JOINS, "--max-restarts=2")
    for rank in (0, 1):
        for turn in range(3):
            assert f"rank {rank}, attempt 2, turn {turn}" in printed
