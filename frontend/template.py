"""Chat templates: messages to the text that a model was trained on, as Hugging Face renders them.

A template comes with the model and is code: it runs in Jinja's sandbox, and what it makes is
bounded. Names that templates use are those of `transformers.apply_chat_template` (checked against
it in tests): `messages`, `tools`, `documents`, `add_generation_prompt`, the special tokens, and
whatever the request's `chat_template_kwargs` say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEXT_CHARS_MAX: Final = 16 << 20
_SPECIAL: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

Message = Mapping[str, Any]


class TemplateError(Exception):
    """The model's template cannot be loaded, or refuses these messages; says why."""


class ChatTemplate:
    """Compiled once. `source` is Jinja; `special` the model's special tokens by name."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """Raises TemplateError."""
        self._special = dict(special)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template is no Jinja: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Of a model's folder; None if it has none. Raises TemplateError."""
        config = _read_json(folder / "tokenizer_config.json")
        source = _source(folder, config)
        if source is None:
            return None
        return cls(source, {name: _text(config.get(name)) for name in _SPECIAL if config.get(name)})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Raises TemplateError if the template refuses them."""
        names = {
            "documents": None,
            **self._special,
            **(kwargs or {}),
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(names):
                parts.append(part)
                length += len(part)
                if length > TEXT_CHARS_MAX:
                    raise TemplateError(f"the text is longer than {TEXT_CHARS_MAX} characters")
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateError(f"the model's chat template refuses them: {error}") from error
        except (RecursionError, OverflowError, MemoryError, ArithmeticError) as error:
            raise TemplateError(f"the model's chat template fails: {error!r}") from error
        return "".join(parts)


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; to the text it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (as the library declares it)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _now
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not Jinja's own, which escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own goes before the one in the configuration, as in `transformers`."""
    path = folder / "chat_template.jinja"
    try:
        return path.read_text()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TemplateError(f"{path}: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one.get("name") == "default"), None)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TemplateError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise TemplateError(f"{path}: not an object")
    return found


def _text(token: Any) -> str:
    """Special tokens are texts, or objects with one."""
    return str(token["content"] if isinstance(token, dict) else token)
