"""TLS of either side: its settings, and contexts out of them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from runtime.settings import Section


class TlsSettings(Section):
    certificate: Path | None = Field(
        default=None, description="This side's certificate chain (PEM); a server needs one."
    )
    key: Path | None = Field(default=None, description="The certificate's private key (PEM).")
    authority: Path | None = Field(
        default=None,
        description="Certificates (PEM) that sign the other side's; the system's if not given.",
    )
    mutual: bool = Field(
        default=False, description="A server asks clients for certificates of `authority` too."
    )
    server_name: str | None = Field(
        default=None,
        description="The name a client expects in the server's certificate; the address's host "
        "if not given.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both or neither")
        if self.mutual and self.authority is None:
            raise ValueError("mutual needs an authority: whose certificates clients must have")
        return self


def server_context(settings: TlsSettings) -> ssl.SSLContext:
    """Raises OSError naming the files where they cannot be used; so does `client_context`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, settings)
    if settings.certificate is None:
        raise OSError("a server with TLS needs a certificate and its key")
    if settings.mutual:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(settings: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, settings)
    if settings.authority is None:
        context.load_default_certs()
    return context


def _load(context: ssl.SSLContext, settings: TlsSettings) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if settings.certificate is not None and settings.key is not None:
            context.load_cert_chain(settings.certificate, settings.key)
        if settings.authority is not None:
            context.load_verify_locations(settings.authority)
    except OSError as error:  # ssl.SSLError is one
        files = f"{settings.certificate}, {settings.key}, {settings.authority}"
        raise OSError(f"the TLS files cannot be used ({files}): {error}") from error
