"""Print constraints.txt: the versions of this environment, exactly.

.venv/bin/python tools/freeze.py > constraints.txt

Only what `bertnb[test]` needs is listed. A release that does not run on the
oldest Python of pyproject.toml binds only the newer ones.
"""

from __future__ import annotations

import importlib.metadata as installed
import re
from collections.abc import Iterator

from manifest import project
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

HEAD = """\
# The book's own environment: made by tools/freeze.py, used by `make`.
# PyTorch's CUDA libraries are left to torch, which names them exactly itself.
setuptools-scm<9 # only to build seqeval"""
CUDA = re.compile(r"nvidia|cuda|triton")


def needed(name: str, extras: set[str], seen: set[str]) -> Iterator[str]:
    """Yield the packages that one package needs, whatever the platform."""
    for line in installed.requires(name) or []:
        requirement = Requirement(line)
        other = canonicalize_name(requirement.name)
        marker = requirement.marker
        if marker and not any(
            marker.evaluate({"extra": extra}) for extra in {"", *extras}
        ):
            continue
        asked = {other, *(f"{other}[{e}]" for e in requirement.extras)}
        if asked <= seen or CUDA.match(other):
            continue
        seen |= asked
        yield other
        yield from needed(other, requirement.extras, seen)


def constraint(name: str, oldest: str) -> str:
    """Return the line that binds a package to its installed version."""
    version = installed.version(name).split("+")[0]  # not "2.13.0+cpu"
    wanted = str(installed.metadata(name).json.get("requires_python", ""))
    if SpecifierSet(wanted).contains(oldest):
        return f"{name}=={version}"
    minor = re.search(r">=?\s*(\d+\.\d+)", wanted)
    if not minor:
        raise SystemExit(f"freeze: {name} wants Python {wanted}")
    return f"{name}=={version}; python_version >= '{minor[1]}'"


def main() -> None:
    """Print the constraints."""
    floor = re.search(r"\d+\.\d+", project()["requires-python"])
    assert floor
    # the last patch release: some packages ask for a few patches more
    oldest = f"{floor[0]}.99"
    names = sorted(set(needed("bertnb", {"test"}, {"bertnb"})))
    print(HEAD)
    for name in names:
        if name != "bertnb":
            print(constraint(name, oldest))


if __name__ == "__main__":
    main()
