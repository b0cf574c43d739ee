"""The run.

Written by tools/extract.py from notebooks/12_run.md: edit that notebook, not this file.
"""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bertnb.configuration import BertnbError
from bertnb.optimization import (
    Step,
    adamw,
    pick_device,
    pick_precision,
    probe_compile,
    train,
)
from bertnb.pretraining import BertForPreTraining, evaluate_pretraining
from bertnb.recipe import (
    Corpus,
    PretrainConfig,
    load_corpus,
    memory_advice,
    run_facts,
)
from bertnb.rows import Batch, PretrainingData
from bertnb.runs import (
    Checkpoints,
    StopRequest,
    World,
    locked,
    prefetch,
    refuse_changes,
)
from bertnb.tokenization import WordPieceTokenizer

__all__ = ["PretrainingRun", "PretrainResult", "pretrain"]


# %% The state, in memory and on disk
class PretrainingRun:
    """The model, the data and the state of one run.

    Args:
        world: the processes of the run; None: this one alone.

    Raises:
        ValueError: the corpus, the tokenizer or the number of processes does
            not fit the configuration.
        BertnbError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, config: PretrainConfig, world: World | None = None
    ) -> None:
        self.began = time.perf_counter()
        self.config = config
        self.world = world or World(0, 1, pick_device(config.device))
        self.folder = Path(config.output_dir)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep)
        self.board = self._open_board()
        corpus = load_corpus(config)
        self.tokenizer = corpus.tokenizer
        self.bound = config.binding() | {"digest of the text": corpus.digest}
        self.training = self._training_data(corpus)
        self.held_out = self._held_out_data(corpus)
        torch.manual_seed(config.seed)
        self.model = BertForPreTraining(config.model).to(self.world.device)
        if self.world.rank:  # other dropout, not other weights
            torch.manual_seed(config.seed + 1000 * self.world.rank)
        self.optimizer = adamw(
            self.model,
            config.weight_decay,
            bias_correction=config.bias_correction,
        )
        named = config.precision
        self.precision: torch.dtype = (
            pick_precision(self.world.device)
            if named == "auto"
            else getattr(torch, named)
        )
        half = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)
        self.facts = run_facts(config, self.world.size)
        self.done = self.taken = 0  # steps of the run, and of this call
        self.records: list[dict[str, Any]] = []
        # since the last record: the losses' sum, their number, steps not taken
        self.tally = torch.zeros(3, device=self.world.device)

    def _training_data(self, corpus: Corpus) -> PretrainingData:
        config, ranks = self.config, self.world.size
        if config.batch_size % (ranks * config.parts):
            raise ValueError(
                f"batch_size={config.batch_size} does not go into {ranks} "
                f"processes with parts={config.parts}: choose a multiple of "
                f"{ranks * config.parts}"
            )
        return PretrainingData(
            corpus.training,
            self.tokenizer,
            config.sequence_length,
            config.batch_size // ranks,
            max(config.mlm_probability, config.final_mlm_probability or 0.0),
            config.seed,
            config.sampler,
            pack=config.pack,
            rank=self.world.rank,
            ranks=ranks,
        )

    def _held_out_data(self, corpus: Corpus) -> PretrainingData:
        """Return held-out rows in batches of 32, or of 1 if they are few."""
        pairs = PretrainingData(
            corpus.held_out, self.tokenizer, self.config.sequence_length, 1
        )
        if pairs.batches_per_epoch < 32:
            return pairs
        return PretrainingData(
            corpus.held_out, self.tokenizer, self.config.sequence_length, 32
        )

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step, on its device."""
        rate = self.config.mlm_probability_at(step)
        return self.training.batch(step, self.world.device, rate)

    def steps(self) -> Iterator[Step]:
        """Take the steps that are still to be done, and report each."""
        config = self.config
        network: nn.Module = self.model
        left = range(self.done, config.total_steps)
        if config.compile and left:
            rows = config.batch_size // self.world.size // config.parts
            batch = {k: t[:rows] for k, t in self.batch(self.done).items()}
            network = probe_compile(
                network, batch, self.world.device, self.precision
            )
        skipped = torch.zeros((), device=self.world.device)
        for report in train(
            self.world.wrap(network),
            self.optimizer,
            prefetch(self.batch, left),
            config.learning_rate_at,
            self.done,
            config.max_grad_norm,
            self.precision,
            config.parts,
            self.scaler if self.scaler.is_enabled() else None,
            config.on_nonfinite,
        ):
            self.done, self.taken = report.step + 1, self.taken + 1
            loss = report.loss  # not finite in some steps that are not taken
            news = loss.nan_to_num(0, 0), loss.isfinite(), report.skipped
            self.tally += torch.stack([n.float() for n in news])
            self.tally[2] -= skipped
            skipped = report.skipped
            yield report

    def evaluate(self, seconds: float) -> None:
        """Score the model on held-out rows, and write the log."""
        scores = evaluate_pretraining(
            self.model, self.held_out, self.config.eval_batches
        )
        total, count, skipped = self.tally.tolist()
        record = {
            "step": self.done,
            "training_loss": total / max(1, count),
            "skipped_steps": int(skipped),
            "learning_rate": self.config.learning_rate_at(self.done - 1),
            "mlm_probability": self.config.mlm_probability_at(self.done - 1),
            "seconds": round(seconds, 1),
        }
        self.records.append(record | asdict(scores))
        self.tally.zero_()
        if not self.picky or self.waited == 0:
            self.export()
        self._write_log()

    def export(self) -> None:
        """Write the model and the tokenizer to the folder of the run."""
        if self.world.rank == 0:
            self.model.save_pretrained(self.folder)
            limit = self.config.model.max_position_embeddings
            self.tokenizer.save_pretrained(self.folder, limit)

    @property
    def picky(self) -> bool:
        """Whether the folder gets the best model instead of the latest."""
        return (self.config.patience, self.config.divergence) != (None, None)

    @property
    def waited(self) -> int:
        """How many evaluations lie behind the one with the lowest loss."""
        losses = [record["masked_lm_loss"] for record in self.records]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @property
    def rise(self) -> float:
        """By how much the last held-out loss is above the lowest, in nats."""
        losses = [record["masked_lm_loss"] for record in self.records]
        return losses[-1] - min(losses) if losses else 0.0

    def _write_log(self) -> None:
        """Write all records to `log.jsonl`; it is whole at every moment."""
        if self.world.rank:
            return
        lines = [self.facts, *self.records]
        unfinished = self.folder / "log.jsonl.tmp"
        unfinished.write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        unfinished.replace(self.folder / "log.jsonl")
        if self.board is not None:
            for name, value in self.records[-1].items():
                self.board.add_scalar(name, value, self.done)
            self.board.flush()

    def _open_board(self) -> Any:
        if not self.config.tensorboard or self.world.rank:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise BertnbError(
                "tensorboard=True needs the package tensorboard: pip install "
                "tensorboard"
            ) from error
        return SummaryWriter(str(self.folder / "tensorboard"))

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        device = self.world.device
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        everyones = self.world.gather(random)
        state = {
            "bound": json.dumps(self.bound),
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": everyones,
            "tally": self.tally,
            "log": json.dumps([self.facts, *self.records]),
        }
        if self.world.rank == 0:
            self.checkpoints.save(self.done, state)
        self.world.gather(None)  # nobody goes on before it is on the disk

    def resume(self) -> None:
        """Take over the newest whole checkpoint in the folder, if there is one.

        Raises:
            BertnbError: it belongs to another configuration or other texts.
        """
        state = None
        for rank in range(self.world.size):  # one after the other: files may be
            if rank == self.world.rank:  # set aside
                state = self.checkpoints.load(self.world.device)
            self.world.gather(None)
        if state is None:
            return
        refuse_changes(json.loads(state["bound"]), self.bound, self.folder)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.done, self.tally = state["done"], state["tally"]
        self.facts, *self.records = json.loads(state["log"])
        self.facts["resumed_at"] = [*self.facts["resumed_at"], self.done]
        self._take_random(state["random"])

    def _take_random(self, everyones: list[dict[str, torch.Tensor]]) -> None:
        if len(everyones) != self.world.size:
            warnings.warn(
                f"the checkpoint is of {len(everyones)} processes, now there "
                f"are {self.world.size}: the run goes on with other batches",
                stacklevel=2,
            )
        random = everyones[self.world.rank % len(everyones)]
        torch.set_rng_state(random["cpu"].cpu())  # dropout goes on as it was
        if "cuda" in random and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"].cpu(), self.world.device)


# %% The loop on one screen
@dataclass(frozen=True)
class PretrainResult:
    """The trained model and tokenizer, the records, and why it stopped.

    `stopped` is None after the last step; else "patience" or "divergence",
    which end a run, or "SIGTERM", "SIGINT", "max_seconds" or "max_tokens":
    then the same call goes on where it stopped.
    """

    model: BertForPreTraining
    tokenizer: WordPieceTokenizer
    records: list[dict[str, Any]]
    stopped: str | None = None


def pretrain(config: PretrainConfig, progress: bool = True) -> PretrainResult:
    """Train a BERT on both objectives, (12.1), and save it as it learns.

    Called again with the same configuration, it goes on where it stopped;
    under torchrun, all processes train the same model. `output_dir` gets the
    model and the tokenizer in Hugging Face's layout, `checkpoints/` to go on
    from, and `log.jsonl`: in its first line the configuration, hardware,
    versions and commit, then a line an evaluation.

    Args:
        progress: show a bar on standard error.

    Raises:
        BertnbError: `output_dir` holds a run of another configuration, or a
            model of none, or another process writes to it; the memory of the
            GPU is too small.
        FloatingPointError: the loss is not finite any more.
        ValueError: the corpus or the tokenizer does not fit the configuration.
    """
    with World.join(config.device) as world, StopRequest() as stop:
        alone = locked(config.output_dir) if world.rank == 0 else nullcontext()
        with alone:
            try:
                return _pretrain(config, world, stop, progress)
            except torch.OutOfMemoryError as error:
                raise BertnbError(memory_advice(config, world)) from error


def _pretrain(
    config: PretrainConfig, world: World, stop: StopRequest, progress: bool
) -> PretrainResult:
    run = PretrainingRun(config, world)
    run.resume()
    try:
        stopped = _go_on(run, stop, progress and world.rank == 0)
    except FloatingPointError as error:
        kept = ", ".join(file.name for file in run.checkpoints.files())
        raise FloatingPointError(
            f"{error}. Checkpoints in {run.checkpoints.folder}: {kept or 'none'}"
        ) from error
    model = run.model
    if run.picky and run.records:
        model = BertForPreTraining.from_pretrained(config.output_dir)
        model.to(world.device)
    return PretrainResult(model.eval(), run.tokenizer, run.records, stopped)


def _go_on(
    run: PretrainingRun, stop: StopRequest, progress: bool
) -> str | None:
    """Take steps until the end or a reason to stop, and return the reason."""
    config = run.config
    save_every = config.save_every or config.eval_every
    reason = _reason(run, stop)
    if reason or run.done == config.total_steps:
        return reason
    clock = time.perf_counter()
    with tqdm(
        desc="pretraining",
        total=config.total_steps,
        initial=run.done,
        disable=not progress,
    ) as bar:
        for report in run.steps():
            bar.update()
            last = run.done == config.total_steps
            if last or run.done % config.eval_every == 0:
                if report.failed:
                    continue  # nothing changes any more: `train` will raise
                run.evaluate(time.perf_counter() - clock)
                clock = time.perf_counter()
                bar.set_postfix(held_out=run.records[-1]["masked_lm_loss"])
            reason = None if last else _reason(run, stop)
            if last or reason or run.done % save_every == 0:
                if report.failed:
                    continue
                if reason != "divergence":
                    run.save()
            if reason:
                if not run.picky:
                    run.export()
                break
    return reason


def _reason(run: PretrainingRun, stop: StopRequest) -> str | None:
    """Return why the run stops here, the same on all processes, or None."""
    config, world = run.config, run.world
    if world.size > 1 and run.done % 10:
        return None  # asking all the others takes time
    # at least one step a call, however long it took to get ready
    seconds = time.perf_counter() - run.began if run.taken else 0.0
    bounds = {
        "patience": (run.waited, config.patience),
        "divergence": (run.rise, config.divergence),
        "max_seconds": (seconds, config.max_seconds),
        "max_tokens": (config.places(run.done), config.max_tokens),
    }
    reached = (
        name
        for name, (value, bound) in bounds.items()
        if bound is not None and value >= bound
    )
    return world.agree(stop.name or next(reached, None))
