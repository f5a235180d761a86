"""Hygiene: what is silently wrong with a capture, named after its rule, with counts, places and the base rate.

:func:`check_run` reads a run directory shard by shard; :func:`check_capture` and :func:`check_pair` take plain arrays;
:func:`~moediag.hygiene.foreign.check_file` takes a file that moediag did not make.
"""

from moediag.hygiene.check import Inspection, check_capture, check_pair, check_run, inspect_run
from moediag.hygiene.findings import Finding, Place

__all__ = ["Finding", "Inspection", "Place", "check_capture", "check_pair", "check_run", "inspect_run"]
