"""Lists and mappings on a command line: what `--set KEY=VALUE` makes of its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from frontend.settings import FrontendSettings
from kvbm.daemon.settings import DaemonSettings
from router.settings import RouterSettings
from runtime.settings import Section, Settings, SettingsError, load, parse_assignments
from runtime.units import Secret


class Rule(Section):
    name: str = Field(description="Its name.")
    weight: int = Field(default=1, description="Its weight.")


class Lists(Section):
    names: list[str] = Field(default=[], description="Texts.")
    pair: tuple[int, ...] | None = Field(default=None, description="Numbers.")
    keys: list[Secret] = Field(default=[], description="Secrets.")
    rules: list[Rule] = Field(default=[], description="Sections.")


class Example(Settings):
    of: Lists = Field(default=Lists(), description="Lists.")
    paths: dict[str, Path] = Field(default={}, description="By name.")
    by_name: dict[str, Rule] = Field(default={}, description="Sections by name.")
    optional: Rule | None = Field(default=None, description="A section.")
    text: str = Field(default="", description="Plain.")


def value(*assignments: str, **layers: Any) -> Example:
    return load(Example, overrides=parse_assignments(assignments), **layers).value


def failure(*assignments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        value(*assignments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("of.names=a,b", ["a", "b"]),
        ("of.names= a , b/c:1 ", ["a", "b/c:1"]),
        ("of.names=one", ["one"]),
        ("of.names=", []),
        ('of.names=["a,b", "c"]', ["a,b", "c"]),
        ("of.names=[]", []),
    ],
)
def test_a_list_of_texts(assignment: str, expected: list[str]) -> None:
    assert value(assignment).of.names == expected


def test_a_list_of_numbers_which_may_be_absent() -> None:
    assert value("of.pair=1,2").of.pair == (1, 2)
    assert value("of.pair=[3, 4]").of.pair == (3, 4)
    assert value("of.pair=null").of.pair is None


def test_a_list_of_sections_is_json() -> None:
    assert value('of.rules=[{"name": "a", "weight": 2}]').of.rules == [Rule(name="a", weight=2)]
    assert "a list as JSON" in failure("of.rules=a,b")


def test_mappings_with_any_names(tmp_path: Path) -> None:
    found = value('paths={"org/m-1.5": "/models/m"}', "paths.plain=/models/p")
    assert found.paths == {"org/m-1.5": Path("/models/m"), "plain": Path("/models/p")}
    file = tmp_path / "s.yaml"
    file.write_text("paths: {plain: /x, other: /y}\n")
    merged = value('paths={"plain": "/z"}', file=file).paths
    assert merged == {"plain": Path("/z"), "other": Path("/y")}


def test_sections_are_json_too() -> None:
    assert value('optional={"name": "a"}').optional == Rule(name="a")
    assert value('by_name={"x": {"name": "a"}}').by_name == {"x": Rule(name="a")}
    assert value("by_name.x.name=a").by_name == {"x": Rule(name="a")}


def test_text_that_only_looks_like_json_stays_text() -> None:
    assert value('text={"a": 1}').text == '{"a": 1}'
    assert value("text=[x").text == "[x"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("of.names=[a", "of.names (from override): begins as JSON and is none"),
        ('of.names={"a": 1}', "of.names (from override)"),
        ("paths=/models/m", 'a mapping as JSON, {"NAME": "..."}; or KEY.NAME=VALUE'),
        ("paths=[1]", "paths (from override)"),
        ("of.pair=1,x", "of.pair.1 (from override): 'x' is not accepted"),
        ("of.name=a,b", "did you mean 'names'"),
        ("optional=a", "a section with the keys name, weight"),
    ],
)
def test_what_is_none_is_told(assignment: str, said: str) -> None:
    assert said in failure(assignment)


def test_all_that_is_wrong_is_told_and_no_secret() -> None:
    told = failure("of.keys=[87654321, sesame", "paths=x", "of.nmes=a")
    assert [key in told for key in ("of.keys", "paths", "of.nmes")] == [True] * 3
    assert "sesame" not in told
    assert "87654321" not in failure("of.keys=[87654321]")


def test_the_programs_take_their_lists_so() -> None:
    def read(program: type[Settings], *assignments: str) -> Any:
        return load(program, overrides=parse_assignments(assignments)).value

    daemon = read(
        DaemonSettings, "peers.nodes=n1:9471,n2:9471", "peers.token=long-enough", "peers.host=::"
    )
    assert daemon.peers.nodes == ["n1:9471", "n2:9471"]
    assert read(RouterSettings, "models=a/b,c").models == ["a/b", "c"]
    frontend = read(FrontendSettings, "tokens_for=a", 'model_paths={"a.b/c": "/m"}')
    assert frontend.tokens_for == ["a"]
    assert frontend.model_paths == {"a.b/c": Path("/m")}
    keys = read(FrontendSettings, "openai.api_keys=long-enough-1,long-enough-2").openai.api_keys
    assert [key.get_secret_value() for key in keys] == ["long-enough-1", "long-enough-2"]
