"""Says at the end what transformers' tests skipped and why, and what of them was adapted."""

import sys
from collections import defaultdict

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each reason with its tests."""
    tester = sys.modules.get("tests.conformance.check_model")
    if tester is None:
        return
    reasons: dict[str, set[str]] = defaultdict(set)
    for report in terminalreporter.stats.get("skipped", []):
        reasons[report.longrepr[2].removeprefix("Skipped: ")].add(report.nodeid.split("::")[-1].split(" ")[0])
    terminalreporter.section("skipped, by the tests' own reasons")
    for reason, names in sorted(reasons.items()):
        terminalreporter.line(f"{reason}: {', '.join(sorted(names))}")
    terminalreporter.section("adapted")
    for name, reason in tester.ADAPTED.items():
        terminalreporter.line(f"{name}: {reason}")
