"""From measurements to causes: what is off, where, and how that is known. No engine is imported."""
