"""Prints a summary of the tests of transformers that were skipped or adapted."""

import sys
from collections import defaultdict

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the reasons for skipped tests, and the adapted tests."""
    tester = sys.modules.get("tests.conformance.check_model")
    if tester is None:
        return
    reasons: dict[str, set[str]] = defaultdict(set)
    for report in terminalreporter.stats.get("skipped", []):
        reasons[report.longrepr[2].removeprefix("Skipped: ")].add(report.nodeid.split("::")[-1].split(" ")[0])
    terminalreporter.section("skipped, with the reasons of the tests")
    for reason, names in sorted(reasons.items()):
        terminalreporter.line(f"{reason}: {', '.join(sorted(names))}")
    terminalreporter.section("adapted")
    for name, reason in tester.ADAPTED.items():
        terminalreporter.line(f"{name}: {reason}")
