"""Run every test, and close with the counts: what `make test` does."""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from nb import environment  # noqa: E402 - it lies beside, not on the path

# the stored outputs are those of the small work, whatever this machine could do
SMALL = {"BERTNB_SIZE": "tiny", "HF_HUB_OFFLINE": "1"}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=loadfile"]


def pytest(name: str, *arguments: str) -> Counter[str]:
    """Run pytest once, and return how many tests passed, failed, skipped."""
    report = ROOT / "_build" / "tests" / f"{name}.xml"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [*PYTEST, f"--junitxml={report}", *arguments],
        cwd=ROOT,
        env={**environment(), **SMALL},
    )
    counts: Counter[str] = Counter()
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            number = {
                key: int(suite.get(key, 0)) for key in ("tests", "skipped")
            }
            bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            counts["failed"] += bad
            counts["skipped"] += number["skipped"]
            counts["passed"] += number["tests"] - number["skipped"] - bad
    if done.returncode and not counts["failed"]:
        counts["failed"] += 1  # it broke before it could test
    return counts


def main() -> int:
    """Run the tests and the notebooks; return the exit status."""
    started = time.perf_counter()
    print("== 1/2 Tests of the package and of the book", flush=True)
    counts = pytest("tests", "tests")
    print("== 2/2 Do the notebooks' outputs still come out?", flush=True)
    counts += pytest(
        "notebooks",
        "--nbval-lax",
        "--nbval-cell-timeout=120",
        "--nbval-sanitize-with=tests/book/nbval.cfg",
        *(str(p) for p in sorted(ROOT.glob("notebooks/[0-9]*.ipynb"))),
    )
    minutes = (time.perf_counter() - started) / 60
    print(f"== All tests took {minutes:.1f} minutes")
    line = f"{counts['passed']} passed, {counts['failed']} failed"
    print(f"{line}, {counts['skipped']} skipped")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
