"""Tokenizers are found where engines say that their models are, and looked for again if not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from frontend import texts as module
from frontend.texts import Texts
from tests.models import tiny_llama

MODEL = "a-model"
WAIT_S = 60.0


@asynccontextmanager
async def watched(texts: Texts, *said: str) -> AsyncIterator[None]:
    """With engines that say so."""
    watching = asyncio.create_task(texts.watch(lambda: {(MODEL, one) for one in said}))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def known(texts: Texts) -> list[int]:
    async with asyncio.timeout(WAIT_S):
        while (found := texts.get(MODEL)) is None:
            await asyncio.sleep(0.01)
    return found.tokenizer.encode("text").tolist()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)


async def test_a_folder_that_comes_later_is_complained_of_once_and_then_read(
    tmp_path: Path,
) -> None:
    texts = Texts({}, 1 << 20, again_s=0.05)
    with capture_logs() as logs:
        async with watched(texts, str(tmp_path / "model")):
            while not logs:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert [(line["event"], line["model"]) for line in logs] == [("no_tokenizer", MODEL)]
            assert str(tmp_path / "model") in logs[0]["why"]
            assert texts.get(MODEL) is None
            tiny_llama(tmp_path / "made").rename(tmp_path / "model")
            assert len(await known(texts)) == 4
    assert [line["event"] for line in logs] == ["no_tokenizer", "tokenizer"]


async def test_a_name_is_one_at_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the hub is away; what the engine has fetched is there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    texts = Texts({}, 1 << 20, again_s=0.05)
    with capture_logs() as logs:
        async with watched(texts, "people/model"):
            while not logs:
                await asyncio.sleep(0.01)
            assert "'people/model' is no folder here" in logs[0]["why"]
            cached = tmp_path / "models--people--model"
            tiny_llama(cached / "snapshots" / "abc")
            (cached / "refs").mkdir()
            (cached / "refs" / "made").write_text("abc")
            (cached / "refs" / "made").rename(cached / "refs" / "main")
            assert len(await known(texts)) == 4


async def test_what_the_settings_name_goes_before(tmp_path: Path) -> None:
    texts = Texts({MODEL: tiny_llama(tmp_path / "named")}, 1 << 20)
    with capture_logs() as logs:
        async with watched(texts, str(tmp_path / "said")):
            await known(texts)
            await asyncio.sleep(0.1)
    assert [line["event"] for line in logs] == ["tokenizer"]
