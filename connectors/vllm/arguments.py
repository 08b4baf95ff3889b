"""vLLM's command line as its user wrote it: what it says, and what is added to it.

Read with vLLM's rules and without vLLM, whose import takes longer than all of a launch: dashes and
underscores are alike, the last of several counts, `--config FILE` comes before the command line,
and a JSON option may be given in parts (`--kv-transfer-config.kv_role kv_both`). What is added
never replaces what the user said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

Json = dict[str, Any]

_SHORT: Final = {"-dp": "data-parallel-size", "-tp": "tensor-parallel-size"}
_CONFIG: Final = "config"


class ArgumentError(ValueError):
    """An argument that cannot be read; the message names it."""


class Arguments:
    def __init__(self, given: Sequence[str]) -> None:
        """Raises ArgumentError if there is a file of arguments that cannot be read."""
        self.given = tuple(given)
        file = self._told(_CONFIG)
        self._file = {} if file is None else _read(Path(file))

    @property
    def positional_model(self) -> str | None:
        """As `vllm serve MODEL` takes it: before all options."""
        is_model = self.given and not self.given[0].startswith("-")
        return self.given[0] if is_model else None

    @property
    def model(self) -> str | None:
        return self.positional_model or self.value("model")

    def value(self, name: str) -> str | None:
        """Of an option that has one, by its long name without dashes before it."""
        told = self._told(name)
        if told is None and name in self._file:
            found = self._file[name]
            return json.dumps(found) if isinstance(found, dict) else str(found)
        return told

    def count(self, name: str, otherwise: int) -> int:
        """A number; `otherwise` also for spellings that only vLLM reads, such as `auto` or `8k`."""
        told = self.value(name)
        return int(told) if told is not None and told.isdecimal() else otherwise

    def flag(self, name: str) -> bool:
        return any(known == name for _, known, _ in self._options()) or bool(self._file.get(name))

    def json(self, name: str) -> Json:
        """What is said of a JSON option, whichever way. Raises ArgumentError."""
        parts = [(path, value) for path, value in self._parts(name)]
        if not parts:
            return _object(name, self.value(name))
        whole: Json = {}
        for path, value in parts:
            _lay_over(whole, _nested(path, value))
        return whole

    def with_json(self, name: str, ours: Mapping[str, Any]) -> Arguments:
        """The same with whatever of `ours` the user did not say himself."""
        said = self.json(name)
        if any(self._parts(name)):
            more = [
                word
                for path, value in _leaves(ours)
                if not _has(said, path)
                for word in (f"--{name}.{'.'.join(path)}", _as_text(value))
            ]
            return Arguments([*self.given, *more])
        whole: Json = {}
        _lay_over(whole, ours)
        _lay_over(whole, said)
        return Arguments([*self._without(name), f"--{name}", json.dumps(whole)])

    def with_value(self, name: str, value: str) -> Arguments:
        return Arguments([*self._without(name), f"--{name}", value])

    # -- reading --------------------------------------------------------------------------

    def _options(self) -> Iterator[tuple[int, str, str | None]]:
        """Index, long name (with the parts behind it) and the value written into the same word."""
        for index, word in enumerate(self.given):
            if word in _SHORT:
                yield index, _SHORT[word], None
            elif word.startswith("--"):
                head, equals, value = word[2:].partition("=")
                name, dot, path = head.partition(".")
                yield index, name.replace("_", "-") + dot + path, value if equals else None

    def _told(self, name: str) -> str | None:
        found = None
        for index, known, value in self._options():
            if known == name:
                behind = self.given[index + 1] if index + 1 < len(self.given) else None
                found = behind if value is None else value
        return found

    def _parts(self, name: str) -> Iterator[tuple[list[str], Any]]:
        for index, known, value in self._options():
            head, dot, path = known.partition(".")
            if head == name and dot:
                behind = self.given[index + 1] if index + 1 < len(self.given) else ""
                text = behind if value is None else value
                if path.endswith("+"):
                    yield path[:-1].split("."), text.split(",")
                else:
                    yield path.split("."), _value(text)

    def _without(self, name: str) -> list[str]:
        gone: set[int] = set()
        for index, known, value in self._options():
            if known == name:
                gone |= {index} if value is not None else {index, index + 1}
        return [word for index, word in enumerate(self.given) if index not in gone]


def _read(file: Path) -> Json:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ArgumentError(f"--config {file} holds no options")
    return {str(name).replace("_", "-"): value for name, value in tree.items()}


def _object(name: str, text: str | None) -> Json:
    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise ArgumentError(f"--{name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"--{name} is no JSON object: {text}")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _nested(path: Sequence[str], value: Any) -> Json:
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _lay_over(target: Json, layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        below = target.get(name)
        if isinstance(value, dict):
            target[name] = below = dict(below) if isinstance(below, dict) else {}
            _lay_over(below, value)
        else:
            target[name] = value


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        else:
            yield [*path, name], value


def _has(tree: Any, path: Sequence[str]) -> bool:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True
