"""transformers: scores tokens teacher-forced, or decodes them with its own generate; observed by hooks."""
