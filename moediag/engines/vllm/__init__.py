"""vLLM: samples the responses, or scores given ones; observed by taps inside its workers."""
