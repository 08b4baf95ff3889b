"""The lower tiers that the settings ask for, each with how it wants its writes."""

from __future__ import annotations

from pydantic import SecretStr

from kvbm.daemon.settings import DaemonSettings, OffloadSettings, S3Settings, SsdSettings
from kvbm.offload import LaneSettings
from storage_tiers.base import Tier, TierListener

OBJECTS_IN_FLIGHT = 4


def make_lower_tiers(
    settings: DaemonSettings, listener: TierListener
) -> list[tuple[Tier, LaneSettings]]:
    """Fastest first, not opened."""
    lower: list[tuple[Tier, LaneSettings]] = []
    if settings.ssd is not None:
        lower.append(_ssd(settings.ssd, settings.offload, listener))
    if settings.s3 is not None:
        lower.append(_s3(settings.s3, settings.offload, listener, settings.node))
    return lower


def _ssd(
    settings: SsdSettings, offload: OffloadSettings, listener: TierListener
) -> tuple[Tier, LaneSettings]:
    from storage_tiers.ssd import STORES_AT_ONCE, SsdTier

    tier = SsdTier(
        settings.path,
        settings.capacity,
        listener,
        recover=settings.recover,
        mover=settings.mover,
    )
    lane = LaneSettings(
        batch_chunks=offload.batch_chunks,
        batch_bytes=offload.batch_bytes,
        queue_chunks=offload.queue_chunks,
        writers=STORES_AT_ONCE,
    )
    return tier, lane


def _s3(
    settings: S3Settings, offload: OffloadSettings, listener: TierListener, node: str
) -> tuple[Tier, LaneSettings]:
    from storage_tiers.bucket import S3Bucket
    from storage_tiers.s3 import S3Tier

    bucket = S3Bucket(
        settings.bucket,
        endpoint_url=settings.endpoint_url,
        region=settings.region,
        access_key_id=_revealed(settings.access_key_id),
        secret_access_key=_revealed(settings.secret_access_key),
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
    )
    lane = LaneSettings(
        # A batch is cut into objects: what fills one counts, not how many chunks that takes.
        batch_chunks=offload.queue_chunks,
        batch_bytes=max(offload.batch_bytes, OBJECTS_IN_FLIGHT * settings.object_bytes),
        queue_chunks=offload.queue_chunks,
        enough_bytes=settings.object_bytes,
        linger_s=settings.linger,
    )
    return tier, lane


def _revealed(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
