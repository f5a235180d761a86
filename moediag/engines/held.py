"""The model that an engine process holds: loaded once for all jobs that want the same, let go before another is."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any


class Held:
    """At most one model at a time: an accelerator has no room for two."""

    def __init__(self) -> None:
        self._wanted: Any = None
        self._model: Any = None
        self._let_go: Callable[[Any], None] | None = None

    def get(self, wanted: Any, load: Callable[[], Any], let_go: Callable[[Any], None]) -> Any:
        """The model that is wanted; loaded, after the one that is held was let go, unless that is it.

        Args:
            wanted: all that makes two loads the same.
            let_go: ends what the model holds beside memory.
        """
        if self._let_go is not None and wanted == self._wanted:
            return self._model
        self._release()
        self._model = load()
        self._wanted, self._let_go = wanted, let_go
        return self._model

    def _release(self) -> None:
        import torch

        if self._let_go is not None:
            self._let_go(self._model)
        self._model = self._let_go = None
        gc.collect()  # models are full of cycles
        torch.cuda.empty_cache()  # vLLM takes its share of what the device says is free
