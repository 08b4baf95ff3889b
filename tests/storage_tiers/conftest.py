"""One real S3 server for all tests of this folder, and short transfers to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from runtime.embedded import EmbeddedS3
from storage_tiers.bucket import S3Bucket

BUCKET = "tiers"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with EmbeddedS3(tmp_path_factory.mktemp("s3"), buckets=[BUCKET]) as server:
        yield server


@pytest.fixture
def make_bucket(s3_server: EmbeddedS3) -> Callable[[], S3Bucket]:
    """A new client of the server's bucket."""

    def make() -> S3Bucket:
        return S3Bucket(
            BUCKET,
            endpoint_url=s3_server.endpoint_url,
            region=s3_server.region,
            addressing_style="path",
            access_key_id=s3_server.access_key_id,
            secret_access_key=s3_server.secret_access_key,
            attempts=2,
        )

    return make


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test rigs' transfers to a GPU take several."""
    monkeypatch.setattr("storage_tiers.device_batches._WINDOW", 3)
