"""From captured arms to results on disk: frames, summary.json, figures, report.md; no engine needed.

Invariants:
    - everything here is derived: it can be deleted and made again from the arms;
    - summary.json is sealed and holds the digest of every frame, so a report or a comparison is made only from
      what ``analyze`` wrote, and only while the arms are those that it saw.
"""

from moediag.results.analyze import analyze_run
from moediag.results.compare import compare_runs
from moediag.results.load import load_frames, load_summary
from moediag.results.report import report_run

__all__ = ["analyze_run", "compare_runs", "load_frames", "load_summary", "report_run"]
