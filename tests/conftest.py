"""The proofs of the equations: how a test says what it proves, and how well.

    @pytest.mark.equation("1.5")
    def test_the_function_equals_its_transcription(measured):
        measured(ours - theirs, 1e-12)

The mark says which numbered equations a test proves. `measured` asserts that
no difference is above the bound, and notes the largest. `pytest -m equation
--record-ledger FILE` writes what was noted; tools/ledger.py makes
book/ledger.md of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MARK = "equation(*ids): the numbered equations that the test proves"
RUNNING: list[pytest.Item] = []  # the test that runs now, last
NOTED: dict[str, dict[str, Any]] = {}  # test -> what it proved, how well


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-ledger",
        metavar="FILE",
        help="write which equations were proven, with the differences measured",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)


def equations(item: pytest.Item) -> list[str]:
    """Return the equations that a test proves."""
    marks = item.iter_markers("equation")
    return sorted({str(name) for mark in marks for name in mark.args})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if proven := equations(item):
        # a property of the report: it also arrives from another process
        item.user_properties.append(("equations", " ".join(proven)))
    RUNNING.append(item)
    try:
        return (yield)
    finally:
        RUNNING.pop()


def largest(difference: Any) -> float:
    """Return the largest size of a number, an array or a tensor."""
    if hasattr(difference, "detach"):
        difference = difference.detach().cpu().double()
    array = np.abs(np.asarray(difference, dtype=np.float64))
    if array.size == 0:
        raise ValueError("the difference is empty: nothing was compared")
    return float(array.max())


@pytest.fixture(scope="session")  # so that tests with @given can take it
def measured() -> Callable[[Any, float], float]:
    """Return a function that asserts difference <= bound, and notes it."""

    def measure(difference: Any, bound: float) -> float:
        __tracebackhide__ = True
        error = largest(difference)
        item = RUNNING[-1]
        item.user_properties.append(("measured", f"{error!r} {float(bound)!r}"))
        about = " ".join(f"({name})" for name in equations(item))
        assert error <= bound, (  # NaN is not below anything
            f"the difference is {error:.3g}, above the bound {bound:g}"
            f"{': equation ' if about else ''}{about}"
        )
        return error

    return measure


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a proof: here all reports arrive, those of other processes too."""
    if report.when != "call" or not report.passed:
        return
    properties = list(report.user_properties)
    proven = [str(value) for key, value in properties if key == "equations"]
    if not proven:
        return
    test = report.nodeid.split("[")[0]  # one line for all its parameters
    here = NOTED.setdefault(test, {"equations": proven[0].split(), "worst": []})
    for key, value in properties:
        if key == "measured":
            error, bound = map(float, str(value).split())
            here["worst"] = max(here["worst"], [error, bound])


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--record-ledger")
    if path is None or hasattr(session.config, "workerinput"):
        return
    tests = [
        {
            "test": test,
            "equations": note["equations"],
            "difference": note["worst"][0] if note["worst"] else None,
            "bound": note["worst"][1] if note["worst"] else None,
        }
        for test, note in sorted(NOTED.items())
    ]
    assert all(
        t["difference"] is None or math.isfinite(t["difference"]) for t in tests
    )
    Path(path).write_text(json.dumps(tests, indent=1) + "\n", encoding="utf-8")
