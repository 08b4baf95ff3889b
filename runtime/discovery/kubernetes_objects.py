"""What discovery's objects in Kubernetes say; whatever else an object holds is broken."""

from __future__ import annotations

from base64 import b64decode
from binascii import Error as Base64Error
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from runtime.discovery.base import ValueRefused, check_key

DISCOVERY_LABEL: Final = "kvbm.io/discovery"
LEASE_LABEL: Final = "kvbm.io/lease"
KEY_ANNOTATION: Final = "kvbm.io/key"
VALUE: Final = "value"
VERSION: Final = "v1"


class ObjectBroken(Exception):
    """It has our label, and is not what we write."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    value: bytes
    lease: str


@dataclass(frozen=True, slots=True)
class LeaseMark:
    renewed: datetime
    ttl_s: float
    version: str


def decode_entry(item: dict[str, Any]) -> Entry:
    try:
        key = item["metadata"]["annotations"][KEY_ANNOTATION]
        lease = item["metadata"]["labels"][LEASE_LABEL]
        check_key(key)
        return Entry(key, b64decode(item["binaryData"][VALUE], validate=True), lease)
    except (KeyError, TypeError, ValueRefused, Base64Error) as error:
        raise ObjectBroken(str(error)) from error


def decode_lease(item: dict[str, Any]) -> LeaseMark:
    try:
        renewed = datetime.fromisoformat(item["spec"]["renewTime"])
        ttl_s = float(item["spec"]["leaseDurationSeconds"])
        version = str(item["metadata"]["resourceVersion"])
    except (KeyError, TypeError, ValueError) as error:
        raise ObjectBroken(str(error)) from error
    if renewed.tzinfo is None:
        renewed = renewed.replace(tzinfo=UTC)
    return LeaseMark(renewed, ttl_s, version)
