"""A connection to NATS, as the settings of either plane say: servers, credentials, TLS.

Where TLS is asked for (`tls` in the settings, or `tls://`), a server that offers none is refused
before it is told credentials: the client library would send them in the clear.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from runtime.nats_access import NatsAccess
from runtime.tls import client_context

CLOSE_TIMEOUT_S: Final = 2.0
ABORT_TIMEOUT_S: Final = 0.1  # nothing was said; a failed TLS handshake ends in waiting
_PING_INTERVAL_S: Final = 10


class _TlsClient(Client):  # type: ignore[misc]  # the library has no types
    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if not info.get("tls_required"):
            raise NatsError("the server offers no TLS, which the settings ask for")
        await super()._process_info(info, initial_connection)


async def connect(
    access: NatsAccess, name: str, timeout_s: float, on_change: Callable[[], Awaitable[None]]
) -> Client:
    """A connection that is not made again when it breaks; `on_change` is called then.

    Raises OSError with what the last server answered.
    """
    options: dict[str, Any] = {}
    if access.nats_user is not None and access.nats_password is not None:
        options["user"] = access.nats_user
        options["password"] = access.nats_password.get_secret_value()
    if access.nats_credentials is not None:
        options["user_credentials"] = str(access.nats_credentials)
    if access.tls is not None:
        options["tls"] = client_context(access.tls)
        if access.tls.server_name is not None:
            options["tls_hostname"] = access.tls.server_name
    asks_tls = access.tls is not None or any(url.startswith("tls://") for url in access.nats_urls)
    client = _TlsClient() if asks_tls else Client()
    causes: list[Exception] = []

    async def note(error: Exception) -> None:
        causes[:] = [error]

    try:
        async with asyncio.timeout(timeout_s):
            await client.connect(
                servers=access.nats_urls,
                name=name,
                allow_reconnect=False,  # the caller does it, and subscribes again
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=max(1, round(timeout_s)),
                ping_interval=_PING_INTERVAL_S,
                error_cb=note,
                closed_cb=on_change,
                disconnected_cb=on_change,
                **options,
            )
    except BaseException as error:
        await shut(client, ABORT_TIMEOUT_S)
        if isinstance(error, NatsError | OSError | TimeoutError | ValueError):
            # "No servers available" says less than what the last of them answered.
            cause = causes[0] if causes else error
            raise OSError(str(cause) or type(cause).__name__) from error
        raise
    return client


async def shut(client: Client, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
    """Close, whatever state the client is in."""
    with contextlib.suppress(NatsError, OSError, TimeoutError, AttributeError):
        async with asyncio.timeout(timeout_s):
            await client.close()
