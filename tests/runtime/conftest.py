"""What pytest's summary says about engines."""

from __future__ import annotations

import re
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the engines that the conformance suite ran; the skipped ones are in the summary with their reasons."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    found = [re.search(r"test_engine_conformance\.py::test_it_computes\[(.+)\]", report.nodeid) for report in reports]
    ran = [match[1] for match in found if match]
    if ran:
        terminalreporter.write_line(f"engine conformance ran with: {', '.join(ran)}")
