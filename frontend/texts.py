"""Models' tokenizers and chat templates, read from their folders in the background.

Until a model's are read, and for models whose folder is not there, requests are routed by load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import structlog

from frontend.prompt import PromptMaker
from frontend.template import TemplateError
from frontend.tokenizer import TokenizerError

LOOK_EVERY_S: Final = 1.0

_log = structlog.get_logger("kvbm.frontend")


class Texts:
    """`paths` by model, as the settings name them; they go before what engines say."""

    def __init__(self, paths: Mapping[str, Path], cache_bytes: int) -> None:
        self._paths = dict(paths)
        self._cache_bytes = cache_bytes
        self._read: dict[str, PromptMaker] = {}
        self._tried: set[tuple[str, Path]] = set()
        self.failed: dict[str, str] = {}  # model -> why its folder cannot be used

    def get(self, model: str) -> PromptMaker | None:
        return self._read.get(model)

    async def read_named(self) -> None:
        """Those of the settings."""
        for model, path in self._paths.items():
            await self._try(model, path)

    async def watch(self, engines_say: Callable[[], Mapping[str, str]]) -> None:
        """Read what engines say, by model, as they come; until cancelled."""
        while True:
            for model, said in engines_say().items():
                if model not in self._paths and said:
                    await self._try(model, Path(said))
            await asyncio.sleep(LOOK_EVERY_S)

    async def _try(self, model: str, path: Path) -> None:
        if (model, path) in self._tried:
            return
        self._tried.add((model, path))
        if model not in self._paths and not (path / "tokenizer.json").is_file():
            return  # on another machine, or at a hub
        try:
            made = await asyncio.to_thread(PromptMaker.load, path, self._cache_bytes)
        except (TokenizerError, TemplateError) as error:
            self.failed[model] = str(error)
            _log.error("no_tokenizer", model=model, why=str(error))
            return
        self.failed.pop(model, None)
        self._read[model] = made
        _log.info("tokenizer", model=model, path=str(path), remembers=made.tokenizer.cuts)
