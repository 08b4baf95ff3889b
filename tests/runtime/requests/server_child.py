"""A request server in a process of its own, to be killed or stopped; prints its address.

python -m tests.runtime.requests.server_child SETTINGS_AS_JSON
"""

from __future__ import annotations

import asyncio
import sys

from runtime.requests import RequestPlaneSettings, create_request_plane
from tests.runtime.requests.handlers import Handlers


async def main() -> None:
    settings = RequestPlaneSettings.model_validate_json(sys.argv[1])
    server = create_request_plane(settings, "child").server()
    Handlers().serve(server)
    sys.stdout.write(await server.start() + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
