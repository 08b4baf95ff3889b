"""Settings from a file, the environment and explicit overrides, with errors a person can act on.

Programs declare one `Settings` root with `Section`s in it and call `load`. Later layers win:
built-in defaults, then the file (YAML, TOML or JSON by suffix), then the environment (`KVBM_`
prefix, `__` between levels), then overrides. Every key has one known origin. Whatever is wrong is
found in one go and told in one `SettingsError`: which key, where it came from, what is accepted.
Lists and mappings are JSON in variables and overrides; in overrides a list may also be `a,b`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Generic, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

Tree = dict[str, Any]
S = TypeVar("S", bound="Settings")

_VALUE_CHARACTERS_MAX = 60
_LISTS: Final = frozenset((list, tuple, set, frozenset))


class Section(BaseModel):
    """A group of settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Settings(BaseSettings):
    """The root. Constructing it reads nothing; `load` is what reads files and environments."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="KVBM_",
        env_nested_delimiter="__",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Problem:
    key: str  # dotted; empty for the file as a whole
    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key or 'settings'} (from {self.origin}): {self.reason}"


class SettingsError(Exception):
    """The settings cannot be used; `problems` says everything that is wrong with them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        lines = [f"  {problem}" for problem in self.problems]
        super().__init__("\n".join([f"the settings cannot be used, {count}:", *lines]))


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    value: S
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> where it was set
    ignored: tuple[str, ...] = ()  # variables with our prefix that name no setting


def load(
    model: type[S],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Loaded[S]:
    """Merge the layers into one validated `model`, or raise SettingsError with all problems.

    Args:
        file: YAML (.yaml, .yml), TOML (.toml) or JSON (.json); must exist if given.
        environ: where variables are looked up; none are if it is not given.
        overrides: dotted key to value, the strongest layer; text is read as what the key asks for.
    """
    merged: Tree = {}
    origins: dict[str, str] = {}
    problems: list[Problem] = []
    ignored: tuple[str, ...] = ()
    if file is not None:
        _overlay(merged, origins, _read_file(file), lambda _: str(file))
    if environ is not None:
        ignored = _check_names(model, environ, problems)
        _overlay(
            merged,
            origins,
            _read_environment(model, environ),
            lambda k: _variable(model, environ, k),
        )
    if overrides:
        read = _read_overrides(model, overrides, problems)
        _overlay(merged, origins, _nested(read), lambda _: "override")
    try:
        value = model(**merged)
    except ValidationError as error:
        problems += [_problem(model, detail, origins) for detail in error.errors()]
    else:
        if not problems:
            return Loaded(value, origins, ignored)
    raise SettingsError(problems)


def parse_assignments(assignments: Iterable[str]) -> dict[str, object]:
    """`["dram.capacity=8GiB"]`, as given on a command line, to overrides; "null" means none."""
    overrides: dict[str, object] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            reason = f"{assignment!r} is not KEY=VALUE, for example dram.capacity=8GiB"
            raise SettingsError([Problem("", "override", reason)])
        overrides[key.strip()] = None if value.strip() == "null" else value.strip()
    return overrides


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section an annotation names, also as `SECTION | None`; None if it names none."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def is_by_name(annotation: object) -> bool:
    """Whether an annotation is of sections by names that the user chooses."""
    return get_origin(annotation) is dict and section_of(annotation) is not None


# -- reading the layers -------------------------------------------------------------------


def _read_file(file: Path) -> Tree:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix in {".yaml", ".yml"}:
            tree = yaml.safe_load(text)
        elif file.suffix == ".toml":
            tree = tomllib.loads(text)
        elif file.suffix == ".json":
            tree = json.loads(text)
        else:
            reason = f"the suffix {file.suffix!r} is not known; accepted: .yaml, .yml, .toml, .json"
            raise SettingsError([Problem("", str(file), reason)])
    except OSError as error:
        reason = f"the file cannot be read: {error.strerror}"
        raise SettingsError([Problem("", str(file), reason)]) from error
    except (yaml.YAMLError, ValueError) as error:  # of TOML, of JSON, of text that is none
        reason = f"not well-formed: {' '.join(str(error).split())}"
        raise SettingsError([Problem("", str(file), reason)]) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        reason = f"holds a {type(tree).__name__}; accepted: a mapping of keys to values"
        raise SettingsError([Problem("", str(file), reason)])
    return {str(key): value for key, value in tree.items()}


def _read_environment(model: type[Settings], environ: Mapping[str, str]) -> Tree:
    source = EnvSettingsSource(model)
    # The source looked at the process; what counts is the environment given to `load`.
    source.env_vars = {name.lower(): value for name, value in environ.items()}
    try:
        tree = _null_to_none(source())
    except SourceError as error:
        reason = f"{error}: a section in one variable must be a JSON object, a list a JSON array"
        raise SettingsError([Problem("", "environment", reason)]) from error
    prefix = str(model.model_config.get("env_prefix", ""))
    absent = [name for name in model.model_fields if environ.get(prefix + name.upper()) == "null"]
    return {**tree, **dict.fromkeys(absent)}


def _null_to_none(tree: Tree) -> Tree:
    return {
        name: _null_to_none(value)
        if isinstance(value, dict)
        else (None if value == "null" else value)
        for name, value in tree.items()
    }


def _check_names(
    model: type[Settings], environ: Mapping[str, str], problems: list[Problem]
) -> tuple[str, ...]:
    """Report variables that miss a setting by a typo; return those that are none of ours.

    Kubernetes sets `KVBM_PORT`, `KVBM_SERVICE_HOST` and the like for a service named kvbm, so
    only names with `__` in them, or close to a setting's, are held to be meant for us.
    """
    prefix = str(model.model_config.get("env_prefix", ""))
    ignored: list[str] = []
    for name in sorted(environ):
        if not name.startswith(prefix) or name == prefix:
            continue
        head, nested, _ = name.removeprefix(prefix).lower().partition("__")
        if head in model.model_fields:
            if nested and section_of(model.model_fields[head].annotation) is None:
                problems.append(Problem(name, "environment", f"{head} has no keys of its own"))
        elif nested or difflib.get_close_matches(head, model.model_fields, 1, 0.8):
            reason = "unknown setting" + _suggestion(head, model.model_fields)
            problems.append(Problem(name, "environment", reason))
        else:
            ignored.append(name)
    return tuple(ignored)


def _variable(model: type[Settings], environ: Mapping[str, str], key: str) -> str:
    """The variable that set `key`: its own, or that of a section given as JSON."""
    prefix = str(model.model_config.get("env_prefix", ""))
    parts = key.upper().split(".")
    for end in range(len(parts), 0, -1):
        name = prefix + "__".join(parts[:end])
        if name in environ:
            return f"environment {name}"
    return "environment"


def _read_overrides(
    model: type[Settings], overrides: Mapping[str, object], problems: list[Problem]
) -> dict[str, object]:
    """With text made lists and mappings where these are asked for."""
    read: dict[str, object] = {}
    for key, value in overrides.items():
        try:
            is_text = isinstance(value, str)
            read[key] = _of_text(_kinds_at(model, key.split(".")), value) if is_text else value
        except ValueError as error:
            problems.append(Problem(key, "override", str(error)))
    return read


def _of_text(kinds: list[Any], text: Any) -> Any:
    """Raises ValueError, which does not repeat the text: it may be a secret."""
    made = {get_origin(kind) or kind for kind in kinds}
    is_list, is_mapping = bool(made & _LISTS), dict in made
    is_section = any(section_of(kind) is not None for kind in kinds)
    if text[:1] in ("[", "{") and (is_list or is_mapping or is_section):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"begins as JSON and is none: {error}") from error
    if is_list and str not in made:
        elements = next(get_args(kind)[0] for kind in kinds if get_origin(kind) in _LISTS)
        if section_of(elements) is not None or get_origin(elements) in {dict, *_LISTS}:
            raise ValueError('accepted: a list as JSON, ["...", "..."]')
        return [one.strip() for one in text.split(",")] if text.strip() else []
    if is_mapping:
        raise ValueError('accepted: a mapping as JSON, {"NAME": "..."}; or KEY.NAME=VALUE')
    return text


def _kinds_at(model: type[Settings], parts: list[str]) -> list[Any]:
    """What a dotted key may be, each member of a union; nothing for one that is not known."""
    kinds: list[Any] = [model]
    for part in parts:
        below: list[Any] = []
        for kind in kinds:
            if get_origin(kind) is dict:
                below += _members(get_args(kind)[1])
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                about = kind.model_fields.get(part)
                below += [] if about is None else _members(about.annotation)
        kinds = below
    return kinds


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in {Union, UnionType}:
        return [one for member in get_args(annotation) for one in _members(member)]
    return [annotation]


def _nested(dotted: Mapping[str, object]) -> Tree:
    tree: Tree = {}
    for key, value in dotted.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            below = node.get(parent)
            if not isinstance(below, dict):
                below = node[parent] = {}
            node = below
        node[leaf] = value
    return tree


def _overlay(
    target: Tree, origins: dict[str, str], layer: Tree, origin: Any, path: str = ""
) -> None:
    """Lay `layer` over `target`, sections key by key, and remember who set what."""
    for name, value in layer.items():
        key = f"{path}{name}"
        if isinstance(value, dict):
            below = target.get(name)
            if not isinstance(below, dict):
                below = target[name] = {}
            origins.setdefault(key, origin(key))
            _overlay(below, origins, value, origin, f"{key}.")
        else:
            target[name] = value
            for hidden in [known for known in origins if known.startswith(f"{key}.")]:
                del origins[hidden]
            origins[key] = origin(key)


# -- telling what is wrong ----------------------------------------------------------------


def _problem(model: type[BaseModel], detail: ErrorDetails, origins: Mapping[str, str]) -> Problem:
    parts = [str(part) for part in detail["loc"]]
    key = ".".join(parts)
    return Problem(key, _origin(key, origins), _reason(model, parts, detail))


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Who set this key, or else something below it, or else the section it is in."""
    if key in origins:
        return origins[key]
    for known, origin in origins.items():
        if known.startswith(f"{key}.") or not key:
            return origin
    parent, _, _ = key.rpartition(".")
    return _origin(parent, origins) if parent else "defaults"


def _reason(model: type[BaseModel], parts: list[str], detail: ErrorDetails) -> str:
    section: type[BaseModel] | None = model
    by_name = False
    of: Any = None  # the field that the value is of, or of which it is an element
    for part in parts[:-1]:
        if part.isdigit():  # a place in a list; the section is that of what it holds
            continue
        if by_name:  # the part is a name; the section stays
            by_name = False
            continue
        known = section.model_fields.get(part) if section is not None else None
        section = section_of(known.annotation) if known is not None else None
        by_name = known is not None and is_by_name(known.annotation)
        of = known or of
    names = section.model_fields if section is not None else {}
    about = names.get(parts[-1]) if parts else None
    of = about or of
    match detail["type"]:
        case "extra_forbidden":
            return "unknown key" + _suggestion(parts[-1], names)
        case "missing":
            text = about.description if about is not None and about.description else "a value"
            return f"required here: {text}"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "literal_error" | "enum":
            accepted = f"accepted: {detail['ctx']['expected']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            accepted = f"accepted: a section with the keys {', '.join(_keys_below(about))}"
        case _:
            accepted = detail["msg"].replace("Input should be", "should be").lower()
    secret = of is not None and _mentions(of.annotation, SecretStr)
    return f"{'the value' if secret else _shown(detail['input'])} is not accepted; {accepted}"


def _mentions(annotation: object, kind: type) -> bool:
    return annotation is kind or any(_mentions(part, kind) for part in get_args(annotation))


def _keys_below(about: Any) -> Iterator[str]:
    section = section_of(about.annotation) if about is not None else None
    if section is not None:
        yield from section.model_fields


def _suggestion(name: str, names: Iterable[str]) -> str:
    known = list(names)
    close = difflib.get_close_matches(name, known, 1, 0.6)
    meant = f", did you mean {close[0]!r}?" if close else ""
    return f"{meant or ';'} accepted here: {', '.join(known)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_CHARACTERS_MAX else f"{text[:_VALUE_CHARACTERS_MAX]}..."
