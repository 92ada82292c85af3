"""Looking at what the compiler sees and does, for people."""

from slimgraph.debug.print import Inspection, inspect
from slimgraph.debug.report import report

__all__ = ["Inspection", "inspect", "report"]
