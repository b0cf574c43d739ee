"""What pyproject.toml says, for the other tools."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"


def project() -> dict[str, Any]:
    """Return the [project] table."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)["project"]
    return table


def repository() -> str:
    """Return the repository's address; it stands nowhere else by hand."""
    address: str = project()["urls"]["Repository"]
    return address


def sources() -> list[Path]:
    """Return the notebooks' sources in the order of the chapters."""
    return sorted(NOTEBOOKS.glob("[0-9]*.md"))
