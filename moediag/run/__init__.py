"""The run directory: files, codec, captures, alignment, validation; no engine is imported here."""
