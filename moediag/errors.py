"""One small tree of errors; every message is one line: expected, found, where, what to do next.

Invariant: the command line prints ``str(error)`` and exits with 1, so a message never holds a line
break. Leaves also inherit the stdlib type, so library users may catch either.
"""

from __future__ import annotations


class MoediagError(Exception):
    """Base of everything moediag raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the one line, as on the command line."""
        return [f"{type(self).__name__}: {self}"]


class PromptsError(MoediagError, ValueError):
    """A prompts file cannot be used; names the file and the line."""


class CheckpointError(MoediagError, ValueError):
    """A checkpoint lacks something an engine needs, or is of a kind moediag cannot capture."""


class RunError(MoediagError, ValueError):
    """A run directory cannot be used as requested."""


class RunConflictError(RunError):
    """The run directory holds another configuration; nothing was changed."""


class CorruptRunError(RunError):
    """A file of the run directory is not what was written (checksum, format, counts)."""


class SchemaVersionError(RunError):
    """The run was written by another schema version."""


class IncompleteRunError(RunError):
    """An arm or shard that is needed has not been captured."""


class AlignmentError(RunError):
    """Two captures are not of the same tokens."""


class CaptureError(MoediagError, RuntimeError):
    """An engine gave rows that are not complete or not consistent; nothing was stored."""


class EngineError(MoediagError, RuntimeError):
    """An engine refused to load or failed while running."""


class EngineDiedError(EngineError):
    """An engine process ended without a word: killed, out of memory, or by its native code."""


class DependencyError(MoediagError, ImportError):
    """A package is missing or has a version moediag does not support."""


class DiskFullError(MoediagError, OSError):
    """A write failed for want of space; what had been committed before is intact."""


class DumpError(MoediagError, ValueError):
    """A dump that moediag did not make cannot be read; names the file, the sequence and the column."""


class FrameError(MoediagError, ValueError):
    """A table does not match its declaration."""


class ConditionError(MoediagError, ValueError):
    """A condition of a gate cannot be read; ``text`` is the condition, ``at`` the index of what is wrong in it."""

    def __init__(self, message: str, text: str, at: int) -> None:
        super().__init__(message)
        self.text, self.at = text, at
