"""One self-contained HTML file about one run, or about several side by side."""

from drgr.report._loading import load_run
from drgr.report._page import write_report
from drgr.report._records import RunRecord

__all__ = ["RunRecord", "load_run", "write_report"]
