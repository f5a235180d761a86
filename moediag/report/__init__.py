"""Reports: a summary and its frames in, one page of markdown out; every number with its n and interval."""

from moediag.report.markdown import comparison_report, run_report

__all__ = ["comparison_report", "run_report"]
