"""What is made of the notebooks is up to date, portable, and within bounds."""

import ast
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
import vendor
import yaml
from manifest import ROOT, project, repository, sources

NOTEBOOKS = sources()
MODULES = sorted(ROOT.glob("bertnb/[a-z]*.py"))
STATEMENTS_A_MODULE = 200
STATEMENTS_A_FUNCTION = 30


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "tools/extract.py --check",
        "tools/nb.py --check",
        "tools/portable.py",
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
    ],
)
def test_the_checkout_passes(command: str) -> None:
    run(sys.executable, *command.split())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_quiet(path: Path) -> None:
    """No warning, no progress bar, no address: they change from run to run."""
    for cell in nbformat.read(path.with_suffix(".ipynb"), 4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", (cell.id, output.text)
            text = str(output.get("text", output.get("data", "")))
            assert not re.search(r" at 0x[0-9a-f]{6}", text), (cell.id, text)


def tags() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in NOTEBOOKS)
    return set(re.findall(r"\\tag\{(\d+\.\d+)\}", text))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_equations_have_the_number_of_their_chapter(path: Path) -> None:
    found = re.findall(r"\\tag\{(\d+)\.(\d+)\}", path.read_text("utf-8"))
    assert {int(chapter) for chapter, _ in found} <= {int(path.stem[:2])}
    numbers = [int(number) for _, number in found]
    assert numbers == sorted(set(numbers))
    if path.stem[:2] != "00":  # its notebooks share the 0 in any order
        same = [p for p in NOTEBOOKS if p.stem[:2] == path.stem[:2]]
        text = "".join(p.read_text("utf-8") for p in same)
        numbers = [int(n) for n in re.findall(r"\\tag\{\d+\.(\d+)\}", text)]
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_cites_equations_that_exist(path: Path) -> None:
    known = tags()
    chapters = {number.split(".")[0] for number in known}
    for number, cell in enumerate(jupytext.read(path).cells):
        if cell.cell_type != "code":
            continue
        comments = re.findall(r'#.*|""".*?"""', cell.source, re.S)
        for cited in re.findall(r"\((\d+\.\d+)\)", " ".join(comments)):
            if cited.split(".")[0] in chapters:
                assert cited in known, f"cell {number} cites ({cited})"


def statements(tree: ast.AST) -> int:
    """Count the statements, whatever their format; not imports, docstrings."""
    return sum(
        isinstance(node, ast.stmt)
        and not isinstance(node, ast.Import | ast.ImportFrom)
        and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_and_functions_stay_small(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert statements(tree) <= STATEMENTS_A_MODULE
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert statements(node) <= STATEMENTS_A_FUNCTION, node.name


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def test_importing_the_package_takes_under_50_milliseconds() -> None:
    extra = [seconds("import bertnb") - seconds("pass") for _ in range(9)]
    assert statistics.median(extra) < 0.050


def test_importing_the_package_is_silent_and_loads_no_library() -> None:
    code = (
        "import sys, bertnb; "
        "print([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_public_name_is_there() -> None:
    import bertnb

    for name in bertnb.__all__:
        assert getattr(bertnb, name) is not None
    assert bertnb.__version__ == project()["version"]
    with pytest.raises(AttributeError, match="no attribute 'BertForNothing'"):
        _ = bertnb.BertForNothing


def test_the_repository_stands_in_one_place() -> None:
    address = repository()
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert config["repository"]["url"] == address
    owner, name = address.removeprefix("https://github.com/").split("/")
    assert config["html"]["baseurl"] == f"https://{owner}.github.io/{name}/"
    named = re.compile(r"github\.com/([\w-]+/bertnb)\b")
    for path in [*NOTEBOOKS, ROOT / "README.md", ROOT / "index.md"]:
        found = set(named.findall(path.read_text(encoding="utf-8")))
        assert found <= {f"{owner}/{name}"}, path.name


def test_every_notebook_is_in_the_table_of_contents() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    files = [c["file"] for part in contents["parts"] for c in part["chapters"]]
    chapters = [file for file in files if file.startswith("notebooks/")]
    assert sorted(chapters) == [f"notebooks/{p.stem}" for p in NOTEBOOKS]
    assert sorted(chapters, key=lambda file: file[:12]) == chapters


def test_every_module_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "book/api.md").read_text(encoding="utf-8")
    listed = re.findall(r"automodule:: bertnb\.(\w+)", page)
    assert sorted(listed) == [path.stem for path in MODULES]


def test_mathjax_has_one_version() -> None:
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    assert {package.version for package in vendor.PACKAGES} == set(
        re.findall(r"/mathjax@([\d.]+)/", config)
    )


def test_without_npm_mathjax_comes_from_its_cdn(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "tools/vendor.py")],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "npm is not installed" in done.stdout
    assert "CDN" in done.stdout


def test_this_environment_is_the_one_of_the_constraints() -> None:
    """What the tests say holds for the versions that a reader gets."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if "==" not in line:  # a comment, or what only builds a package
            continue
        pin, _, marker = line.partition("; ")
        if marker and sys.version_info < (3, 11):
            continue
        name, version = pin.split("==")
        found = importlib.metadata.version(name).split("+")[0]
        assert found == version, name
