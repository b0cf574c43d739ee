"""Pretraining.

Written by tools/extract.py from notebooks/12_pretraining.md: edit that notebook, not this file.
"""

import json
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import bertnb
from bertnb.configuration import BertConfig, BertnbError
from bertnb.data import (
    PretrainingData,
    encode_documents,
    load_folder,
    load_sotu,
    split_documents,
)
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.layers import initialize
from bertnb.masked_lm import (
    IGNORE,
    MaskedLMHead,
    gather_positions,
    masked_lm_loss,
)
from bertnb.next_sentence import next_sentence_loss
from bertnb.optimization import (
    adamw,
    linear_warmup_decay,
    pick_device,
    pick_precision,
    train,
)
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "PreTrainingOutput",
    "BertForPreTraining",
    "PretrainingScores",
    "evaluate_pretraining",
    "PretrainConfig",
    "PretrainResult",
    "pretrain",
    "prepare",
    "save_run",
    "run_facts",
    "resume",
]


# %% The joint loss
@dataclass
class PreTrainingOutput:
    """What `BertForPreTraining` returns."""

    loss: Tensor | None
    prediction_logits: Tensor  # (B, L, V), or (B, P, V) with masked_positions
    seq_relationship_logits: Tensor  # (B, 2)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BertForPreTraining(PretrainedModel):
    """BERT with both heads; the loss is their sum, (12.1)."""

    optional = ("cls.",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.masked_lm = MaskedLMHead(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        initialize(self.next_sentence, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        masked_positions: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> PreTrainingOutput:
        """Score the hidden words and the order of the segments.

        `labels` are (B, L), or (B, P) with `masked_positions` (B, P), which decodes those positions only. The loss is the
        sum over the labels that are given; None without any. Other arguments as in `BertModel`.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            output_hidden_states,
            output_attentions,
        )
        hidden = encoded.last_hidden_state
        if masked_positions is not None:
            hidden = gather_positions(hidden, masked_positions)
        words = self.masked_lm(
            hidden, self.bert.embeddings.word_embeddings.weight
        )
        order = self.next_sentence(encoded.pooler_output)
        losses = []
        if labels is not None:
            losses.append(masked_lm_loss(words, labels))
        if next_sentence_label is not None:
            losses.append(next_sentence_loss(order, next_sentence_label))
        loss = torch.stack(losses).sum() if losses else None
        return PreTrainingOutput(
            loss, words, order, encoded.hidden_states, encoded.attentions
        )


# %% Evaluation
@dataclass(frozen=True)
class PretrainingScores:
    """Held-out results: nats and shares, and how many predictions they are the mean of."""

    masked_lm_loss: float
    masked_lm_accuracy: float
    masked_tokens: int
    next_sentence_accuracy: float
    pairs: int


@torch.no_grad()
def evaluate_pretraining(
    model: BertForPreTraining,
    data: PretrainingData,
    max_batches: int | None = None,
) -> PretrainingScores:
    """Score a model on one epoch of data, or on its first batches; means are over tokens and pairs, not over batches."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    loss = words = right_words = right_pairs = pairs = 0.0
    for step in range(
        min(max_batches or data.batches_per_epoch, data.batches_per_epoch)
    ):
        batch = {
            name: tensor.to(device) for name, tensor in data.batch(step).items()
        }
        labels, order = batch.pop("labels"), batch.pop("next_sentence_label")
        output = model(**batch)
        counted = labels != IGNORE
        loss += (
            masked_lm_loss(output.prediction_logits, labels).item()
            * counted.sum().item()
        )
        words += counted.sum().item()
        right_words += (
            ((output.prediction_logits.argmax(-1) == labels) & counted)
            .sum()
            .item()
        )
        right_pairs += (
            (output.seq_relationship_logits.argmax(-1) == order).sum().item()
        )
        pairs += len(order)
    model.train(training)
    return PretrainingScores(
        loss / words,
        right_words / words,
        int(words),
        right_pairs / pairs,
        int(pairs),
    )


# %% The run
@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pretraining run.

    `corpus` is "sotu" or a folder of `*.txt` files. `tokenizer` is a folder; None: a vocabulary of `model.vocab_size`
    pieces is trained on the training documents. `device` None: CUDA where there is one, else the CPU. `precision` is
    "float32", "bfloat16", or "auto": what the device does faster.
    """

    output_dir: str
    model: BertConfig
    corpus: str = "sotu"
    tokenizer: str | None = None
    sequence_length: int = 64
    batch_size: int = 32
    total_steps: int = 1000
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mlm_probability: float = 0.15
    eval_every: int = 250
    eval_batches: int = 40
    seed: int = 0
    device: str | None = None
    precision: str = "auto"


@dataclass(frozen=True)
class PretrainResult:
    """The trained model and tokenizer, and the records of the run."""

    model: BertForPreTraining
    tokenizer: WordPieceTokenizer
    records: list[dict[str, Any]]


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Train a BERT on both objectives; run again with the same configuration it goes on where it stopped.

    Writes to `output_dir`: the model and tokenizer in Hugging Face's layout, `state.pt` (optimiser and step, for going
    on) and `log.jsonl` (first line: the configuration and the machine).

    Raises:
        BertnbError: `output_dir` holds a run of another configuration.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, training, held_out = prepare(config)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    model = BertForPreTraining(config.model).to(device)
    optimizer = adamw(model, config.weight_decay)
    first, records = resume(folder, config, model, optimizer)
    warmup = round(config.warmup_ratio * config.total_steps)

    def schedule(step: int) -> float:
        return config.learning_rate * linear_warmup_decay(
            step + 1, warmup, config.total_steps + 1
        )

    precision = (
        pick_precision(device)
        if config.precision == "auto"
        else getattr(torch, config.precision)
    )
    batches = (
        training.batch(step) for step in range(first, config.total_steps)
    )
    steps = train(
        model,
        optimizer,
        batches,
        schedule,
        first,
        config.max_grad_norm,
        precision,
    )
    losses: list[float] = []
    started = time.perf_counter()
    for report in tqdm(
        steps,
        initial=first,
        total=config.total_steps,
        desc="pretraining",
        leave=False,
    ):
        losses.append(report.loss)
        done = report.step + 1
        if done % config.eval_every == 0 or done == config.total_steps:
            scores = asdict(
                evaluate_pretraining(model, held_out, config.eval_batches)
            )
            elapsed, started = (
                time.perf_counter() - started,
                time.perf_counter(),
            )
            records.append(
                {
                    "step": done,
                    "training_loss": sum(losses) / len(losses),
                    **scores,
                    "seconds": round(elapsed, 1),
                }
            )
            losses.clear()
            save_run(folder, config, model, tokenizer, optimizer, done, records)
    return PretrainResult(model.eval(), tokenizer, records)


def prepare(
    config: PretrainConfig,
) -> tuple[WordPieceTokenizer, PretrainingData, PretrainingData]:
    """Return the tokenizer, and the training and held-out data of a run."""
    documents = (
        load_sotu() if config.corpus == "sotu" else load_folder(config.corpus)
    )
    train_documents, held_documents = split_documents(documents)
    if config.tokenizer is None:
        tokenizer = WordPieceTokenizer.train(
            (d.text for d in train_documents), config.model.vocab_size
        )
    else:
        tokenizer = WordPieceTokenizer.from_pretrained(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces and the model vocab_size={config.model.vocab_size}"
        )

    def data(documents: list[Any], seed: int) -> PretrainingData:
        encoded = encode_documents(documents, tokenizer)
        return PretrainingData(
            encoded,
            tokenizer,
            config.sequence_length,
            config.batch_size,
            config.mlm_probability,
            seed,
        )

    return (
        tokenizer,
        data(train_documents, config.seed),
        data(held_documents, 0),
    )


def save_run(
    folder: Path,
    config: PretrainConfig,
    model: BertForPreTraining,
    tokenizer: WordPieceTokenizer,
    optimizer: torch.optim.Optimizer,
    step: int,
    records: list[dict[str, Any]],
) -> None:
    """Write the model, the tokenizer, the optimiser's state and the log; a killed write leaves the last ones whole."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": json.dumps(asdict(config)),
        "rng": torch.get_rng_state(),
        "records": json.dumps(records),
    }
    torch.save(state, folder / "state.pt.tmp")
    (folder / "state.pt.tmp").replace(folder / "state.pt")
    lines = [json.dumps(line) for line in (run_facts(config), *records)]
    (folder / "log.jsonl.tmp").write_text(
        "\n".join(lines) + "\n", encoding="utf-8"
    )
    (folder / "log.jsonl.tmp").replace(folder / "log.jsonl")


def run_facts(config: PretrainConfig) -> dict[str, Any]:
    """Return the first line of a record: configuration, hardware, versions and commit."""
    cpu = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    package = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
    ]
    commit = subprocess.run(
        package, capture_output=True, text=True
    ).stdout.strip()
    return {
        "config": asdict(config),
        "hardware": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "gpu": gpu,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bertnb": bertnb.__version__,
        },
        "commit": commit or None,
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def resume(
    folder: Path,
    config: PretrainConfig,
    model: BertForPreTraining,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, list[dict[str, Any]]]:
    """Load the state of a run that stopped, and return its step and records; (0, []) where there is none."""
    file = folder / "state.pt"
    if not file.exists():
        return 0, []
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["config"] != json.dumps(asdict(config)):
        raise BertnbError(
            f"{file} is of a run with another configuration: {state['config']}; choose another output_dir"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"], json.loads(state["records"])
