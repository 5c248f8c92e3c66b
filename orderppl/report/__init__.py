"""One HTML file of a run: its tables and figures, and decoding replayed, two policies side by side."""

from orderppl.report.page import write_report
from orderppl.report.replay import record_replay

__all__ = ["record_replay", "write_report"]
