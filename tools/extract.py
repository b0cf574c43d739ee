"""Write bertnb/*.py from the notebook cells tagged `export`; with --check only compare, and fail on a difference."""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bertnb"


class Refused(Exception):
    """The notebooks cannot become a package; the message names the cell."""


def split_imports(source: str) -> tuple[list[str], str]:
    """Return the import statements at the top level of `source`, and the rest."""
    lines = source.splitlines()
    imports: list[str] = []
    hoisted: set[int] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            span = range(node.lineno - 1, node.end_lineno or node.lineno)
            imports.append("\n".join(lines[i] for i in span))
            hoisted.update(span)
    return imports, "\n".join(x for i, x in enumerate(lines) if i not in hoisted).strip("\n")


def public_names(source: str, where: str) -> list[str]:
    """Return the public names that `source` defines; refuse a function or class without a docstring."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not node.name.startswith("_") and not ast.get_docstring(node):
                raise Refused(f"{where}: {node.name} has no docstring")
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def tidy(text: str, filename: str) -> str:
    """Sort the imports and format, as ruff is configured for the package."""
    for command in (["check", "--select", "I,F401", "--fix-only", "-q"], ["format", "-q"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", f"bertnb/{filename}", "-"]
        done = subprocess.run(ruff, input=text, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise Refused(f"{filename}: ruff says {done.stderr.strip()}")
        text = done.stdout
    return text


def module(path: Path) -> tuple[str, str, list[str]]:
    """Return the name, the source and the public names of the module that the notebook at `path` holds."""
    notebook = jupytext.read(path)
    name = notebook.metadata["bertnb"]["module"]
    where = f"notebooks/{path.name}"
    title, heading = "", ""
    imports: list[str] = []
    body: list[str] = []
    names: list[str] = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for match in re.finditer(r"^#+ (.+)$", cell.source, re.M):
                title, heading = title or match[1], match[1]
        elif "export" in cell.metadata.get("tags", []):
            new, code = split_imports(cell.source)
            imports += new
            if not code:
                continue
            body.append(f"# %% {heading}\n{code}" if heading else code)
            heading = ""
            for exported in public_names(code, f"{where} cell {number}"):
                if exported in names:
                    raise Refused(f"{where} cell {number}: {exported} is exported twice")
                names.append(exported)
    docstring = f'"""{title}.\n\nWritten by tools/extract.py from {where}: edit that notebook, not this file.\n"""'
    parts = [docstring, "\n".join(imports), f"__all__ = {names!r}", *body]
    return name, tidy("\n\n\n".join(parts) + "\n", f"{name}.py"), names


def initializer(homes: dict[str, str]) -> str:
    """Return bertnb/__init__.py: every public name, loaded from its module when it is first asked for."""
    by_module: dict[str, list[str]] = {}
    for name, home in homes.items():
        by_module.setdefault(home, []).append(name)
    typed = "\n".join(f"    from bertnb.{home} import {', '.join(names)}" for home, names in by_module.items())
    table = "\n".join(f"    {name!r}: {home!r}," for name, home in sorted(homes.items()))
    return tidy(
        f'''"""BERT, derived, proven and fast: the code of the book's notebooks.

Written by tools/extract.py. `import bertnb` loads nothing: a name brings in its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
{typed}

__version__ = "{version()}"

_HOME = {{
{table}
}}
__all__ = [{", ".join(repr(name) for name in sorted(homes))}]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"bertnb.{{_HOME[name]}}"), name)
    if name in _HOME.values():
        return import_module(f"bertnb.{{name}}")
    raise AttributeError(f"module 'bertnb' has no attribute {{name!r}}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_HOME.values()])
''',
        "__init__.py",
    )


def version() -> str:
    """Return the version that pyproject.toml states."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    if not found:
        raise Refused("pyproject.toml states no version")
    return found[1]


def package() -> dict[Path, str]:
    """Return the files of the package and their content; refuse a name that two notebooks export."""
    files: dict[Path, str] = {}
    homes: dict[str, str] = {}
    for path in sorted(ROOT.glob("notebooks/[0-9]*.md")):
        if "module" not in jupytext.read(path).metadata.get("bertnb", {}):
            continue
        name, source, names = module(path)
        for exported in names:
            if exported in homes:
                raise Refused(f"notebooks/{path.name}: {exported} is already exported by {homes[exported]}")
            homes[exported] = name
        files[PACKAGE / f"{name}.py"] = source
    files[PACKAGE / "__init__.py"] = initializer(homes)
    return files


def main() -> int:
    """Write or check the package; return the exit status."""
    check = "--check" in sys.argv[1:]
    try:
        files = package()
    except Refused as why:
        print(f"extract: {why}", file=sys.stderr)
        return 1
    orphans = [path for path in PACKAGE.glob("*.py") if path not in files]
    for path in orphans:
        print(f"extract: {path.relative_to(ROOT)} has no notebook (any more): delete it", file=sys.stderr)
    stale = {p: text for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if check:
            old = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
            sys.stdout.writelines(difflib.unified_diff(old, text.splitlines(True), str(path), "its notebook"))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    if check and stale:
        print("extract: the package is not what the notebooks say: run `make package`", file=sys.stderr)
    return 1 if orphans or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
