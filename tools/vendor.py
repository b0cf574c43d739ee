"""Fetch MathJax for the book from npm, so that its pages need no network.

The exact versions below are checked against their hashes. What was fetched
once stays in book/_extra/, and a later run needs no npm. Without npm nothing
is fetched, and the pages load MathJax from its usual CDN instead.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from manifest import ROOT

TARGET = ROOT / "book" / "_extra" / "_static" / "mathjax"


class Package(NamedTuple):
    """What to take from one npm package, and where it goes below TARGET."""

    name: str
    version: str
    sha512: str
    patterns: tuple[str, ...]
    folder: str


PACKAGES = [
    Package(
        "mathjax",
        "4.1.3",
        "BN/8Pkgn7G1pIDYJqd9md+JHsE/jydSYbyOZnSdSA0WziuVO8mRxdYiWFumkVVly/8U+hm9DpIIoWuvySverzw==",
        (
            "tex-chtml.js",
            "input/tex/extensions/*",
            "ui/*",
            "sre/speech-worker.js",
            "sre/mathmaps/base.json",
            "sre/mathmaps/en.json",
            "sre/mathmaps/nemeth.json",
            "LICENSE",
        ),
        ".",
    ),
    Package(
        "@mathjax/mathjax-newcm-font",
        "4.1.3",
        "gzAB3dFHilHX1l5x2xUqRL+1jDQt3Fyza1DkEMVXWC4E8SvsGdlgEza47HYi2WhVcgfkvf4zgUGzuhbq3Pjlew==",
        ("chtml/woff2/*", "chtml/dynamic/*", "LICENSE"),
        "fonts/mathjax-newcm-font",
    ),
]


def fetch(package: Package, npm: str, into: Path) -> None:
    """Unpack the wanted files of one package; fail on another hash."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", "--silent", f"{package.name}@{package.version}"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(folder).glob("*.tgz")
        digest = hashlib.sha512(archive.read_bytes()).digest()
        found = base64.b64encode(digest).decode()
        if found != package.sha512:
            raise SystemExit(
                f"vendor: {package.name} {package.version} has the sha512 "
                f"{found}; expected {package.sha512}"
            )
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix("package/")
                wanted = (fnmatch.fnmatch(name, p) for p in package.patterns)
                content = tar.extractfile(member) if any(wanted) else None
                if content:
                    path = into / package.folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())


def main() -> None:
    """Fetch what is missing, and say where MathJax will come from."""
    versions = "\n".join(f"{p.name} {p.version}\n" for p in PACKAGES)
    stamp = TARGET / "VERSIONS"
    if stamp.exists() and stamp.read_text() == versions:
        print(f"MathJax: {stamp.parent.relative_to(ROOT)} (fetched before)")
        return
    npm = shutil.which("npm")
    if npm is None:
        shutil.rmtree(TARGET, ignore_errors=True)
        print(
            "MathJax: npm is not installed, so the pages will load it from its "
            "CDN and need the network for mathematics"
        )
        return
    unfinished = TARGET.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for package in PACKAGES:
            fetch(package, npm, unfinished)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(TARGET, ignore_errors=True)
        print(
            f"MathJax: npm could not fetch it ({error}), so the pages will "
            "load it from its CDN and need the network for mathematics"
        )
        return
    (unfinished / "VERSIONS").write_text(versions)
    shutil.rmtree(TARGET, ignore_errors=True)
    unfinished.replace(TARGET)
    print(f"MathJax: fetched from npm into {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
