"""Each fault, planted in a small workshop, is found by the real tools."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from manifest import ROOT

HEADER = """---
bertnb:
  module: {module}
jupytext:
  formats: ipynb,md:myst
  notebook_metadata_filter: bertnb,-jupytext.text_representation.jupytext_version
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
FIRST = """# The first chapter

It has a formula:

$$
y = 2x .
\\tag{1.1}
$$

Here is its code:

```{code-cell} ipython3
:tags: [export]

def double(x: int) -> int:
    \"\"\"Return twice x, (1.1).\"\"\"
    return 2 * x
```
"""
SECOND = """# The second chapter

By equation (1.1) of [the first](01_first.ipynb), this is four times x:

```{code-cell} ipython3
:tags: [export]

from bertnb.first import double


def fourfold(x: int) -> int:
    \"\"\"Return four times x.\"\"\"
    return double(double(x))
```
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workshop with two chapters in which everything is in order."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(ROOT / "tools", folder / "tools")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "notebooks").mkdir()
    for name, text in {"01_first": FIRST, "02_second": SECOND}.items():
        source = folder / "notebooks" / f"{name}.md"
        source.write_text(HEADER.format(module=name[3:]) + text)
    assert run(folder, "tools/extract.py").returncode == 0
    done = run(folder, "tools/nb.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def workshop(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "workshop"))


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def assert_fails(workshop: Path, command: str, message: str) -> None:
    done = run(workshop, *command.split())
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout + done.stderr


CHECKS = [
    "tools/extract.py --check",
    "tools/nb.py --check",
    "tools/portable.py",
]


@pytest.mark.parametrize("command", CHECKS)
def test_a_sound_workshop_passes(workshop: Path, command: str) -> None:
    done = run(workshop, *command.split())
    assert done.returncode == 0, done.stdout + done.stderr


def test_extraction_and_execution_give_the_same_bytes(workshop: Path) -> None:
    files = [*workshop.glob("bertnb/*.py"), *workshop.glob("notebooks/*")]
    before = {file: file.read_bytes() for file in files}
    assert run(workshop, "tools/extract.py").returncode == 0
    assert run(workshop, "tools/nb.py").returncode == 0
    assert {file: file.read_bytes() for file in files} == before


def test_executing_elsewhere_leaves_the_checkout_alone(workshop: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in workshop.glob("notebooks/*")}
    assert run(workshop, "tools/nb.py", "--into", "away").returncode == 0
    after = {f: f.stat().st_mtime_ns for f in workshop.glob("notebooks/*")}
    assert before == after
    for file in (workshop / "away").iterdir():
        assert (
            file.read_bytes()
            == (workshop / "notebooks" / file.name).read_bytes()
        )


def test_a_change_without_extraction(workshop: Path) -> None:
    change(workshop / "notebooks/01_first.md", "return 2 * x", "return 3 * x")
    assert_fails(workshop, CHECKS[0], "+    return 3 * x")


def test_a_change_of_the_package_by_hand(workshop: Path) -> None:
    change(workshop / "bertnb/first.py", "return 2 * x", "return 3 * x")
    assert_fails(workshop, CHECKS[0], "-    return 3 * x")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bertnb.first import double", "bertnb.third import double", "earlier"),
        ("bertnb.first import double", "bertnb import double", "earlier"),
        ("def fourfold", "def double", "exports double too"),
        ("module: second", "module: first", "another notebook makes first.py"),
        ('    """Return four times x."""\n', "", "has no docstring"),
        ("return double(double(x))", "return double((", "was never closed"),
    ],
)
def test_extraction_refuses(
    workshop: Path, old: str, new: str, message: str
) -> None:
    change(workshop / "notebooks/02_second.md", old, new)
    assert_fails(workshop, "tools/extract.py", message)


def test_extraction_refuses_an_upward_import(workshop: Path) -> None:
    change(
        workshop / "notebooks/01_first.md",
        "    return 2 * x",
        "    from bertnb.second import fourfold\n\n    return fourfold(x) // 2",
    )
    assert_fails(workshop, CHECKS[0], "imports bertnb.second")


def test_extraction_refuses_a_name_that_is_defined_twice(
    workshop: Path,
) -> None:
    change(
        workshop / "notebooks/01_first.md",
        "def double",
        "double = 1\n\n\ndef double",
    )
    assert_fails(workshop, "tools/extract.py", "double is defined twice")


def test_extraction_refuses_a_module_whose_notebook_is_gone(
    workshop: Path,
) -> None:
    (workshop / "notebooks/02_second.md").unlink()
    assert_fails(workshop, "tools/extract.py", "second.py has no notebook")


@pytest.mark.parametrize("word", ["four times x:", "double(double(x))"])
def test_a_stale_notebook(workshop: Path, word: str) -> None:
    change(workshop / "notebooks/02_second.md", word, f"{word} # changed")
    assert_fails(workshop, CHECKS[1], "differs from its .ipynb in the cell")


def test_a_missing_notebook(workshop: Path) -> None:
    (workshop / "notebooks/02_second.ipynb").unlink()
    assert_fails(workshop, CHECKS[1], "02_second.md has no .ipynb")


def test_a_notebook_that_was_not_executed(workshop: Path) -> None:
    path = workshop / "notebooks/02_second.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].execution_count = None
    nbformat.write(notebook, path)
    assert_fails(workshop, CHECKS[1], "was not executed")


def test_an_old_first_cell(workshop: Path) -> None:
    change(workshop / "pyproject.toml", "/bertnb/bertnb", "/fork/bertnb")
    assert_fails(workshop, CHECKS[1], "the set-up cell")


def test_a_cell_that_fails(workshop: Path) -> None:
    change(
        workshop / "notebooks/02_second.md", "def fourfold", "1 / 0\n\n\ndef f"
    )
    assert_fails(workshop, "tools/nb.py", "ZeroDivisionError")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```{note}\nA directive.\n```", "a MyST directive"),
        ("By {eq}`attention` we see.", "a MyST role"),
        ("$$\nx\n$$ (label)", "a MyST equation label"),
        ("(target)=\n\nText.", "a MyST target"),
        (":::{note}\nText.\n:::", "a MyST fence"),
        ("A footnote[^1].\n\n[^1]: Here.", "a footnote"),
        ("> [!NOTE]\n> Text.", "a GitHub alert"),
        ("It costs $5.", "a dollar sign"),
        ("\\begin{align} x \\end{align}", "LaTeX outside $"),
        ("$$\n\\begin{align} x \\end{align}\n$$", "use aligned"),
        ("$$\nx \\label{x}\n$$", "is not the same everywhere"),
        ("$$\nx \\tag{1.2}\ny \\tag{1.3}\n$$", "two \\tag"),
        ("$$\nx \\\\ y\n$$", "a line break outside an environment"),
        ("Inline $x \\tag{1.2}$.", "only $$ takes one"),
        ("![A cat](cat.png)", "an image"),
        ("[Next](09_ninth.ipynb).", "a notebook that is not there"),
        ("[Source](01_first.md).", "link to the .ipynb"),
        ("[Up](01_first.ipynb#formula).", "a link to a heading"),
        ("[Page](../book/nothing.md).", "a file that is not there"),
        ("## 1. Numbered", "a heading that begins like a list"),
        (
            "<details>\n<summary>S</summary>\n\n## H\n\n</details>",
            "a heading inside <details>",
        ),
        (
            "<details>\n<summary>S</summary>\nText.\n\n</details>",
            "no empty line",
        ),
        ("<details>\n<summary>S</summary>\n\nText.", "is not closed"),
        ('<div class="x">Text.</div>', "HTML"),
        ("| a |\n|---|\n| $p(x|y)$ |", "a | in a table's formula"),
        ("```{code-cell} ipython3\n2 + 2\n```", "two code cells"),
    ],
)
def test_prose_that_is_not_portable(
    workshop: Path, text: str, message: str
) -> None:
    path = workshop / "notebooks/01_first.md"
    path.write_text(f"{path.read_text()}\n{text}\n", encoding="utf-8")
    assert_fails(workshop, "tools/portable.py", message)


def test_prose_that_is_portable(workshop: Path) -> None:
    path = workshop / "notebooks/01_first.md"
    text = """
> **Note.** A call-out with $a_1$ and `$HOME`, see [here](02_second.ipynb).

| symbol | meaning |
|---|---|
| $a$ | $p(x \\mid y)$ and $b$ |

<details>
<summary>Solution</summary>

Prose, a [link](https://example.org) and an end.

</details>
"""
    path.write_text(path.read_text() + text, encoding="utf-8")
    done = run(workshop, "tools/portable.py")
    assert done.returncode == 0, done.stdout


CONF = """
import sys
sys.path.insert(0, {extension!r})
extensions = ["myst_nb", "bertbook"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"
exclude_patterns = ["**/*.md", "tools", "out"]
root_doc = "notebooks/01_first"
"""


def build(workshop: Path) -> subprocess.CompletedProcess[str]:
    """Render the two chapters as strictly as the book."""
    extension = str(ROOT / "book" / "_ext")
    (workshop / "conf.py").write_text(CONF.format(extension=extension))
    notebook = workshop / "notebooks/02_second.ipynb"
    orphan = nbformat.read(notebook, 4)
    orphan.metadata["orphan"] = True
    nbformat.write(orphan, notebook)
    strict = ["-m", "sphinx", "-W", "-n", "--keep-going", "-q"]
    return run(workshop, *strict, ".", "out")


def test_a_sound_book_links_its_equations(workshop: Path) -> None:
    done = build(workshop)
    assert done.returncode == 0, done.stderr
    first = (workshop / "out/notebooks/01_first.html").read_text("utf-8")
    second = (workshop / "out/notebooks/02_second.html").read_text("utf-8")
    assert 'id="eq-1-1"' in first
    assert '<a href="#eq-1-1">(1.1)</a>' in first  # in the docstring
    assert 'href="01_first.html#eq-1-1"' in second
    assert ">bertnb/first.py</a>" in first
    assert '<p class="chapter-number">Chapter 2</p>' in second
    assert "<title>2. The second chapter" in second


@pytest.mark.parametrize(
    "text",
    ["equation (9.9)", "equations (1.1) and (9.9)", "Eq. (1.1), (1.1)-(9.9)"],
)
def test_an_unknown_equation_fails_the_build(workshop: Path, text: str) -> None:
    change(workshop / "notebooks/02_second.ipynb", "equation (1.1)", text)
    done = build(workshop)
    assert done.returncode == 1
    assert "unknown equation (9.9)" in done.stderr


@pytest.mark.parametrize("chapter", ["01_first", "02_second"])
def test_an_equation_defined_twice_fails_the_build(
    workshop: Path, chapter: str
) -> None:
    path = workshop / f"notebooks/{chapter}.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source += "\n\n$$\nz = x\n\\tag{1.1}\n$$\n"
    nbformat.write(notebook, path)
    done = build(workshop)
    assert done.returncode == 1
    assert "equation (1.1) is defined in" in done.stderr
