"""Write the package bertnb/ from the notebook cells tagged `export`.

python tools/extract.py            # write bertnb/*.py
python tools/extract.py --check    # only compare; fail on a difference
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jupytext
from manifest import ROOT, project, sources

PACKAGE = ROOT / "bertnb"
RUFF = [sys.executable, "-m", "ruff"]
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class RefusedError(Exception):
    """The notebooks cannot become a package; the message says which cell."""


class Module(NamedTuple):
    """What one notebook gives to the package."""

    name: str
    source: str
    public: list[str]


def parse(source: str, where: str) -> list[ast.stmt]:
    """Return the statements of a cell."""
    try:
        return ast.parse(source).body
    except SyntaxError as error:
        raise RefusedError(f"{where}: {error}") from error


def split_imports(source: str, where: str) -> tuple[list[str], str]:
    """Return the import statements at the top level, and the rest."""
    lines = source.splitlines()
    imports: list[str] = []
    hoisted: set[int] = set()
    for node in parse(source, where):
        if isinstance(node, ast.Import | ast.ImportFrom):
            span = range(node.lineno - 1, node.end_lineno or node.lineno)
            imports.append("\n".join(lines[i] for i in span))
            hoisted.update(span)
    rest = [line for i, line in enumerate(lines) if i not in hoisted]
    return imports, "\n".join(rest).strip("\n")


def defined_names(source: str, where: str) -> list[str]:
    """Return the names that a cell defines; refuse an undocumented export."""
    names: list[str] = []
    for node in parse(source, where):
        if isinstance(node, DEFINITION):
            if not node.name.startswith("_") and not ast.get_docstring(node):
                raise RefusedError(f"{where}: {node.name} has no docstring")
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                parts = getattr(target, "elts", [target])  # of a tuple
                names += [t.id for t in parts if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names.append(ast.unparse(node.target))
    return names


def tidy(text: str, filename: str) -> str:
    """Sort the imports, drop unused ones, and format."""
    sort = ["check", "--select", "I,F401", "--fix-only", "-q"]
    for command in (sort, ["format", "-q"]):
        done = subprocess.run(
            [*RUFF, *command, "--stdin-filename", f"bertnb/{filename}", "-"],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            raise RefusedError(f"{filename}: {done.stderr.strip()}")
        text = done.stdout
    return text


def module(path: Path) -> Module | None:
    """Return the module of a notebook, or None if it exports nothing."""
    notebook = jupytext.read(path)
    name = notebook.metadata.get("bertnb", {}).get("module")
    title, heading = "", ""
    imports: list[str] = []
    body: list[str] = []
    names: list[str] = []
    for number, cell in enumerate(notebook.cells):
        where = f"notebooks/{path.name}, cell {number}"
        if cell.cell_type == "markdown":
            for match in re.finditer(r"^#+ (.+)$", cell.source, re.M):
                title, heading = title or match[1], match[1]
        elif "export" in cell.metadata.get("tags", []):
            if name is None:
                raise RefusedError(f"{where}: the header names no module")
            new, code = split_imports(cell.source, where)
            imports += new
            if not code:
                continue
            body.append(f"# %% {heading}\n{code}" if heading else code)
            heading = ""
            for defined in defined_names(code, where):
                if defined in names:
                    raise RefusedError(f"{where}: {defined} is defined twice")
                names.append(defined)
    if name is None:
        return None
    public = [name for name in names if not name.startswith("_")]
    docstring = (
        f'"""{title}.\n\n'
        f"Written by tools/extract.py from notebooks/{path.name}: "
        'edit that notebook, not this file.\n"""'
    )
    parts = [docstring, "\n".join(imports), f"__all__ = {public!r}", *body]
    source = tidy("\n\n\n".join(parts) + "\n", f"{name}.py")
    return Module(name, source, public)


INITIALIZER = '''"""BERT, derived and proven: the code of the book's notebooks.

Written by tools/extract.py. `import bertnb` loads nothing: a name brings in
its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
{typed}

__version__ = "{version}"

_HOME = {{
{homes}
}}
__all__ = {public}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"bertnb.{{_HOME[name]}}"), name)
    if name in _HOME.values():
        return import_module(f"bertnb.{{name}}")
    raise AttributeError(f"module 'bertnb' has no attribute {{name!r}}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_HOME.values()])
'''


def initializer(modules: list[Module]) -> str:
    """Return __init__.py: every public name, loaded when first asked for."""
    homes = {name: m.name for m in modules for name in m.public}
    return tidy(
        INITIALIZER.format(
            typed="\n".join(
                f"    from bertnb.{m.name} import {', '.join(m.public)}"
                for m in modules
                if m.public
            ),
            version=project()["version"],
            homes="\n".join(
                f"    {name!r}: {home!r},"
                for name, home in sorted(homes.items())
            ),
            public=repr(sorted(homes)),
        ),
        "__init__.py",
    )


def imported(source: str) -> set[str]:
    """Return the package's modules that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            source_of = "." * node.level + (node.module or "")
            names = [f"bertnb.{alias.name}" for alias in node.names]
            found |= {*names} if source_of == "bertnb" else {source_of}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):  # import bertnb; bertnb.name
            found.add(ast.unparse(node))
    ours = re.compile(r"\.|bertnb\.(?!__)")
    return {name for name in found if ours.match(name)}


def package() -> dict[Path, str]:
    """Return the package's files and their content."""
    modules: list[Module] = []
    homes: dict[str, str] = {}
    for path in sources():
        made = module(path)
        if made is None:
            continue
        where = f"notebooks/{path.name}"
        if made.name in homes.values():
            raise RefusedError(
                f"{where}: another notebook makes {made.name}.py"
            )
        for name in made.public:
            if name in homes:
                raise RefusedError(f"{where}: {homes[name]} exports {name} too")
            homes[name] = made.name
        earlier = {f"bertnb.{m.name}" for m in modules}
        for name in sorted(imported(made.source) - earlier):
            raise RefusedError(
                f"{where}: imports {name}; a chapter's code imports only from "
                "modules of earlier chapters, each by its name"
            )
        modules.append(made)
    files = {PACKAGE / f"{m.name}.py": m.source for m in modules}
    return files | {PACKAGE / "__init__.py": initializer(modules)}


def complain(message: str) -> None:
    """Print a message to standard error."""
    print(f"extract: {message}", file=sys.stderr)


def main() -> int:
    """Write or check the package; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    try:
        files = package()
    except RefusedError as why:
        complain(str(why))
        return 1
    orphans = sorted(set(PACKAGE.glob("*.py")) - set(files))
    for path in orphans:
        complain(
            f"{path.relative_to(ROOT)} has no notebook any more: delete it"
        )
    stale = False
    for path, new in files.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == new:
            continue
        name = str(path.relative_to(ROOT))
        if check:
            stale = True
            diff = difflib.unified_diff(
                old.splitlines(True), new.splitlines(True), name, "its notebook"
            )
            sys.stdout.writelines(diff)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new, encoding="utf-8")
            print(f"wrote {name}")
    if stale:
        complain("the package is not what the notebooks say: `make package`")
    return 1 if orphans or stale else 0


if __name__ == "__main__":
    sys.exit(main())
