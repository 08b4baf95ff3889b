"""What clients of servers without TLS are given as `verify`.

By default a client loads the authorities that the machine trusts: 30 ms of a processor for each,
and for each request that is made without one. A server with TLS would not be trusted.
"""

from __future__ import annotations

import ssl
from typing import Final

PLAIN: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
