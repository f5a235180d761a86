"""Reports: a summary and its frames in, one page of markdown out; every number with its n and interval."""

from moediag.report.markdown import comparison_report, run_report
from moediag.report.pairs import MAIN_PAIR, REPLAY_PAIR

__all__ = ["MAIN_PAIR", "REPLAY_PAIR", "comparison_report", "run_report"]
