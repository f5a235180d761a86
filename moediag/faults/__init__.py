"""Faults planted in what an engine loads or does, or in what was recorded, to prove that a diagnosis finds them."""

from moediag.faults.catalogue import FAULTS, FUNCTION, RECORD, ROUNDING, Fault
from moediag.faults.planting import fill_planted_arm, planted_checkpoint, spoil_arm

__all__ = ["FAULTS", "FUNCTION", "RECORD", "ROUNDING", "Fault", "fill_planted_arm", "planted_checkpoint", "spoil_arm"]
