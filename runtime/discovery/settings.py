"""Which discovery a program uses, as part of its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from runtime.settings import Section
from runtime.units import Duration, Secret

TTL_S_MIN: Final = 0.5
TTL_S_MAX: Final = 3600.0


class DiscoverySettings(Section):
    discovery: Literal["file", "etcd", "kubernetes", "memory"] = Field(
        default="file",
        description="Where programs find each other: `file` on one machine, `etcd` or "
        "`kubernetes` for a fleet, `memory` within one process (tests).",
    )
    ttl: Duration = Field(
        default=10.0,
        ge=TTL_S_MIN,
        le=TTL_S_MAX,
        description="What a process registered is gone this long after the process died. "
        "Leases are renewed three times in it.",
    )
    file_directory: Path | None = Field(
        default=None,
        description="Directory that the programs share; by default `kvbm/discovery` in the "
        "user's runtime directory, or `kvbm-UID/discovery` in `/tmp` if there is none.",
    )
    file_poll: Duration = Field(
        default=0.25,
        ge=0.01,
        le=60.0,
        description="How often a watcher looks at the directory.",
    )
    etcd_url: str = Field(
        default="http://127.0.0.1:2379",
        description="etcd's client URL, or several separated by commas; `https://` for TLS.",
    )
    etcd_user: str | None = Field(default=None, description="User name for etcd.")
    etcd_password: Secret | None = Field(
        default=None, description="Password for etcd, or `file:PATH` to read it from a file."
    )
    etcd_ca: Path | None = Field(
        default=None, description="Certificate that signs etcd's, if the system does not know it."
    )
    etcd_certificate: Path | None = Field(
        default=None, description="This program's certificate (PEM), where etcd asks for one."
    )
    etcd_key: Path | None = Field(default=None, description="The certificate's private key (PEM).")
    kubernetes_url: str | None = Field(
        default=None,
        description="The API server; by default the one of the cluster that this runs in.",
    )
    kubernetes_namespace: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="Kubernetes namespace of the objects; by default that of the service account.",
    )
    kubernetes_account: Path = Field(
        default=Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        description="Directory with the service account's `token`, `ca.crt` and `namespace`.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.etcd_user is None) != (self.etcd_password is None):
            raise ValueError("etcd_user and etcd_password go together: give both or neither")
        if (self.etcd_certificate is None) != (self.etcd_key is None):
            raise ValueError("etcd_certificate and etcd_key go together: give both or neither")
        for name, urls in {
            "etcd_url": self.etcd_urls,
            "kubernetes_url": [self.kubernetes_url] if self.kubernetes_url is not None else [],
        }.items():
            for url in urls:
                if not url.startswith(("http://", "https://")):
                    raise ValueError(f"{name}: {url!r} is no URL; accepted: http://HOST:PORT")
        return self

    @property
    def etcd_urls(self) -> list[str]:
        return [url.strip().rstrip("/") for url in self.etcd_url.split(",")]
