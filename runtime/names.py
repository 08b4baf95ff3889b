"""Names of what serves: namespace, component, endpoint, instance; and their keys in discovery.

A reference reads `production.Processor.chat/completions`, with or without `dyn://` before it; the
same name prints as the same text. Key segments are percent-encoded, so no name leaves its level:
everything of one namespace, component or endpoint lies below one prefix, and nothing else does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import quote, unquote

SCHEME: Final = "dyn://"
INSTANCES: Final = "v1/instances/"
EVENT_CHANNELS: Final = "v1/event_channels/"
INSTANCE_ID_MAX: Final = (1 << 64) - 1
PART_CHARACTERS_MAX: Final = 63

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ENDPOINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)*")
_ID = re.compile(r"[1-9a-f][0-9a-f]{0,15}")
_ID_WRITTEN = re.compile(r"[0-9]{1,20}|0[xX][0-9a-fA-F]{1,16}")
_PART_ALLOWED: Final = (
    f"allowed: 1 to {PART_CHARACTERS_MAX} letters, digits, '_' and '-', a letter or digit first"
)
_ENDPOINT_ALLOWED: Final = f"{_PART_ALLOWED}, in levels divided by '/', as in chat/completions"
_ID_ALLOWED: Final = "allowed: a whole number from 1 to 2^64-1"


class NameRefused(ValueError):
    """A name that cannot be one; says which part of it, and what is allowed there."""

    def __init__(self, part: str, value: object, allowed: str) -> None:
        self.part = part
        self.value = value
        super().__init__(f"{part} {value!r} is not accepted; {allowed}")


@dataclass(frozen=True, slots=True, order=True)
class EndpointName:
    namespace: str
    component: str
    endpoint: str

    def __post_init__(self) -> None:
        _check("namespace", self.namespace, _PART, _PART_ALLOWED)
        _check("component", self.component, _PART, _PART_ALLOWED)
        _check("endpoint", self.endpoint, _ENDPOINT, _ENDPOINT_ALLOWED)

    @classmethod
    def parse(cls, reference: str) -> Self:
        """Of `namespace.component.endpoint`; raises NameRefused."""
        parts = reference.removeprefix(SCHEME).split(".")
        if len(parts) != 3:
            allowed = "allowed: namespace.component.endpoint, with or without dyn:// before it"
            raise NameRefused("endpoint reference", reference, allowed)
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"

    @property
    def url(self) -> str:
        return f"{SCHEME}{self}"

    @property
    def instances_prefix(self) -> str:
        return f"{INSTANCES}{self._path}"

    @property
    def _path(self) -> str:
        return "".join(
            f"{encode_segment(part)}/" for part in (self.namespace, self.component, self.endpoint)
        )


@dataclass(frozen=True, slots=True, order=True)
class InstanceName:
    endpoint: EndpointName
    id: int

    def __post_init__(self) -> None:
        if not 1 <= self.id <= INSTANCE_ID_MAX:
            raise NameRefused("instance id", self.id, _ID_ALLOWED)

    @classmethod
    def of_key(cls, key: str) -> Self:
        """Of an instance's key; raises NameRefused for any other key."""
        parts = key.removeprefix(INSTANCES).split("/")
        if not key.startswith(INSTANCES) or len(parts) != 4:
            allowed = f"allowed: {INSTANCES}NAMESPACE/COMPONENT/ENDPOINT/ID"
            raise NameRefused("instance key", key, allowed)
        if _ID.fullmatch(parts[3]) is None:
            raise NameRefused("instance id", parts[3], "allowed: 1 to 16 hexadecimal digits")
        name = cls(EndpointName(*(unquote(part) for part in parts[:3])), int(parts[3], 16))
        if name.key != key:
            raise NameRefused("instance key", key, f"it must be spelled {name.key}")
        return name

    def __str__(self) -> str:
        return f"{self.endpoint}-{self.id:x}"

    @property
    def key(self) -> str:
        return f"{self.endpoint.instances_prefix}{self.id:x}"


def parse_instance_id(value: object) -> int:
    """As people write it: in decimal, or in hexadecimal behind 0x. Raises NameRefused."""
    text = str(value)
    number = 0
    if _ID_WRITTEN.fullmatch(text):
        number = int(text, 16 if text[:2] in {"0x", "0X"} else 10)
    if not 1 <= number <= INSTANCE_ID_MAX:
        raise NameRefused(
            "instance id", text, f"{_ID_ALLOWED}, in decimal or in hexadecimal as 0x1f"
        )
    return number


def component_prefix(namespace: str, component: str | None = None) -> str:
    """Where all instances of a component, or else of a namespace, are."""
    _check("namespace", namespace, _PART, _PART_ALLOWED)
    if component is None:
        return f"{INSTANCES}{encode_segment(namespace)}/"
    _check("component", component, _PART, _PART_ALLOWED)
    return f"{INSTANCES}{encode_segment(namespace)}/{encode_segment(component)}/"


def encode_segment(text: str) -> str:
    """One level of a key, whatever `text` holds: no '/' is left in it, nor is it '.' or '..'."""
    encoded = quote(text, safe="")
    return encoded.replace(".", "%2E") if encoded in {".", ".."} else encoded


def _check(part: str, value: str, pattern: re.Pattern[str], allowed: str) -> None:
    if pattern.fullmatch(value) is None or len(value) > PART_CHARACTERS_MAX:
        raise NameRefused(part, value, allowed)
