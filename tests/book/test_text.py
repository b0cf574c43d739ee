"""`tools/nb.py --text` takes over what was written, never what was computed."""

from pathlib import Path

import jupytext
import nb
import nbformat
import pytest

PAGE = "# A page\n\nold text\n\n```{code-cell} ipython3\nprint(6 * 7)\n```\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A page that was executed, as far as its output says."""
    path = tmp_path / "00_page.md"
    path.write_text(PAGE, "utf-8")
    notebook = nb.read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    notebook.cells[-1].outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="42\n")
    ]
    target = path.with_suffix(".ipynb")
    target.write_text(jupytext.writes(notebook, fmt="ipynb"), "utf-8")
    return path


def test_text_comes_over_and_outputs_stay(source: Path) -> None:
    source.write_text(PAGE.replace("old", "new"), "utf-8")
    assert nb.stale(source)
    assert nb.retell(source) is None
    stored = nbformat.read(source.with_suffix(".ipynb"), 4)
    assert any("new text" in cell.source for cell in stored.cells)
    assert stored.cells[-1].outputs[0]["text"] == "42\n"
    assert nb.stale(source) is None


def test_other_code_is_refused(source: Path) -> None:
    source.write_text(PAGE.replace("6 * 7", "6 * 8"), "utf-8")
    before = source.with_suffix(".ipynb").read_bytes()
    assert nb.retell(source) == "has other code than its .ipynb"
    assert source.with_suffix(".ipynb").read_bytes() == before
