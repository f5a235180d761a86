"""Is what moediag captures right on this machine, with these engines? Tiny or cut checkpoints, every property measured.

Beside the engines' own room, above it: it calls what a capture calls, on checkpoints that it makes, and holds what
came back against what must be so.
"""
