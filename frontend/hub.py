"""Models by their names at Hugging Face's hub: what of them makes tokens, fetched if need be.

`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean to the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class HubError(Exception):
    """The hub has no such model, or cannot be reached; says which."""


def folder_of(name: str) -> Path:
    """Blocks for as long as it takes. Raises HubError."""
    # Half a second's import, for those who name a model at the hub.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # of which its own errors are made
        said = str(error).strip().partition("\n")[0]
        raise HubError(f"{name!r} is no folder here, nor to be had from the hub: {said}") from error
