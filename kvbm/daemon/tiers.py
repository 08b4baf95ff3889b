"""The tiers' parts that the settings ask for: policies, and the lower tiers themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from pydantic import SecretStr

from kvbm.daemon.settings import (
    DaemonSettings,
    Eviction,
    OffloadSettings,
    S3Settings,
    SsdSettings,
)
from kvbm.offload import LaneSettings
from kvbm.tenants import Tenant, Tenants
from storage_tiers.admission import Admission, AdmitSeenTwice, AdmitValue
from storage_tiers.base import Tier, TierListener, TierName
from storage_tiers.budget import Budget
from storage_tiers.eviction import Quotas
from storage_tiers.policy import EvictionPolicy, LruPolicy, S3FifoPolicy
from storage_tiers.value import ValuePolicy

OBJECTS_IN_FLIGHT = 4
OFFERS_REMEMBERED = 1 << 20
"""By seen-twice admission, 8 bytes each."""

_POLICIES: dict[Eviction, Callable[[], EvictionPolicy]] = {
    "lru": LruPolicy,
    "s3-fifo": S3FifoPolicy,
    "value": ValuePolicy,
}


def make_policy(name: Eviction) -> EvictionPolicy:
    return _POLICIES[name]()


def make_admission(name: str, policy: EvictionPolicy | None = None) -> Admission | None:
    """None: everything is stored. `policy` is the one that values chunks, for value admission."""
    if name == "value":
        assert isinstance(policy, ValuePolicy), "the settings see to it"
        return AdmitValue(policy)
    return AdmitSeenTwice(OFFERS_REMEMBERED) if name == "seen-twice" else None


def make_tenants(settings: DaemonSettings) -> Tenants:
    tenants: list[Tenant] = []
    for name, given in settings.tenants.items():
        quotas = {
            TierName.DRAM: given.dram_quota,
            TierName.SSD: given.ssd_quota,
            TierName.S3: given.s3_quota,
        }
        salt = hashlib.sha256(given.salt.get_secret_value().encode()).digest()
        bounds = {tier: quota for tier, quota in quotas.items() if quota is not None}
        tenants.append(Tenant(name, given.tag, salt, bounds))
    return Tenants(tenants)


def make_lower_tiers(
    settings: DaemonSettings,
    listener: TierListener,
    tenants: Tenants,
    peers: Tier | None = None,
) -> list[tuple[Tier, LaneSettings | None]]:
    """In the order in which they are asked, not opened: what is on this machine comes first."""
    lower: list[tuple[Tier, LaneSettings | None]] = []
    if settings.ssd is not None:
        quotas = tenants.quotas(TierName.SSD)
        lower.append(_ssd(settings.ssd, settings.offload, listener, quotas))
    if peers is not None:
        lower.append((peers, None))
    if settings.s3 is not None:
        quotas = tenants.quotas(TierName.S3)
        lower.append(_s3(settings.s3, settings.offload, listener, settings.node, quotas))
    return lower


def _ssd(
    settings: SsdSettings, offload: OffloadSettings, listener: TierListener, quotas: Quotas
) -> tuple[Tier, LaneSettings]:
    from storage_tiers.ssd import STORES_AT_ONCE, SsdTier

    policy = make_policy(settings.eviction)
    tier = SsdTier(
        settings.path,
        settings.capacity,
        listener,
        recover=settings.recover,
        mover=settings.mover,
        policy=policy,
        admission=make_admission(settings.admission, policy),
        write_budget=Budget(settings.write_budget),
        quotas=quotas,
    )
    lane = LaneSettings(
        batch_chunks=offload.batch_chunks,
        batch_bytes=offload.batch_bytes,
        queue_chunks=offload.queue_chunks,
        writers=STORES_AT_ONCE,
    )
    return tier, lane


def _s3(
    settings: S3Settings,
    offload: OffloadSettings,
    listener: TierListener,
    node: str,
    quotas: Quotas,
) -> tuple[Tier, LaneSettings]:
    from storage_tiers.bucket import S3Bucket
    from storage_tiers.s3 import S3Tier

    bucket = S3Bucket(
        settings.bucket,
        endpoint_url=settings.endpoint_url,
        region=settings.region,
        access_key_id=_revealed(settings.access_key_id),
        secret_access_key=_revealed(settings.secret_access_key),
        timeout_s=settings.timeout * 2 / 3,  # what hangs leaves time for another attempt
    )
    tier = S3Tier(
        bucket,
        settings.capacity,
        listener,
        node=node,
        prefix=settings.prefix,
        object_bytes=settings.object_bytes,
        max_age_s=settings.max_age,
        refresh_s=settings.refresh,
        note_reads_per_s=settings.note_reads_per_s,
        timeout_s=settings.timeout,
        admission=make_admission(settings.admission),
        put_budget=Budget(settings.put_budget),
        quotas=quotas,
    )
    lane = LaneSettings(
        # A batch is cut into objects: what fills one counts, not how many chunks that takes.
        batch_chunks=offload.queue_chunks,
        batch_bytes=max(offload.batch_bytes, OBJECTS_IN_FLIGHT * settings.object_bytes),
        queue_chunks=offload.queue_chunks,
        enough_bytes=settings.object_bytes,
        linger_s=settings.linger,
        is_shared=True,
    )
    return tier, lane


def _revealed(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
