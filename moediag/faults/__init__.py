"""Faults planted in what an engine loads or does, to prove that a diagnosis finds them."""

from moediag.faults.catalogue import FAULTS, FUNCTION, ROUNDING, Fault, planted_checkpoint
from moediag.faults.planting import fill_planted_arm

__all__ = ["FAULTS", "FUNCTION", "ROUNDING", "Fault", "fill_planted_arm", "planted_checkpoint"]
