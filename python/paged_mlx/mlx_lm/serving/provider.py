"""Models of ``mlx_lm.server``, put on pages as they are loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm import server

from paged_mlx.mlx_lm import explain

log = logging.getLogger("paged_mlx")


class PagedProvider(server.ModelProvider):
    """Loads models as mlx-lm's provider does, in the thread that generates, and enables them.

    Args:
        cli_args: The server's options.
        enable: Puts a model on pages, and returns its PagedModel.
        enable_draft: The same for a draft.
        store: The server's ``PromptStore``.

    Attributes:
        paged: The model in use on pages; None before there is one.
        failure: Why the model of the command line could not be loaded; else None.
        on_failure: Called then, in the thread that generates.
    """

    def __init__(
        self, cli_args, enable: Callable[[Any], Any], enable_draft: Callable[[Any], Any], store
    ):
        super().__init__(cli_args)
        self._enable, self._enable_draft, self._store = enable, enable_draft, store
        self.paged: Any = None
        self._draft: Any = None
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def load_default(self):
        try:
            super().load_default()
        except Exception as error:
            self.failure = error
            self.on_failure()
            raise SystemExit from error  # ends this thread without a traceback

    def load(self, *arguments, **options):
        found = super().load(*arguments, **options)
        if self.paged is None or self.paged.model is not self.model:
            self._forget()
            self.paged = self._enable(self.model)
            if self.draft_model is not None:
                self._draft = self._enable_draft(self.draft_model)
            self._store.paged = self.paged if self.paged.prefixes is not None else None
            log.info("%s", explain(self.model))
        return found

    def reset(self):
        # MLX aborts if work of a thread that has ended is under way.
        mx.synchronize()
        self._forget()
        if hasattr(super(), "reset"):
            super().reset()

    def _forget(self) -> None:
        self._store.paged = None
        self._store.trim_to(n_sequences=0)  # of the model that goes, whose name may come again
        for paged in (self.paged, self._draft):
            if paged is not None:
                paged.disable()
        self.paged = self._draft = None
