"""Every equation of the model has a test, and the ledger finds where not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ledger
import numpy as np
import pytest
import torch
from manifest import ROOT

CHAPTER = """# The first chapter

## A formula

$$
y = 2x .
\\tag{1.1}
$$

A step on the way:

$$
\\begin{aligned}
2x &= x + x , \\\\
x + x &= y .
\\end{aligned}
\\tag{1.2}
$$

```{code-cell} ipython3
:tags: [export]

def double(x):
    \"\"\"Return twice x, (1.1); not (0.5), which is a number.\"\"\"
    return 2 * x
```

By equation (1.1), this is four:

```{code-cell} ipython3
double(2)
```

## Another formula

$$
z = y \\tag{1.3}
$$

## Something else

```{code-cell} ipython3
5
```
"""
SECOND = """# The second chapter

By equation (1.1) of the first chapter:

```{code-cell} ipython3
4  # (1.2)
```
"""
MODULE = '''"""The first chapter."""


def double(x):
    """Return twice x, (1.1); not (0.5), which is a number."""
    return 2 * x


ERROR = "a text that (1.3) stands in is no citation"
'''
TESTS = """import pytest


@pytest.mark.equation("1.1")
@pytest.mark.parametrize("x", [3.0, 1.0])
def test_the_double_is_a_sum(x, measured):
    measured(2 * x + x * 1.234e-9 - (x + x), 1e-6)


@pytest.mark.equation("1.1")
def test_zero_stays_zero():
    assert 2 * 0 == 0
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # the outer run's pytest must not speak for the inner one's
    inner = {k: v for k, v in os.environ.items() if "PYTEST" not in k}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env=inner,
    )


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """One chapter with one equation in the package, and its test."""
    for name in ("tools", "book/_ext"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, text in {
        "notebooks/01_first.md": CHAPTER,
        "notebooks/02_second.md": SECOND,
        "bertnb/first.py": MODULE,
        "tests/test_first.py": TESTS,
        "tests/conftest.py": (ROOT / "tests/conftest.py").read_text("utf-8"),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def page(workshop: Path) -> str:
    done = run(workshop, "tools/ledger.py", "--into", "out")
    assert done.returncode == 0, done.stderr
    return (workshop / "out/ledger.md").read_text(encoding="utf-8")


def assert_fails(workshop: Path, *messages: str) -> None:
    for command in (["--check"], ["--into", "out"]):
        done = run(workshop, "tools/ledger.py", *command)
        assert done.returncode == 1, done.stdout + done.stderr
        for message in messages:
            assert message in done.stderr
    assert not (workshop / "out/ledger.md").exists()


def test_every_equation_of_the_model_has_a_test() -> None:
    done = run(ROOT, "tools/ledger.py", "--check")
    assert done.returncode == 0, done.stderr


def test_the_page_leads_from_the_equation_to_its_proof(workshop: Path) -> None:
    text = page(workshop)
    assert "**3 numbered equations**. **1** of them" in text
    assert "**2 tests** prove 1 equations" in text
    assert "* - (1.1) <br> $y = 2x$\n" in text
    assert "`double <bertnb.first.double>` [`first.py:5`](" in text
    assert "bertnb/first.py#L5)" in text
    assert "[the double is a sum](" in text
    name = "tests/test_first.py::test_the_double_is_a_sum"
    assert f'tests/test_first.py#L6 "{name}"): ' in text
    link = '<a href="../notebooks/01_first.html#cell-3">3</a>'
    assert f"in the chapter: cell {link}\n" in text
    assert "* - (1.2) <br> $2x = x + x$\n" in text  # the first row
    assert f"\n  - no code\n  - in its section: cell {link}\n" in text
    assert text.endswith("\n- (1.3), Another formula\n")


def test_equations_stand_in_the_order_of_their_numbers() -> None:
    numbers = ["10.1", "2.10", "2.9", "9.1"]
    assert sorted(numbers, key=ledger.order) == ["2.9", "2.10", "9.1", "10.1"]


@pytest.mark.parametrize(
    ("figure", "tex"),
    [
        (0.0, "0"),
        (0.01234, "0.012"),
        (0.00123, "0.0012"),
        (85.2, "85"),
        (1234.0, "1.2 \\cdot 10^{3}"),
        (1e-5, "10^{-5}"),
        (2.0e-5, "2 \\cdot 10^{-5}"),
        (4.44e-16, "4.4 \\cdot 10^{-16}"),
        (7.0, "7"),
    ],
)
def test_figures_have_two_digits(figure, tex) -> None:
    assert ledger.power(figure) == tex


@pytest.mark.parametrize(
    ("display", "row"),
    [
        (" y = 2x . \\tag{1.1} ", "y = 2x"),
        (
            "\\begin{aligned} a &= b , \\\\ c &= d \\end{aligned} \\tag{1.1}",
            "a = b",
        ),
        (
            "x = \\begin{cases} 1 & y \\\\ 0 & z \\end{cases} \\tag{1.1}",
            "x = \\begin{cases} 1 & y \\\\ 0 & z \\end{cases}",
        ),
    ],
)
def test_a_display_is_shown_by_its_first_row(display, row) -> None:
    assert ledger.first_row(display) == row


def test_an_equation_of_the_package_without_a_test(workshop: Path) -> None:
    change(workshop / "tests/test_first.py", "@pytest.mark.equation", "@print")
    assert_fails(
        workshop,
        "equation (1.1) of notebooks/01_first.md is in the package "
        "(bertnb/first.py:5) but no test proves it",
        '@pytest.mark.equation("1.1")',
    )


def test_a_new_citation_without_a_test(workshop: Path) -> None:
    change(workshop / "bertnb/first.py", "2 * x", "2 * x  # (1.3)")
    assert_fails(workshop, "equation (1.3) of", "(bertnb/first.py:6) but no")


def test_a_mark_of_an_equation_that_no_notebook_has(workshop: Path) -> None:
    change(workshop / "tests/test_first.py", '"1.1"', '"1.1", "9.9"')
    assert_fails(
        workshop,
        "tests/test_first.py:6: test_the_double_is_a_sum is marked with "
        "equation (9.9), which no notebook has",
    )


def test_a_mark_that_is_no_text(workshop: Path) -> None:
    change(workshop / "tests/test_first.py", '"1.1"', "1.10")
    assert_fails(workshop, 'test_first.py:6: write equations as text, "8.5"')


def test_a_proof_without_a_figure_is_said(workshop: Path) -> None:
    done = run(workshop, "tools/ledger.py", "--check")
    assert done.returncode == 0
    name = "tests/test_first.py::test_the_double_is_a_sum"
    assert f"note: {name} is not measured yet" in done.stderr
    assert page(workshop).count("*not measured*") == 2


def test_what_is_measured_is_recorded_and_shown(workshop: Path) -> None:
    record = workshop / "book/runs/ledger.jsonl"
    done = run(workshop, "tools/ledger.py", "--measure")
    assert done.returncode == 0, done.stdout + done.stderr
    head, *lines = map(json.loads, record.read_text("utf-8").splitlines())
    assert set(head) == {"command", "hardware", "versions", "commit"}
    file = "tests/test_first.py"
    assert lines == [
        {
            "test": f"{file}::test_the_double_is_a_sum",
            "difference": 3.7e-9,  # the larger of the two, in two digits
            "bound": 1e-6,
        },
        {
            "test": f"{file}::test_zero_stays_zero",
            "difference": None,
            "bound": None,
        },
    ]
    text = page(workshop)
    assert "$3.7 \\cdot 10^{-9} \\le 10^{-6}$<br>" in text
    assert "[zero stays zero](" in text
    assert '::test_zero_stays_zero"): holds<br>' in text
    assert "the largest difference is $3.7 \\cdot 10^{-9}$" in text
    assert "*not measured*" not in text
    assert not run(workshop, "tools/ledger.py", "--check").stderr


def test_a_proof_that_fails_leaves_the_record_alone(workshop: Path) -> None:
    change(workshop / "tests/test_first.py", "1e-6", "1e-10")
    done = run(workshop, "tools/ledger.py", "--measure")
    assert done.returncode == 1
    assert "3.7e-09, above the bound 1e-10: equation (1.1)" in done.stdout
    assert not (workshop / "book/runs/ledger.jsonl").exists()


def test_two_processes_write_one_record(workshop: Path) -> None:
    done = run(
        workshop, "-m", "pytest", "-n2", "--record-ledger=raw.json", "tests"
    )
    assert done.returncode == 0, done.stdout
    first, second = json.loads((workshop / "raw.json").read_text("utf-8"))
    assert first["equations"] == second["equations"] == ["1.1"]
    assert 3.6e-9 < first["difference"] < 3.8e-9
    assert second["difference"] is None


@pytest.mark.parametrize(
    "difference",
    [
        -0.25,
        np.array([[0.0, -0.25], [0.1, 0.2]]),
        torch.tensor([0.1, -0.25], requires_grad=True),
        torch.tensor(-0.25, dtype=torch.bfloat16),
        [0.1, -0.25],
    ],
)
def test_the_largest_size_is_measured(difference, measured) -> None:
    assert measured(difference, 0.25) == 0.25
    with pytest.raises(AssertionError, match=r"0\.25, above the bound 0\.2\n"):
        measured(difference, 0.2)


@pytest.mark.parametrize("nothing", [np.nan, torch.tensor([0.0, torch.nan])])
def test_nan_is_no_small_difference(nothing, measured) -> None:
    with pytest.raises(AssertionError, match="difference is nan"):
        measured(nothing, 1.0)


def test_an_empty_comparison_proves_nothing(measured) -> None:
    with pytest.raises(ValueError, match="nothing was compared"):
        measured(torch.zeros(0), 1.0)
