"""A Markdown page of all settings, made from the models themselves.

The page is checked into the repository; a test makes it again and compares, so what is
documented is what is accepted. Fields whose default depends on the machine describe it with
`json_schema_extra={"default_text": ...}`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from runtime.settings import Settings, is_by_name, section_of
from runtime.units import Kind, format_duration, format_size

LAYERS: Final = """\
Later ones win: built-in defaults, the file given with `--config` (YAML, TOML or JSON), the
environment, the command line (`--set KEY=VALUE`). An unknown key is an error that names what was
meant.
"""
"""What the introduction of every page begins with."""


@dataclass(frozen=True, slots=True)
class Row:
    key: str  # dotted
    variable: str
    type: str
    default: str
    description: str


@dataclass(frozen=True, slots=True)
class Group:
    """One section's rows; `name` is empty for the root."""

    name: str
    optional: bool
    description: str
    rows: tuple[Row, ...]


def describe(model: type[Settings]) -> list[Group]:
    """All settings, the root's own first, then section by section, in declared order."""
    return list(_groups(model, "", "", str(model.model_config.get("env_prefix", "")), False))


def markdown(model: type[Settings], title: str, introduction: str) -> str:
    """The page as text, ending in one newline."""
    lines = [f"# {title}", "", introduction.strip(), ""]
    for group in describe(model):
        if group.name:
            absent = " (optional: `null` or absent turns it off)" if group.optional else ""
            lines += [f"## `{group.name}`{absent}", ""]
        else:
            lines += ["## Top level", ""]
        if group.description:
            lines += [group.description, ""]
        lines += ["| key | type | default | environment | meaning |", "|---|---|---|---|---|"]
        for row in group.rows:
            cells = (f"`{row.key}`", row.type, row.default, f"`{row.variable}`", row.description)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _groups(
    model: type[BaseModel], name: str, description: str, prefix: str, optional: bool
) -> Iterator[Group]:
    hints = get_type_hints(model, include_extras=True)
    path = f"{name}." if name else ""
    rows: list[Row] = []
    below: list[Group] = []
    for key, about in model.model_fields.items():
        section = section_of(about.annotation)
        text = about.description or ""
        if section is not None:
            nullable = type(None) in get_args(about.annotation)
            named = is_by_name(about.annotation)
            under, variable = f"{path}{key}", f"{prefix}{key.upper()}__"
            if named:  # what is in capitals is the reader's to fill in
                under, variable = f"{under}.NAME", f"{variable}NAME__"
            below += _groups(section, under, text, variable, nullable)
            continue
        default = _default(about, hints[key])
        row = Row(f"{path}{key}", f"{prefix}{key.upper()}", _type(hints[key]), default, text)
        rows.append(row)
    yield Group(name, optional, description, tuple(rows))
    yield from below


def _type(hint: Any) -> str:
    if hint is type(None):
        return "`null`"
    if metadata := getattr(hint, "__metadata__", None):
        kinds = [mark.name for mark in metadata if isinstance(mark, Kind)]
        return kinds[0] if kinds else _type(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(_type(member) for member in get_args(hint))
    if get_origin(hint) in {tuple, list}:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return " to ".join(("mapping of " + _type(get_args(hint)[0]), _type(get_args(hint)[1])))
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`"}
    name = str(hint.__name__)
    return names.get(name, name.lower())


def _default(about: FieldInfo, hint: Any) -> str:
    extra = about.json_schema_extra
    if isinstance(extra, dict) and "default_text" in extra:
        return str(extra["default_text"])
    if about.is_required():
        return "required"
    return _shown(about.get_default(call_default_factory=True, validated_data={}), _type(hint))


def _shown(value: object, kind: str) -> str:
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case int() if kind.startswith("size"):
            text = format_size(value)
        case int() | float() if kind.startswith("duration"):
            text = format_duration(value)
        case _:
            text = str(value)
    return f"`{text}`" if text else "empty"
