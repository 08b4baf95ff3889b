"""AWS Signature Version 4 for one small request, as much as a readiness check needs.

Data goes through a real S3 client; this exists so that waiting for an embedded server needs none.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime
from urllib.parse import quote


def signed_headers(
    method: str,
    host: str,
    path: str,
    body: bytes,
    *,
    access_key_id: str,
    secret_access_key: str,
    region: str,
    now: datetime,
) -> dict[str, str]:
    """The headers that make this request S3's; `path` has no query, `now` is in UTC."""
    time = now.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{time[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(body).hexdigest()
    headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": time}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = "\n".join([method, quote(path), "", lines, names, digest])
    hashed = hashlib.sha256(request.encode()).hexdigest()
    key = f"AWS4{secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{hashed}"
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"Credential={access_key_id}/{scope}"
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 {credential},SignedHeaders={names},Signature={signature}"
    )
    return headers
