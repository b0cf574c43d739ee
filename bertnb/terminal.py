"""The manners of a program.

Written by tools/extract.py from notebooks/21_command.md: edit that notebook, not this file.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import Parameter, signature
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

__all__ = [
    "new_app",
    "one_line_errors",
    "show_facts",
    "with_options",
    "OutputOption",
    "JsonOption",
    "DeviceOption",
    "ModelOption",
    "open_utf8",
    "read_lines",
    "check_output",
    "load_model",
]


# %% The frame
def new_app(name: str | None = None) -> typer.Typer:
    """Return a program without commands, to be given some. Without a name it
    is a part of another."""
    return typer.Typer(
        name=name,
        rich_markup_mode=None,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )


_MISTAKES = (LookupError, AttributeError, NameError, AssertionError)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors and warnings into one line each, on standard error."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            yield
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise  # Typer knows what to do
        except KeyboardInterrupt:
            typer.echo("error: interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("BERTNB_TRACEBACK") == "1":
                raise
            text, kind = " ".join(str(error).split()), type(error).__name__
            if isinstance(error, _MISTAKES):
                text = f"{kind}: {text}: a mistake in bertnb, please report it"
            typer.echo(f"error: {text or kind}", err=True)
            raise typer.Exit(1) from None


def _warn(message: Warning | str, *place: Any, **more: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def show_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print a result: one JSON document, or a table of two columns."""
    if as_json:
        typer.echo(json.dumps(facts))
        return
    told = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, told))
    for name, value in told.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        if type(value) is int:
            shown = f"{value:,}"
        typer.echo(f"{name.replace('_', ' '):{width}}  {shown}")


def with_options(
    table: dict[str, tuple[Any, str]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each entry; None where it is not used."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        plain = signature(command)
        own = [p for p in plain.parameters.values() if p.kind != p.VAR_KEYWORD]
        added = [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=typer.Option(None, help=help, show_default=False),
                annotation=kind | None,
            )
            for name, (kind, help) in table.items()
        ]
        whole = plain.replace(parameters=[*own, *added])
        command.__signature__ = whole  # type: ignore[attr-defined]
        return command

    return extend


# %% What several commands take
OutputOption = Annotated[Path, typer.Option(help="The folder to write.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Such as cpu or cuda:1. [default: CUDA where there is one]"
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="A folder, or a name on the hub. [default: the small model that "
        "comes with bertnb]",
        show_default=False,
    ),
]


@contextmanager
def open_utf8(name: str) -> Iterator[TextIO]:
    """Open a file, or - for standard input, to read lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text.
    """
    given = nullcontext(sys.stdin.buffer)
    with (
        given if name == "-" else Path(name).open("rb") as file,
        TextIOWrapper(file, encoding="utf-8") as lines,
    ):
        try:
            yield lines
        except UnicodeDecodeError as error:
            what = "standard input" if name == "-" else name
            raise ValueError(
                f"{what} is not UTF-8 text ({error.reason}): convert it first, "
                "as iconv does"
            ) from error


def read_lines(name: str) -> list[str]:
    """Return the lines of a file, or of standard input for -, without their
    ends.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text, or standard input is empty.
    """
    with open_utf8(name) as lines:
        found = [line.removesuffix("\n") for line in lines]
    if name == "-" and not found:
        raise ValueError("standard input is empty: expected a text a line")
    return found


def check_output(path: Path | None, *endings: str) -> None:
    """Refuse a file that cannot be written, before the work is done.

    Raises:
        typer.BadParameter: it ends otherwise, or its folder is not there or
            may not be written to.
    """
    if path is None:
        return
    if path.suffix not in endings:
        expected = " or ".join(endings)
        raise typer.BadParameter(f"--output {path}: expected {expected}")
    target = path if path.exists() else path.parent
    if not path.parent.is_dir() or not os.access(target, os.W_OK):
        raise typer.BadParameter(f"--output {path}: {target} is not writable")


def load_model(
    kind: Any, model: str | None, device: str | None
) -> tuple[Any, Any]:
    """Return a model of a class, on its device, and its tokenizer.

    Args:
        kind: the class. model: a folder, or a name on the hub; None: the
            model that comes with the package. device: None: CUDA, if there.
    """
    from bertnb.optimization import pick_device
    from bertnb.pretraining import book_model
    from bertnb.tokenization import WordPieceTokenizer

    folder = model or book_model()
    tokenizer = WordPieceTokenizer.from_pretrained(folder)
    return kind.from_pretrained(folder).to(pick_device(device)), tokenizer
