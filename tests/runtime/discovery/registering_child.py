"""A program that registers one value and stays, to be killed: SETTINGS_JSON KEY."""

from __future__ import annotations

import asyncio
import os
import sys

from runtime.discovery import DiscoverySettings, create_discovery


async def main(settings: str, key: str) -> None:
    discovery = create_discovery(DiscoverySettings.model_validate_json(settings), os.environ)
    await discovery.start()
    await discovery.put(key, str(os.getpid()).encode())
    await asyncio.sleep(120)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
