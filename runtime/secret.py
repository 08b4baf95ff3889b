"""Secrets that stand in a file instead of in settings or on a command line."""

from __future__ import annotations

from typing import Final

_FILE_PREFIX: Final = "file:"


def read_secret(value: object) -> object:
    """`file:PATH` becomes what the file holds, less trailing newlines; anything else stays."""
    if not isinstance(value, str) or not value.startswith(_FILE_PREFIX):
        return value
    path = value.removeprefix(_FILE_PREFIX)
    try:
        with open(path, encoding="utf-8") as file:
            secret = file.read().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the secret's file {path} cannot be read: {error}") from error
    if not secret:
        raise ValueError(f"the secret's file {path} is empty")
    return secret
