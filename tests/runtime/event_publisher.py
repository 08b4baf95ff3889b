"""A program that publishes on ZMQ and says where through discovery, to be killed.

python -m tests.runtime.event_publisher DISCOVERY_JSON EVENTS_JSON NAME
"""

from __future__ import annotations

import asyncio
import os
import sys

from runtime.discovery import DiscoverySettings, create_discovery
from runtime.event_peers import EventPeers
from runtime.events import EventPlaneSettings
from runtime.events.zmq import ZmqPlane


async def main(discovery_json: str, events_json: str, name: str) -> None:
    settings = EventPlaneSettings.model_validate_json(events_json)
    plane = ZmqPlane(settings, name)
    await plane.start()
    discovery = create_discovery(DiscoverySettings.model_validate_json(discovery_json), os.environ)
    await discovery.start()
    await EventPeers(discovery, plane, settings, publishes=True, listens=False).start()
    while True:
        plane.publish("s", name.encode())
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
