"""Three commands.

Written by tools/extract.py from notebooks/21_command_fine_tuning.md: edit that notebook, not this file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Annotated, Any, Literal

import typer

from bertnb.terminal import (
    JsonOption,
    ModelOption,
    OutputOption,
    check_output,
    load_model,
    new_app,
    one_line_errors,
    open_utf8,
    read_lines,
    show_facts,
    with_options,
)

__all__ = ["task_app"]


# %% What is in the file
task_app = new_app()

_Options = dict[str, tuple[Any, str]]  # name: type, help
_COLUMNS: _Options = {
    "text": (
        str,
        "The column of the text. [default: as finetune was told, or text]",
    ),
    "pair": (
        str,
        "The column of a second text. [default: as finetune was told, or none]",
    ),
}
_LABEL: _Options = {
    "label": (
        str,
        "The column of what is known. [default: as finetune was told, or label]",
    ),
}
_QUESTIONS: _Options = {
    "null_threshold": (
        float,
        "Of questions: say that there is no answer where that scores better "
        "by more than this. [default: 0 if finetune, or the file to evaluate, "
        "had questions without an answer; else never]",
    ),
}


def _columns(asked: dict[str, Any]) -> tuple[str, str | None, str | None]:
    return asked["text"] or "text", asked.get("label"), asked["pair"]


def _examples(
    source: str, split: str, kind: str, asked: dict[str, Any]
) -> list[Any]:
    """Return the examples of a named set or a file; of -, a text a line."""
    from bertnb.examples import TextExample, TokenExample
    from bertnb.named_sets import read_examples
    from bertnb.tokenization import basic_tokenize

    if source != "-":
        return read_examples(source, kind, split, *_columns(asked))
    if kind == "questions" or asked["pair"] or "label" in asked:
        raise ValueError(
            "labels, pairs and questions are read from a file, not -"
        )
    lines = read_lines("-")
    if kind == "tokens":  # words by the rules of BERT, with capitals
        words = [basic_tokenize(line, lowercase=False) for line in lines]
        return [TokenExample(tuple(found)) for found in words]
    return [TextExample(line) for line in lines]


@contextmanager
def _adding(hint: str) -> Iterator[None]:
    """Say at the end of an error how it came that a file was read so."""
    from bertnb.configuration import BertnbError

    try:
        yield
    except (BertnbError, ValueError) as error:
        raise BertnbError(f"{error} ({hint})") from error


# %% What is held out
def _task(
    kind: str,
    training: Sequence[Any] = (),
    validation: Sequence[Any] = (),
    labels: Sequence[str] | None = None,
    balanced: bool = False,
    null_threshold: float | None = None,
    chinese: bool = False,
) -> Any:
    """Return the task of a kind."""
    from bertnb.classification import SequenceClassification
    from bertnb.entities import TokenClassification
    from bertnb.pairs import SequenceRegression
    from bertnb.question_answering import QuestionAnswering

    if kind == "classification":
        weights = "balanced" if balanced else None
        return SequenceClassification(training, validation, labels, weights)
    if kind == "regression":
        return SequenceRegression(training, validation)
    if kind == "tokens":
        return TokenClassification(training, validation, labels)
    return QuestionAnswering(
        training,
        validation,
        null_threshold=_threshold(null_threshold, (*training, *validation)),
        chinese=chinese,
    )


def _threshold(asked: float | None, examples: Sequence[Any]) -> float | None:
    """Return what "no answer" must be ahead by: 0 if some have no answer."""
    some = any(getattr(example, "answers", None) == () for example in examples)
    return 0.0 if asked is None and some else asked


def _hold_out(
    examples: Sequence[Any], share: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """Part examples by chance; what shares its text stays together.

    Two are held out at least, if any: a correlation needs as many.
    """
    import random

    groups: dict[Any, list[Any]] = {}
    for example in examples:
        of = vars(example)
        shared = [of[name] for name in ("context", "words") if name in of]
        key = shared[0] if shared else (of["text"], of["text_pair"])
        groups.setdefault(key, []).append(example)
    parts = list(groups.values())
    random.Random(seed).shuffle(parts)
    held: list[Any] = []
    wanted = max(2, share * len(examples)) if share else 0
    while parts[1:] and len(held) < wanted:
        held += parts.pop()
    return [example for part in parts for example in part], held


# %% Learning
_SETTINGS: _Options = {
    "epochs": (int, "Times through the examples. [default: 3]"),
    "min_steps": (int, "But at least so many steps. [default: 200]"),
    "batch_size": (int, "Rows a step. [default: 32]"),
    "group": (
        int,
        "Batches sorted together; 1: by chance. [default: 50, fewer where an "
        "epoch is short]",
    ),
    "max_length": (int, "Tokens a row. [default: 128; 384 for questions]"),
    "learning_rate": (float, "Its peak. [default: 5e-5 x 768 / the width]"),
    "warmup_ratio": (
        float,
        "Share of steps with a rising rate. [default: 0.1]",
    ),
    "schedule": (
        Literal["hugging_face", "original", "constant"],
        "Of the learning rate. [default: hugging_face]",
    ),
    "weight_decay": (float, "Of AdamW. [default: 0.01]"),
    "bias_correction": (bool, "Of Adam. [default: yes]"),
    "max_grad_norm": (float, "Longer gradients are cut. [default: 1.0]"),
    "parts": (int, "Take a step in so many, to save memory. [default: 1]"),
    "frozen_layers": (
        int,
        "Keep the embeddings and so many layers as they are. [default: none]",
    ),
    "layer_decay": (float, "Of the rate, a layer down. [default: 1.0]"),
    "dropout": (float, "Dropped in training. [default: the model's share]"),
    "average": (float, "Mean over the last share of steps. [default: 0.0]"),
    "r_drop": (float, "Read twice; the price of disagreement. [default: 0.0]"),
    "eval_every": (
        int,
        "Steps between scores. [default: an epoch, or a tenth]",
    ),
    "patience": (int, "End after so many scores without a better one."),
    "seed": (int, "Of all chance. [default: 0]"),
    "device": (str, "[default: cuda where there is one, else cpu]"),
    "precision": (
        Literal["auto", "float32", "bfloat16", "float16"],
        "Of products. [default: auto, the faster one]",
    ),
}


@task_app.command("finetune")
@one_line_errors()
@with_options({**_COLUMNS, **_LABEL, **_SETTINGS})
def _finetune(
    file: Annotated[
        str,
        typer.Argument(
            help="Examples: .csv, .tsv or .jsonl with a text and a label a "
            "row; CoNLL columns or CLUENER's .json with entities; SQuAD's "
            ".json with questions; or the name of a set: "
            "sst2, chnsenticorp, stsb, snli, mnli, wnut17, wikigold, cluener, "
            "squad, squad_v2, xquad.en, xquad.zh, drcd.",
            show_default=False,
        ),
    ],
    *,
    output: OutputOption,
    model: ModelOption = None,
    task: Annotated[
        Literal["auto", "classification", "regression", "tokens", "questions"],
        typer.Option(help="What to learn."),
    ] = "auto",
    validation: Annotated[
        str | None,
        typer.Option(
            help="Examples to be scored on, as the first file. [default: the "
            "set's own, or a part of the file]",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="How large a part.")
    ] = 0.1,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Rare classes weigh more.")
    ] = False,
    as_json: JsonOption = False,
    **asked: Any,
) -> None:
    """Train a model on examples of one's own.

    The output folder gets the model at its best, as transformers reads it.
    Stopped, by Ctrl-C (exit code 130), by SIGTERM (143) or by a crash, the
    same command goes on.

    \b
    Example: a classifier from a table with the columns text and label
      bertnb finetune reviews.csv --output reviews/ --model bert-base-uncased
    Example: similarity of two columns, from 0 to 5
      bertnb finetune pairs.tsv --text first --pair second --label score \\
          --output similarity/
    Example: entities, scored on another file
      bertnb finetune train.conll --validation dev.conll --output entities/
    """
    from bertnb.fine_tuning import fine_tune
    from bertnb.named_sets import NAMED_SETS, guess_kind
    from bertnb.pretraining import book_model
    from bertnb.tasks import load_for_task

    asked["label"] = asked["label"] or "label"
    seed = asked["seed"] or 0
    kind = guess_kind(file, *_columns(asked)) if task == "auto" else task
    guessed = task == "auto" and file not in NAMED_SETS
    hint = f"guessed: {kind}; --task can name another"
    with _adding(hint) if guessed else nullcontext():
        learn = _examples(file, "train", kind, asked)
    labels = _labels(file, kind, learn)
    if "validation" in NAMED_SETS.get(file, ("", ()))[1]:
        validation = validation or file
    if validation is None:
        learn, scored = _hold_out(learn, held_out, seed)
    else:
        scored = _examples(validation, "validation", kind, asked)
    whole = _task(kind, learn, scored, labels or None, balanced)
    network, tokenizer = load_for_task(whole, model or book_model(), seed)
    config = _config(kind, network.config, str(output), asked)
    typer.echo(
        f"{kind}: {len(learn):,} examples to learn from, {len(scored):,} held "
        f"out{'; ' + ', '.join(labels) if labels else ''}",
        err=True,
    )
    result = fine_tune(whole, network, tokenizer, config)
    facts = {"task": kind, "examples": len(learn), "held_out": len(scored)}
    known = ("step", "epoch", "learning_rate", "seconds")
    best = {k: v for k, v in result.best.items() if k not in known}
    facts |= {"best_step": result.best.get("step"), **best}
    facts |= {"stopped": result.stopped, "output": str(output)}
    _write_asked(output, whole, asked)
    show_facts(facts | {"next": _next(kind, output, result.stopped)}, as_json)
    if result.stopped in ("SIGINT", "SIGTERM"):
        raise typer.Exit(128 + Signals[result.stopped])


def _next(kind: str, folder: Path, stopped: str | None) -> str:
    if stopped in ("SIGINT", "SIGTERM"):
        return "the same command goes on"
    if kind == "questions":
        return f"bertnb answer QUESTION --context FILE --model {folder}"
    return f"bertnb predict {folder} FILE"


def _labels(file: str, kind: str, examples: Sequence[Any]) -> list[str]:
    """Return the names of the classes in all examples, if there are any."""
    labels = list(getattr(_task(kind, examples), "labels", ()))
    if kind == "classification" and len(labels) > max(2, len(examples) // 2):
        raise ValueError(
            f"{file} has {len(labels)} different labels in {len(examples)} "
            "rows: --label names another column, or they are numbers "
            "(--task regression)"
        )
    return labels


def _config(kind: str, model: Any, output: str, asked: dict[str, Any]) -> Any:
    """Return the settings of a run: those asked for, defaults by the model."""
    from bertnb.tasks import FineTuneConfig

    given = {k: asked[k] for k in _SETTINGS if asked[k] is not None}
    given.setdefault("max_length", _length(kind, model))
    given.setdefault("learning_rate", 5e-5 * 768 / model.hidden_size)
    return FineTuneConfig(output_dir=output, **given)


def _length(kind: str, model: Any) -> int:
    wanted = 384 if kind == "questions" else 128
    return min(wanted, model.max_position_embeddings)


# %% Use
_Trained = Annotated[
    str,
    typer.Argument(
        help="The folder that finetune has written, or any fine-tuned BERT.",
        show_default=False,
    ),
]
_USE: _Options = {
    "max_length": (int, "Tokens a row. [default: 128; 384 for questions]"),
    "batch_size": (int, "Rows at a time. [default: 64]"),
    "device": (str, "[default: cuda where there is one, else cpu]"),
}


def _trained(
    folder: str, asked: dict[str, Any], chinese: bool = False
) -> tuple[str, dict[str, Any]]:
    """Load a fine-tuned model; return its kind, and how it is called."""
    from bertnb.answer_spans import BertForQuestionAnswering
    from bertnb.classification import BertForSequenceClassification
    from bertnb.configuration import BertnbError, read_json
    from bertnb.entities import BertForTokenClassification
    from bertnb.folders import config_file

    saved = read_json(config_file(folder))
    name = (saved.get("architectures") or ["model"])[0]
    kinds: dict[str, tuple[str, Any]] = {
        "BertForSequenceClassification": (
            "classification",
            BertForSequenceClassification,
        ),
        "BertForTokenClassification": ("tokens", BertForTokenClassification),
        "BertForQuestionAnswering": ("questions", BertForQuestionAnswering),
    }
    if name not in kinds:
        raise BertnbError(
            f"{folder} holds a {name}, which was not trained for a task: "
            f"bertnb finetune FILE --model {folder} --output ..."
        )
    _read_asked(folder, asked)
    kind, form = kinds[name]
    network, words = load_model(form, folder, asked["device"])
    if kind == "classification" and network.num_labels == 1:
        kind = "regression"
    labels = getattr(network, "label_names", None)
    threshold = asked.get("null_threshold")
    length, size = asked["max_length"], asked["batch_size"]
    if length is None:
        length = _length(kind, network.config)
    return kind, {
        "task": _task(
            kind, labels=labels, null_threshold=threshold, chinese=chinese
        ),
        "model": network,
        "tokenizer": words,
        "max_length": length,
        "batch_size": 64 if size is None else size,
    }


_ASKED = "finetune.json"  # in the folder of the model


def _write_asked(folder: Path, task: Any, asked: dict[str, Any]) -> None:
    """Keep what the other commands need to ask of a file as finetune did."""
    import json

    kept = {name: asked[name] for name in ("text", "pair", "label")}
    kept["null_threshold"] = getattr(task, "null_threshold", None)
    (folder / _ASKED).write_text(json.dumps(kept) + "\n", "utf-8")


def _about(folder: str, kind: str) -> str:
    there = Path(folder, _ASKED).is_file()
    columns = f", with the columns that its {_ASKED} names" if there else ""
    return f"{folder} was trained for {kind}{columns}"


def _read_asked(folder: str, asked: dict[str, Any]) -> None:
    """Take over what was kept, where the command line says nothing."""
    from bertnb.configuration import read_json

    if (file := Path(folder, _ASKED)).is_file():
        for name, value in read_json(file).items():
            if name in asked and asked[name] is None:
                asked[name] = value


@task_app.command("evaluate")
@one_line_errors()
@with_options({**_COLUMNS, **_LABEL, **_QUESTIONS, **_USE})
def _evaluate(
    model: _Trained,
    file: Annotated[
        str,
        typer.Argument(help="Examples, as for finetune.", show_default=False),
    ],
    split: Annotated[str, typer.Option(help="Of a named set.")] = "validation",
    chinese: Annotated[
        bool,
        typer.Option("--chinese", help="Compare answers by characters."),
    ] = False,
    as_json: JsonOption = False,
    **asked: Any,
) -> None:
    """Score a fine-tuned model on examples whose answers are known.

    Shares are from 0 to 1, correlations from -1 to 1; the scores of questions
    are in percent, as SQuAD's.

    \b
    Example: how good is it on a file that it has not seen?
      bertnb evaluate reviews/ more-reviews.csv
    """
    from bertnb.tasks import evaluate

    kind, use = _trained(model, asked, chinese)
    asked["label"] = asked["label"] or "label"
    with _adding(f"{file}; {_about(model, kind)}"):
        examples = _examples(file, split, kind, asked)
        task = replace(use.pop("task"), validation=examples)
        if kind == "questions":
            threshold = _threshold(asked["null_threshold"], examples)
            task = replace(task, null_threshold=threshold)
        scores = evaluate(task, **use)
    show_facts({"task": kind, "examples": len(examples)} | scores, as_json)


def _row(
    kind: str, number: int, example: Any, answer: Any
) -> list[dict[str, Any]]:
    """Return the rows of a table that tell the answer to an example."""
    if kind == "tokens":
        return [{"sentence": number, **entity} for entity in answer["entities"]]
    if kind == "questions":
        asked = {"id": example.id, "question": example.question}
        names = ("answer", "score", "start", "end")
        return [asked | {name: answer[name] for name in names}]
    texts = {"text": example.text}
    if example.text_pair is not None:
        texts["text_pair"] = example.text_pair
    if kind == "regression":
        return [texts | {"number": answer}]
    return [texts | {name: answer[name] for name in ("label", "score")}]


@task_app.command("predict")
@one_line_errors()
@with_options({**_COLUMNS, **_QUESTIONS, **_USE})
def _predict(
    model: _Trained,
    file: Annotated[
        str,
        typer.Argument(
            help="Examples, as for finetune, with or without labels; or - for "
            "standard input, a text a line, also to find entities in.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="A file .csv, or .jsonl for an object a line. [default: "
            "standard output, as .csv]",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a named set.")] = "validation",
    as_json: JsonOption = False,
    **asked: Any,
) -> None:
    """Answer with a fine-tuned model: a row a text, a question, an entity.

    \b
    Example: a label and its probability for each text in a table
      bertnb predict reviews/ new.csv --output answers.csv
    Example: for each line
      echo "Not bad at all." | bertnb predict reviews/ -
    """
    from tqdm import tqdm

    from bertnb.tasks import predict

    check_output(output, ".csv", ".jsonl")
    kind, use = _trained(model, asked)
    with _adding(_about(model, kind)):
        examples = _examples(file, split, kind, asked)
    rows: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(examples), 2048), "answering"):
        some = [_asked_only(e) for e in examples[start : start + 2048]]
        where = f"counted in the {len(some):,} examples from {start:,} on"
        with _adding(where) if start else nullcontext():
            answers = predict(examples=some, **use)
        for number, pair in enumerate(zip(some, answers, strict=True), start):
            rows += _row(kind, number, *pair)
    if output is not None:
        output.write_text(_table(rows, output.suffix == ".jsonl"), "utf-8")
        facts = {"task": kind, "examples": len(examples), "rows": len(rows)}
        show_facts(facts | {"output": str(output)}, as_json)
    elif as_json:
        show_facts({"task": kind, "rows": rows}, True)
    else:
        typer.echo(_table(rows, False), nl=False)


def _asked_only(example: Any) -> Any:
    """Return an example without what is known of it."""
    known = {"label", "tags", "answers"} & vars(example).keys()
    return replace(example, **dict.fromkeys(known))


_ENTITY = "sentence type start end text score".split()


def _table(rows: Sequence[dict[str, Any]], lines: bool) -> str:
    """Return rows as text: an object a line, or a table with a header."""
    import csv
    import io
    import json

    text = io.StringIO()
    if lines:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        names = list(rows[0]) if rows else _ENTITY
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


@task_app.command("answer")
@one_line_errors()
@with_options({**_QUESTIONS, **_USE})
def _answer(
    question: Annotated[
        str, typer.Argument(help="The question.", show_default=False)
    ],
    *,
    context: Annotated[
        str,
        typer.Option(help="A file with the text that is asked, or -."),
    ],
    model: Annotated[
        str, typer.Option(help="What finetune has made of questions.")
    ],
    as_json: JsonOption = False,
    **asked: Any,
) -> None:
    """Find the answer to a question in a text.

    \b
    Example: where in the file is the answer?
      bertnb answer "Who wrote it?" --context book.txt --model questions/
    """
    from bertnb.examples import QuestionExample
    from bertnb.tasks import predict

    kind, use = _trained(model, asked)
    if kind != "questions":
        raise ValueError(f"{model} was trained for {kind}, not for questions")
    with open_utf8(context) as text:
        example = QuestionExample(question, text.read())
    (found,) = predict(examples=[example], **use)
    (row,) = _row(kind, 0, example, found)
    del row["id"], row["question"]
    if not row["answer"] and not as_json:
        row = {"answer": "(none in this text)"}
    show_facts(row, as_json)
