"""Write the page of results from the records in book/runs.

python tools/results.py --into FOLDER    # write FOLDER/results.md

The records are lines of JSON that the programs in benchmarks/ append. A line
that is no result is an error that names file and line.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "book" / "runs"
OURS, THEIRS = "bertnb.fine_tune", "transformers.Trainer"
COLAB = "google-bert/bert-base-uncased"
COMMAND = f"python benchmarks/fine_tuning.py all --model {COLAB}"
# the columns that the page always has, and what they are called
MODELS = {
    "MiniLM-L6": "MiniLM-L6",
    "book": "the book's own",
    COLAB: "bert-base-uncased",
}
Entry = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a name of the record stands for."""

    title: str
    says: str
    page: str
    score: str  # the main one
    scale: float  # that makes points of it, hundredths
    training: int  # examples of the whole set; fewer are a subset
    scored: int


TASKS = {
    "sst2": Task(
        "SST-2",
        "Is what is said of a film good or bad? Accuracy on the validation set",
        "17_classification",
        "accuracy",
        100,
        67_349,
        872,
    ),
    "stsb": Task(
        "STS-B",
        "How alike are two sentences? Spearman's correlation on the test set",
        "18_pairs",
        "spearman",
        100,
        5_749,
        1_379,
    ),
    "wnut17": Task(
        "WNUT-17",
        "Rare and new names in posts. F1 of whole names on the test set",
        "19_entities",
        "f1",
        100,
        3_394,
        1_287,
    ),
    "wikigold": Task(
        "wikigold",
        "Names in Wikipedia: 116 articles to learn from, F1 of whole names on "
        "the other 29",
        "19_entities",
        "f1",
        100,
        1_315,
        381,
    ),
    "squad": Task(
        "SQuAD, scored on XQuAD",
        "Where is the answer? F1 of words on the English part of XQuAD",
        "20_question_answering",
        "f1",
        1,
        87_599,
        1_190,
    ),
}


class RecordError(ValueError):
    """A line of a record is not what it should be."""


# %% The records
def entries(
    path: Path, fields: dict[str, type | tuple[type, ...]]
) -> Iterator[tuple[str, Entry]]:
    """Yield each line of a record, and where it stands.

    Raises:
        RecordError: a line is no object with these fields.
    """
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        where = f"{path.name}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{where}: not JSON: {error.msg} at {error.pos}"
            raise RecordError(message) from None
        if not isinstance(entry, dict):
            raise RecordError(f"{where}: {line[:40]!r} is no object")
        for name, kind in fields.items():
            if name not in entry:
                raise RecordError(f"{where}: there is no {name!r}")
            if not isinstance(entry[name], kind):
                raise RecordError(
                    f"{where}: {name} is {entry[name]!r}, which is no "
                    f"{getattr(kind, '__name__', 'number')}"
                )
        yield where, entry


NUMBER = (int, float)
FACTS = {"command": str, "hardware": dict, "versions": dict}
RATES: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "plan": dict,
    "score": NUMBER,
}
FIELDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "model": str,
    "by": str,
    "scores": dict,
    "seconds": NUMBER,
    "examples": int,
    "scored": int,
    "plan": dict,
    "precision": str,
    "seed": int,
    "commit": str,
    **FACTS,
}


@dataclass(frozen=True)
class Key:
    """What two trainings share that may be compared, but for the program."""

    task: str
    model: str
    plan: str
    examples: int
    scored: int
    steps: str  # of a training that was cut short, or ""
    precision: str

    @property
    def label(self) -> str:
        """Return what is said of a training that is no whole one."""
        task, parts = TASKS[self.task], []
        if self.examples < task.training:
            parts.append(f"{self.examples:,} of {task.training:,} examples")
        if self.scored < task.scored:
            parts.append(f"{self.scored:,} of {task.scored:,} scored")
        if self.steps:
            parts.append(f"{self.steps} steps only")
        return f"subset: {', '.join(parts)}" if parts else ""


def key_of(entry: Entry) -> Key:
    """Return what the run is filed under."""
    cut = re.search(r"--steps[ =](\d+)", entry["command"])
    return Key(
        entry["task"],
        entry["model"],
        ", ".join(f"{k} {v}" for k, v in sorted(entry["plan"].items())),
        entry["examples"],
        entry["scored"],
        cut[1] if cut else "",
        entry["precision"],
    )


Groups = dict[Key, dict[str, list[Entry]]]


def read_runs(path: Path) -> Groups:
    """Return the runs by what they share, and by program.

    Raises:
        RecordError: a line is no run, or repeats a seed.
    """
    groups: Groups = {}
    for where, entry in entries(path, FIELDS):
        if entry["task"] not in TASKS:
            known = ", ".join(TASKS)
            raise RecordError(
                f"{where}: task is {entry['task']!r}; there are {known}"
            )
        if entry["by"] not in (OURS, THEIRS):
            raise RecordError(
                f"{where}: by is {entry['by']!r}, not {OURS} or {THEIRS}"
            )
        name = TASKS[entry["task"]].score
        score = entry["scores"].get(name)
        if not isinstance(score, NUMBER) or not math.isfinite(score):
            raise RecordError(f"{where}: the score {name!r} is {score!r}")
        sides = groups.setdefault(key_of(entry), {OURS: [], THEIRS: []})
        if entry["seed"] in [one["seed"] for one in sides[entry["by"]]]:
            raise RecordError(
                f"{where}: seed {entry['seed']} of {entry['task']} by "
                f"{entry['by']} is there twice: remove one line"
            )
        sides[entry["by"]].append(entry)
    return groups


# %% Figures
def deviation(values: Sequence[float]) -> float | None:
    """Return the sample's deviation; of one value there is none."""
    return stdev(values) if len(values) > 1 else None


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean and deviation."""
    if not values:
        return "–"
    found = deviation(values)
    tail = "" if found is None else f" ± {found:.{digits}f}"
    return f"{fmean(values):.{digits}f}{tail}"


def points(task: str, runs: Sequence[Entry]) -> list[float]:
    """Return the main scores in points."""
    about = TASKS[task]
    return [about.scale * run["scores"][about.score] for run in runs]


def difference(task: str, sides: dict[str, list[Entry]]) -> str:
    """Return how far our mean is above theirs; in their deviations too."""
    ours, theirs = points(task, sides[OURS]), points(task, sides[THEIRS])
    if not (ours and theirs):
        return "–"
    by = fmean(ours) - fmean(theirs)
    text = f"{by:+.2f} points"
    if around := deviation(theirs):
        text += f", {by / around:+.1f} of the Trainer's deviations"
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def folded(title: str, lines: Sequence[str]) -> Iterator[str]:
    """Yield lines under a title that opens them."""
    yield from (f":::{{dropdown}} {title}", *lines, ":::", "")


# %% Fine-tuning
def marks(key: Key, groups: Groups) -> str:
    """Return what sets these runs apart: a part of the examples, and what
    other plans of the same model have not."""
    others = [
        set(other.plan.split(", "))
        for other in groups
        if (other.task, other.model) == (key.task, key.model)
    ]
    apart = [
        part.replace("_", " ")
        for part in key.plan.split(", ")
        if any(part not in plan for plan in others)
    ]
    return ", ".join([key.label, *apart] if key.label else apart)


def summary(groups: Groups) -> Iterator[str]:
    """Yield the table of tasks and models."""
    others = dict.fromkeys(key.model for key in groups)
    models = MODELS | {name: name for name in others if name not in MODELS}
    rows = []
    for name, task in TASKS.items():
        cells = []
        for model in models:
            found = []
            for key, sides in reversed(groups.items()):  # the latest first
                if (key.task, key.model) == (name, model):
                    found += [
                        f"{side} {spread(points(name, runs))} ({len(runs)})"
                        for side, runs in (
                            ("**bertnb**", sides[OURS]),
                            ("Trainer", sides[THEIRS]),
                        )
                        if runs
                    ] + [f"*{said}*" for said in [marks(key, groups)] if said]
            empty = "*yours to fill*" if model == COLAB else "–"
            cells.append("<br>".join(found) or empty)
        rows.append([f"[{task.title}](#results-{name})", task.score, *cells])
    yield from table(["task", "score", *models.values()], rows)


def seconds(
    runs: Sequence[Entry], name: str, beside: Sequence[Entry] = ()
) -> str:
    """Return the mean of a time in seconds, where all runs have it, and they
    and those beside them were on one machine."""
    times = [run[name] for run in runs if name in run]
    one = len({machine(run) for run in [*runs, *beside]}) == 1
    return f"{fmean(times):,.0f}" if one and len(times) == len(runs) else "–"


def machine(run: Entry) -> str:
    """Return what did the run."""
    hardware = run["hardware"]
    return str(hardware.get("gpu") or hardware.get("cpu") or "unknown")


def training(key: Key, groups: Groups) -> Iterator[str]:
    """Yield what came out of one plan with one model."""
    sides = groups[key]
    every = sides[OURS] + sides[THEIRS]
    said = marks(key, groups)
    label = f" ({said})" if said else ""
    yield from (f"### {MODELS.get(key.model, key.model)}{label}", "")
    rows = [
        [
            f"`{side}`",
            str(len(runs)),
            f"{fmean(points(key.task, runs)):.2f}",
            "–" if found is None else f"{found:.2f}",
            seconds(runs, "seconds", every),
            seconds(runs, "cpu_seconds", every),
        ]
        for side, runs in sides.items()
        if runs
        for found in [deviation(points(key.task, runs))]
    ]
    head = ["by", "seeds", "mean", "deviation", "seconds", "CPU seconds"]
    yield from table(head, rows)
    if all(sides.values()):
        yield from (f"Difference: {difference(key.task, sides)}.", "")
    yield (
        f"{key.examples:,} examples to learn from, {key.scored:,} scored; "
        f"{key.plan.replace('_', ' ')}; {key.precision}; "
        f"{machines(every)}."
    )
    yield ""
    commands = ["```bash", *(run["command"] for run in every), "```"]
    yield from folded("Each seed", [*table(*details(every)), *commands])


def machines(runs: Sequence[Entry]) -> str:
    """Return the machines of these runs, each with its versions."""
    found = (
        f"{machine(run)}, {run['hardware'].get('cores')} cores, threads: "
        + ", ".join(
            [
                str(run["hardware"].get("threads")),
                *(f"{k} {number}" for k, number in run["versions"].items()),
            ]
        )
        for run in runs
    )
    return "; ".join(dict.fromkeys(found))


def details(runs: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Return a table of all scores of each run."""
    names = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    head = ["by", "seed", *names, "seconds", "CPU seconds", "load", "machine"]
    rows = []
    for run in runs:
        scores = [run["scores"].get(name) for name in names]
        rows.append(
            [
                f"`{run['by']}`",
                str(run["seed"]),
                *("–" if s is None else f"{s:.4f}" for s in scores),
                seconds([run], "seconds"),
                seconds([run], "cpu_seconds"),
                f"{run['hardware'].get('load', 0):.1f}",
                machine(run),
                run["commit"],
            ]
        )
    return [*head, "commit"], rows


def tried(plans: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rate of each plan, and what else is not alike in all."""
    names = [
        name
        for name in dict.fromkeys(name for plan in plans for name in plan)
        if len({plan.get(name) for plan in plans}) > 1
    ]
    return [
        f"{plan['learning_rate']:g}"
        + "".join(
            f", {name.replace('_', ' ')} {plan[name]:g}"
            for name in names
            if name in plan and name != "learning_rate"
        )
        for plan in plans
    ]


def rates(path: Path, task: str) -> Iterator[str]:
    """Yield how the plan of a task was chosen."""
    found = [
        entry for _, entry in entries(path, RATES) if entry["task"] == task
    ]
    if found:
        scores = [TASKS[task].scale * entry["score"] for entry in found]
        plans = tried([entry["plan"] for entry in found])
        listed = "; ".join(
            f"{plan} gave {score:.2f}"
            for plan, score in zip(plans, scores, strict=True)
        )
        yield from (
            "The plan was chosen by `bertnb.fine_tune` from MiniLM-L6, on "
            "examples apart from those scored here, one seed each. Learning "
            f"rate {listed}.",
            "",
        )


def fine_tuning(path: Path) -> Iterator[str]:
    """Yield the part on data sets."""
    groups = read_runs(path)
    yield from (
        "## Five data sets",
        "",
        "Main scores in points (hundredths; a correlation of 0.82 is 82), as "
        "mean ± deviation of the sample (number of seeds). "
        "**bertnb** is `bertnb.fine_tune`; Trainer is `transformers.Trainer` "
        "with the same weights, examples and hyper-parameters, but its own "
        "tokenizer, heads, padding and loop; of questions it knows no windows "
        "and no choice of spans, so both sides have ours. Both are scored with "
        "the weights after the last step, or with their mean where the plan has "
        "`average`. Where several plans have been tried, the latest is first.",
        "",
        *summary(groups),
        f"The column of {MODELS[COLAB]} is filled by one command on a machine "
        "with a GPU and a network, such as Colab, from a clone of the "
        "repository and with `BERTNB_DATA` unset, so that weights and sets "
        "come by name from the hub (wikigold is not there, and is left out):",
        "",
        "```bash",
        COMMAND,
        "python tools/results.py --into .  # this page, with your column",
        "```",
        "",
        "Where runs shared their machine with other work, the seconds say how "
        "long it took and not which program is faster: the load stands beside "
        "each run, and CPU seconds do not count the work of others. Where seeds "
        "were run on two machines, the times stand beside each seed only.",
        "",
    )
    for name, task in TASKS.items():
        mine = [key for key in groups if key.task == name]
        yield from (f"(results-{name})=", f"## {task.title}", "")
        link = f"[its chapter](../notebooks/{task.page}.ipynb)"
        yield from (f"{task.says}; {link}.", "")
        yield from rates(path.with_name("fine-tuning-rates.jsonl"), name)
        for key in mine:
            yield from training(key, groups)
        if not mine:
            yield from ("No run is recorded.", "")


# %% The other records
def by(found: Sequence[Entry], name: str) -> dict[str, list[Entry]]:
    """Return the entries by one of their fields."""
    parts: dict[str, list[Entry]] = {}
    for entry in found:
        parts.setdefault(str(entry[name]), []).append(entry)
    return parts


def percent(found: Sequence[Entry], *names: str) -> str:
    """Return mean and deviation of a score that lies deep in each entry."""
    values = []
    for entry in found:
        value: Any = entry
        for name in names:
            value = value[name]
        values.append(100 * value)
    return spread(values)


def source(found: Sequence[Entry]) -> str:
    """Return where figures come from."""
    return f"From `{found[0]['command']}`; {machines(found)}."


def pieces(found: list[Entry]) -> Iterator[str]:
    """Yield what labels on every piece do to F1."""
    yield from ("## A label for each word, or for each piece", "")
    yield (
        "MiniLM-L6 on wikigold, with labels on the first piece of each word, "
        "on every piece (I on the later ones), or copied to all pieces; F1 in "
        "points, counted in words and in pieces. The chapter is "
        "[Entities](../notebooks/19_entities.ipynb)."
    )
    yield ""
    rows = [
        [
            kind,
            str(len(runs)),
            *(
                percent(runs, where, "f1")
                for where in ("in words", "in pieces")
            ),
            *(
                f"{runs[0]['entities'][where]:,}"
                for where in ("in words", "in pieces")
            ),
        ]
        for kind, runs in by(found, "labels").items()
    ]
    head = ["labels", "seeds", "F1 in words", "F1 in pieces"]
    head += ["entities in words", "entities in pieces"]
    yield from table(head, rows)
    yield from (source(found), "")


def cluener(found: list[Entry]) -> Iterator[str]:
    """Yield names in Chinese."""
    yield from ("## Names in Chinese characters: CLUENER", "")
    yield (
        "A small encoder that starts untrained, a character a word; in points. "
        "The chapter is [Entities](../notebooks/19_entities.ipynb)."
    )
    yield ""
    names = ("precision", "recall", "f1")
    row = [str(len(found)), *(percent(found, "scores", n) for n in names)]
    yield from table(["seeds", *names], [row])
    yield from (source(found), "")


def dictionary(found: list[Entry]) -> Iterator[str]:
    """Yield what a list of names finds."""
    yield from ("## Names by a dictionary", "")
    yield (
        "The names of the training sentences, the longest match first: how "
        "many names of the scored sentences are in it, and what it scores, in "
        "points. The chapter is [Entities](../notebooks/19_entities.ipynb)."
    )
    yield ""
    names = ("precision", "recall", "f1")
    rows = [
        [
            task,
            f"{runs[0]['names']:,}",
            f"{runs[0]['names seen in training']:,}",
            *(percent(runs, "scores", n) for n in names),
        ]
        for task, runs in by(found, "task").items()
    ]
    yield from table(["set", "names", "of them in training", *names], rows)
    yield from (source(found), "")


def bag(found: list[Entry]) -> Iterator[str]:
    """Yield the bag of words."""
    yield from ("## SST-2 by a bag of words", "")
    yield (
        "A logistic regression on words, and on words and pairs of words, "
        "weighed by their rarity; accuracy in points. The chapter is "
        "[Classification](../notebooks/17_classification.ipynb)."
    )
    yield ""
    rows = [
        [
            kind,
            f"{runs[0]['features']:,}",
            f"{runs[0]['examples']:,}",
            percent(runs, "scores", "accuracy"),
        ]
        for kind, runs in by(found, "words in a row").items()
    ]
    head = ["words in a row, at most", "features", "examples", "accuracy"]
    yield from table(head, rows)
    yield from (source(found), "")


Part = Callable[[list[Entry]], Iterator[str]]
TAGGERS: dict[str, Part] = {
    "pieces": pieces,
    "cluener": cluener,
    "dictionary": dictionary,
}
BASELINES: dict[str, Part] = {"bag of words": bag}


def leaves(entry: Entry, above: str = "") -> Iterator[tuple[str, str]]:
    """Yield the numbers and words of a result, with the names above them."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}, ")
        elif isinstance(value, float):
            yield f"{above}{name}", f"{value:,.4g}"
        elif isinstance(value, str | int) and name != "command":
            yield f"{above}{name}", str(value)


def other(found: list[Entry]) -> Iterator[str]:
    """Yield all of an experiment that has no form of its own."""
    for entry in found:
        hidden = FACTS.keys() - {"command"}
        yield from figures({k: v for k, v in entry.items() if k not in hidden})


def parts(path: Path, field: str, known: dict[str, Part]) -> Iterator[str]:
    """Yield a part for each question that the record answers."""
    found: dict[str, list[Entry]] = {}
    for _, entry in entries(path, {field: str, **FACTS}):
        found.setdefault(entry[field], []).append(entry)
    for name, some in found.items():
        try:
            yield from known.get(name, other)(some)
        except (KeyError, TypeError) as error:
            message = f"{path.name}: a line of {name!r} does not fit: {error!r}"
            raise RecordError(message) from error


def race(result: Entry) -> Iterator[str]:
    """Yield the speed of fine-tuning, beside the Trainer's."""
    yield (
        f"{result['name']}: batches of {result['batch']}, {result['rounds']} "
        "rounds in which the sides take turns. Examples a second by the clock "
        "and by the processor's, which does not count the work of others; "
        "behind them, how many times as fast ours is, the median over the "
        "rounds. The losses of one batch differ by "
        f"{result['loss_difference']:.0e} at the most."
    )
    yield ""
    names = ["examples_per_second", "ratio"]
    names += ["examples_per_cpu_second", "cpu_ratio"]
    rows = [
        [
            precision,
            side.replace("ours", "**bertnb**"),
            *(f"{found[n]:.2f}" if n in found else "" for n in names),
        ]
        for precision in ("float32", "bfloat16")
        for side, found in result[precision].items()
    ]
    head = ["precision", "side", "examples a second", "ours is"]
    yield from table([*head, "examples a CPU second", "ours is"], rows)


INFERENCE = {
    "texts": "Vectors for {texts} texts of mixed lengths, {tokens:,} tokens, "
    "from all-MiniLM-L6-v2",
    "int8": "The hidden states of {layers} layers of BERT-base, rows x tokens "
    "{shape}",
}


def inference(result: Entry) -> Iterator[str]:
    """Yield the speed of embedding, beside others."""
    if result["what"] not in INFERENCE:
        yield from figures(result)
        return
    first = next(iter(result["sides"]))
    yield (
        f"{INFERENCE[result['what']].format(**result)}; threads: "
        f"{result['threads']}, {result['rounds']} rounds in which the sides "
        f"take turns. How many times as long as {first} each takes, median and "
        "quartiles; and how far its vectors are off, relative to their length "
        "and at most in a component."
    )
    yield ""
    rows = []
    for name, peer in result["sides"].items():
        times, error = result["compared"].get(name), result["errors"].get(name)
        ratio = "{ratio:.2f} ({quartile_1:.2f} to {quartile_3:.2f})"
        gap = "{relative_error:.2g}, {largest_difference:.1g}"
        rows.append(
            [
                name,
                f"{peer['tokens_per_second']:,}",
                ratio.format(**times) if times else "1",
                gap.format(**error) if error else "",
            ]
        )
    yield from table(["side", "tokens a second", "takes", "off by"], rows)


def figures(result: Entry) -> Iterator[str]:
    """Yield all figures of a result that has no form of its own."""
    rows = list(table(["figure", "value"], list(leaves(result))))
    yield from folded(f"`{result['command']}`", rows)


def speed(
    path: Path, title: str, form: Callable[[Entry], Iterator[str]]
) -> Iterator[str]:
    """Yield the part on a record of speed.

    Raises:
        RecordError: it has not the form of one.
    """
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text("utf-8"))
        yield from (f"## {title}", "", source([record["facts"]]), "")
        for result in record["results"]:
            yield from form(result)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        message = f"{path.name}: no record of a benchmark: {error!r}"
        raise RecordError(message) from error


def page(folder: Path = RUNS) -> str:
    """Return the page in MyST Markdown.

    Raises:
        RecordError: a record is not what it should be.
    """
    lines = [
        "# Results",
        "",
        "What fine-tuning gives, beside the tools that most people use. Every "
        "figure on this page is computed from the records in "
        "`book/runs/` when the book is built; the programs that wrote them are "
        "in `benchmarks/`.",
        "",
        *fine_tuning(folder / "fine-tuning.jsonl"),
        *parts(folder / "taggers.jsonl", "question", TAGGERS),
        *parts(folder / "bag-of-words.jsonl", "by", BASELINES),
        *speed(folder / "fine-tuning-speed.json", "Speed of fine-tuning", race),
        *speed(folder / "inference-cpu.json", "Speed of inference", inference),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--into", type=Path, metavar="FOLDER", required=True)
    options = parser.parse_args()
    try:
        text = page()
    except RecordError as error:
        print(f"results: {error}", file=sys.stderr)
        return 1
    options.into.mkdir(parents=True, exist_ok=True)
    (options.into / "results.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
