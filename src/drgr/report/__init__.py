"""One self-contained HTML file about one run, several side by side, or an experiment."""

from drgr.report._experiment import write_experiment_report
from drgr.report._loading import load_run
from drgr.report._page import write_report
from drgr.report._records import RunRecord

__all__ = ["RunRecord", "load_run", "write_experiment_report", "write_report"]
