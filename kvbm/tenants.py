"""Who shares KV with whom, and how much of each tier they may fill.

A tenant's engines share KV among themselves and with nobody else: the daemon gives them a secret
salt that goes into every key they make, and takes no key from them that lacks the tenant's tag. So
what a client of an engine says about itself decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from storage_tiers.base import KEY_BYTES, TierName

SALT_BYTES: Final = 32


class UnknownTenantError(Exception):
    """No such tenant is configured; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    tag: int  # 1 to 255, the last byte of its keys; 0: there are no tenants
    salt: bytes  # SALT_BYTES, or empty
    quotas: dict[TierName, int] = field(default_factory=dict)  # bytes

    def owns(self, keys: bytes) -> bool:
        """Whether all of these concatenated keys carry its tag."""
        tags = keys[KEY_BYTES - 1 :: KEY_BYTES]
        return tags.count(self.tag) == len(tags)


class Tenants:
    """All that are configured; without any, every engine belongs to the same one."""

    def __init__(self, tenants: Sequence[Tenant] = ()) -> None:
        self._by_name = {tenant.name: tenant for tenant in tenants}

    def named(self, name: str) -> Tenant:
        """Raises UnknownTenantError."""
        if not self._by_name:
            return Tenant("", 0, b"")
        found = self._by_name.get(name)
        if found is None:
            asked = f"tenant {name!r} is not configured" if name else "it names no tenant"
            raise UnknownTenantError(
                f"{asked}: set `tenant` in kv_connector_extra_config to one of the daemon's "
                "`tenants`"
            )
        return found

    def quotas(self, tier: TierName) -> dict[int, int]:
        """Most bytes of a tier, by tag."""
        return {t.tag: t.quotas[tier] for t in self._by_name.values() if tier in t.quotas}
