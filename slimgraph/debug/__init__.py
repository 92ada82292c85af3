"""Looking at what the compiler sees and does, for people."""

from slimgraph.debug.bisect import bisect
from slimgraph.debug.diff import Difference, diff
from slimgraph.debug.findings import Bisection
from slimgraph.debug.page import Report, html_report
from slimgraph.debug.print import Inspection, inspect
from slimgraph.debug.report import report
from slimgraph.debug.verify import Verification, verify

__all__ = [
    "Bisection",
    "Difference",
    "Inspection",
    "Report",
    "Verification",
    "bisect",
    "diff",
    "html_report",
    "inspect",
    "report",
    "verify",
]
