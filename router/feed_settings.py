"""How a router follows the streams of its nodes, as part of its settings."""

from __future__ import annotations

from pydantic import Field

from runtime.settings import Section
from runtime.units import Duration, Size


class FeedSettings(Section):
    messages: int = Field(
        default=65536,
        ge=1,
        description="Events that may wait to be applied; of more the oldest are dropped, and asked "
        "for again.",
    )
    ahead_bytes: Size = Field(
        default=16 << 20,
        ge=1,
        description="What may be kept of one node's events while those before them are asked for; "
        "of more the oldest are dropped, and asked for again.",
    )
    reorder: Duration = Field(
        default=0.02,
        ge=0,
        description="How long a missing event may still come by itself before it is asked for.",
    )
    ask_timeout: Duration = Field(
        default=30.0, gt=0, description="Deadline of one question to a node, answer included."
    )
    asks_at_once: int = Field(
        default=8, ge=1, description="Nodes that are asked at a time; others wait for their turn."
    )
    tries: int = Field(
        default=8, ge=1, description="A node that has failed to answer this often is stale."
    )
    backoff: Duration = Field(
        default=0.2, gt=0, description="Pause after the first failed try; each later one doubles it"
    )
    backoff_max: Duration = Field(
        default=5.0, gt=0, description="The longest pause between tries, of stale nodes too."
    )
    probe_interval: Duration = Field(
        default=5.0,
        gt=0,
        description="A node that was silent for this long is asked whether something was lost.",
    )
    stale_for: Duration = Field(
        default=60.0, ge=0, description="How long the blocks of a stale node are still counted on."
    )
    gone_for: Duration = Field(
        default=5.0,
        ge=0,
        description="How long the blocks of a node are counted on that has left discovery: its "
        "daemon may be restarting.",
    )
