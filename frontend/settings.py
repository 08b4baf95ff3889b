"""All settings of kvbm-frontend: its own, and those of the router that is part of it.

`python -m frontend.settings` prints docs/FRONTEND_CONFIG.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from router.settings import RouterSettings
from runtime.settings import Section
from runtime.settings_docs import LAYERS, markdown
from runtime.units import Duration, Secret, Size

ENV_PREFIX: Final = "KVBM_FRONTEND_"
_KEY = re.compile(r"[!-~]{8,}")
_ORIGIN = re.compile(r"\*|https?://[^/\s]+")


class OpenAiSettings(Section):
    host: str = Field(default="127.0.0.1", description="Address that clients reach.")
    port: int = Field(default=8000, ge=0, le=65535, description="Its TCP port; 0 for any free one.")
    api_keys: list[Secret] = Field(
        default=[],
        description="Keys of clients, each at least 8 characters, or `file:PATH`; none: everybody "
        "may ask.",
    )
    admin_keys: list[Secret] = Field(
        default=[],
        description="Keys of those who may also use `/busy_threshold`, where limits are changed.",
    )
    admin: Literal["keys", "clients"] = Field(
        default="keys",
        description="Who may do that: who has one of `admin_keys`, or all clients.",
    )
    cors_origins: list[str] = Field(
        default=[],
        description="Web pages that browsers let ask, as `https://HOST`; `*`: all; none: none.",
    )
    tls_cert: Path | None = Field(
        default=None, description="Certificate chain (PEM); with `tls_key`, clients speak HTTPS."
    )
    tls_key: Path | None = Field(default=None, description="Its private key (PEM).")
    tls_client_ca: Path | None = Field(
        default=None, description="Clients must show a certificate signed by one of these (PEM)."
    )
    requests_max: int = Field(
        default=4096,
        ge=1,
        description="Requests under way at a time; more are answered with 503 and `Retry-After`.",
    )
    body_max: Size = Field(default=32 << 20, ge=1024, description="The largest body of a request.")
    engine_key: Secret | None = Field(
        default=None,
        description="What engines' OpenAI servers ask for (`--api-key`), or `file:PATH`. Clients' "
        "own keys are not passed on.",
    )
    silence: Duration = Field(
        default=600.0,
        gt=0.0,
        description="An engine that says nothing about a request for this long is taken for gone.",
    )
    keep_alive: Duration = Field(
        default=15.0,
        ge=0.0,
        description="No stream is silent for longer: it gets a comment (`: keep-alive`), so that "
        "nothing on the way to the client takes it for dead; 0: it may be silent.",
    )
    drain: Duration = Field(
        default=30.0,
        ge=0.0,
        description="At its end the frontend takes nothing new, and finishes what it has for this "
        "long.",
    )
    responses_remembered: int = Field(
        default=100_000,
        ge=1,
        description="Of so many responses (`/v1/responses`) it is remembered which engine has "
        "them; for others the engines are asked.",
    )
    migrations: int = Field(
        default=1,
        ge=0,
        description="How often one request goes on at another engine after the one at work on it "
        "was lost. One that may kill engines kills so many more.",
    )
    migration_tokens_max: int | None = Field(
        default=None,
        ge=1,
        description="A longer sequence is not computed again elsewhere; `null`: any is.",
    )

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _usable(cls, keys: list[SecretStr]) -> list[SecretStr]:
        if not all(_KEY.fullmatch(key.get_secret_value()) for key in keys):
            raise ValueError("a key is at least 8 characters of ASCII without spaces")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        if not all(_ORIGIN.fullmatch(origin) for origin in origins):
            raise ValueError("an origin is `https://HOST` or `https://HOST:PORT`, or `*` for all")
        return origins

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self


class KserveSettings(Section):
    host: str = Field(default="127.0.0.1", description="Address of the gRPC server.")
    port: int = Field(default=8001, ge=0, le=65535, description="Its TCP port; 0 for any free one.")


class FrontendSettings(RouterSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX)

    openai: OpenAiSettings = Field(
        default=OpenAiSettings(), description="The server that clients ask."
    )
    kserve: KserveSettings | None = Field(
        default=None,
        description="KServe's open inference protocol over gRPC, with the keys, limits and TLS of "
        "`openai`.",
    )
    model_paths: dict[str, Path] = Field(
        default={},
        description="Folders with models' `tokenizer.json` and chat template, by the models' "
        "names. None is needed where engines' records name a folder that is there, or a model at "
        "the hub. While neither can be read, requests of a model are routed by load, and those "
        "whose engines take nothing but tokens are refused.",
    )
    tokenizer_cache: Size = Field(
        default=64 << 20,
        ge=0,
        description="Memory, for each model, for the tokens of text that was seen before.",
    )
    tokens_for: list[str] = Field(
        default=[],
        description="Models whose answers are made here from tokens although their engines have "
        "an OpenAI server: their streams go on when an engine is lost. What cannot be made here "
        "is passed through.",
    )


def config_page() -> str:
    """docs/FRONTEND_CONFIG.md."""
    return markdown(FrontendSettings, "Settings of kvbm-frontend", _INTRODUCTION)


_INTRODUCTION: Final = (
    LAYERS
    + """\
[CONFIG.md](CONFIG.md) says how sizes, durations, secrets, lists and mappings are written. The
frontend has a router in its process: its settings are those of
[ROUTER_CONFIG.md](ROUTER_CONFIG.md), and `http` is where that router's own API is served, for
operators.

This page is generated: `python -m frontend.settings > docs/FRONTEND_CONFIG.md`.
"""
)


if __name__ == "__main__":
    sys.stdout.write(config_page())
