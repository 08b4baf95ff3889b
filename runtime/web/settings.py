"""Where a program's HTTP API listens and who may ask it, as part of its settings."""

from __future__ import annotations

import re
from typing import ClassVar, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from runtime.hosts import is_loopback
from runtime.settings import Section
from runtime.units import Secret

_TOKEN = re.compile(r"[!-~]{8,}")


class WebSettings(Section):
    """Programs have their own defaults, and name the section as it stands in their settings."""

    section: ClassVar[str]

    host: str = Field(default="127.0.0.1", description="Address the HTTP server listens on.")
    port: int = Field(default=0, ge=0, le=65535, description="Its TCP port; 0 for any free one.")
    token: Secret | None = Field(
        default=None,
        description="What every request below `/v1` must give as `Authorization: Bearer`, or "
        "`file:PATH`; required if `host` is no loopback address.",
    )

    @field_validator("token")
    @classmethod
    def _sendable(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and _TOKEN.fullmatch(token.get_secret_value()) is None:
            raise ValueError("a token is at least 8 characters of ASCII without spaces")
        return token

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"{self.section}.host {self.host!r} is no loopback address, so that others could "
                f"reach the API: set {self.section}.token (`file:PATH` reads it from a file), or "
                "use 127.0.0.1"
            )
        return self

    @property
    def token_text(self) -> str | None:
        return None if self.token is None else self.token.get_secret_value()
