"""Models' tokenizers and chat templates, read from their folders in the background.

Until a model's are read, and for models whose folder is not there, requests are routed by load.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import structlog

from frontend.hub import HubError, folder_of
from frontend.prompt import PromptMaker
from frontend.template import TemplateError
from frontend.tokenizer import TokenizerError

LOOK_EVERY_S: Final = 1.0
AGAIN_S: Final = 60.0
"""Disks and hubs come back: what could not be read is tried again."""

_log = structlog.get_logger("kvbm.frontend")


class Texts:
    """`paths` by model, as the settings name them; they go before what engines say."""

    def __init__(
        self, paths: Mapping[str, Path], cache_bytes: int, *, again_s: float = AGAIN_S
    ) -> None:
        self._named = {model: str(path) for model, path in paths.items()}
        self._cache_bytes = cache_bytes
        self._again_s = again_s
        self._read: dict[str, PromptMaker] = {}
        self._next: dict[tuple[str, str], float] = {}  # when what is said of a model may be tried
        self._told: set[tuple[str, str]] = set()  # models, and why theirs cannot be read

    def get(self, model: str) -> PromptMaker | None:
        return self._read.get(model)

    async def read_named(self) -> None:
        """Those of the settings."""
        for model, said in self._named.items():
            await self._try(model, said)

    async def watch(self, engines_say: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Read what engines say, model and path, as they come; until cancelled."""
        while True:
            await self.read_named()
            for model, said in engines_say():
                if model not in self._named and said:
                    await self._try(model, said)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _try(self, model: str, said: str) -> None:
        if time.monotonic() < self._next.get((model, said), -math.inf):
            return
        try:
            made = await asyncio.to_thread(self._made, said)
        except (HubError, TokenizerError, TemplateError) as error:
            self._next[model, said] = time.monotonic() + self._again_s
            if (told := (model, str(error))) not in self._told:
                self._told.add(told)
                meant = "routed by load; set model_paths, or wait"
                _log.error("no_tokenizer", model=model, why=str(error), meant=meant)
            return
        self._next[model, said] = math.inf
        self._read[model] = made
        _log.info("tokenizer", model=model, path=said, remembers=made.tokenizer.cuts)

    def _made(self, said: str) -> PromptMaker:
        """Of a folder, or of a model at a hub. Raises HubError, TokenizerError or TemplateError."""
        folder = Path(said)
        if not folder.is_absolute() and not folder.is_dir():
            folder = folder_of(said)
        return PromptMaker.load(folder, self._cache_bytes)
