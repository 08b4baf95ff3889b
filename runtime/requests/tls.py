"""TLS contexts out of settings; raises OSError naming the files where they cannot be used."""

from __future__ import annotations

import ssl

from runtime.requests.settings import TlsSettings


def server_context(settings: TlsSettings) -> ssl.SSLContext:
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
