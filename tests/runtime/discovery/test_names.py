"""Names and references: what may be one, that text and name are one to one, and the keys."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.discovery.base import check_key, check_prefix
from runtime.names import (
    EndpointName,
    InstanceName,
    NameRefused,
    component_prefix,
    encode_segment,
)

PARTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
ENDPOINTS = st.lists(PARTS, min_size=1, max_size=2).map("/".join)
NAMES = st.builds(EndpointName, PARTS, PARTS, ENDPOINTS)


def test_references_parse_with_and_without_the_scheme() -> None:
    name = EndpointName("production", "Processor", "chat/completions")
    assert EndpointName.parse("production.Processor.chat/completions") == name
    assert EndpointName.parse("dyn://production.Processor.chat/completions") == name
    assert str(name) == "production.Processor.chat/completions"
    assert name.url == "dyn://production.Processor.chat/completions"
    assert name.instances_prefix == "v1/instances/production/Processor/chat%2Fcompletions/"


@pytest.mark.parametrize(
    ("reference", "part", "allowed"),
    [
        ("production.Processor", "endpoint reference", "namespace.component.endpoint"),
        ("a.b.c.d", "endpoint reference", "namespace.component.endpoint"),
        ("", "endpoint reference", "namespace.component.endpoint"),
        ("dyn://", "endpoint reference", "namespace.component.endpoint"),
        (".b.c", "namespace", "1 to 63"),
        ("a b.c.d", "namespace", "letters, digits"),
        ("a/b.c.d", "namespace", "letters, digits"),
        ("http://a.b.c", "namespace", "letters, digits"),
        ("a..c", "component", "1 to 63"),
        ("a.-b.c", "component", "first"),
        ("a.ä.c", "component", "letters, digits"),
        ("a.b.c\n", "endpoint", "letters, digits"),
        ("a.b.", "endpoint", "chat/completions"),
        ("a.b./c", "endpoint", "divided by '/'"),
        ("a.b.c//d", "endpoint", "divided by '/'"),
        (f"a.b.{'c' * 64}", "endpoint", "1 to 63"),
    ],
)
def test_a_bad_reference_says_which_part_and_what_is_allowed(
    reference: str, part: str, allowed: str
) -> None:
    with pytest.raises(NameRefused, match=allowed) as caught:
        EndpointName.parse(reference)
    assert caught.value.part == part
    assert str(caught.value).startswith(part)


@given(NAMES, st.integers(1, (1 << 64) - 1))
def test_names_texts_and_keys_are_one_to_one(endpoint: EndpointName, number: int) -> None:
    instance = InstanceName(endpoint, number)
    assert EndpointName.parse(str(endpoint)) == endpoint
    assert EndpointName.parse(endpoint.url) == endpoint
    assert InstanceName.of_key(instance.key) == instance
    assert instance.key.startswith(endpoint.instances_prefix)
    assert instance.key.startswith(component_prefix(endpoint.namespace, endpoint.component))
    assert instance.key.startswith(component_prefix(endpoint.namespace))
    check_key(instance.key)
    check_prefix(endpoint.instances_prefix)


@given(NAMES, NAMES)
def test_no_endpoint_lies_under_another(one: EndpointName, other: EndpointName) -> None:
    inside = InstanceName(one, 7).key.startswith(other.instances_prefix)
    assert inside == (one == other)


@given(st.text(min_size=1, max_size=40))
def test_any_text_stays_at_its_level_of_a_key(text: str) -> None:
    try:
        encoded = encode_segment(text)
    except UnicodeEncodeError:
        return  # half a surrogate is no text
    assert unquote(encoded, errors="strict") == text
    assert "/" not in encoded
    assert encoded not in {".", ".."}


@pytest.mark.parametrize("number", [0, -1, 1 << 64])
def test_an_instance_id_has_64_bits(number: int) -> None:
    with pytest.raises(NameRefused, match=r"2\^64-1"):
        InstanceName(EndpointName("a", "b", "c"), number)


@pytest.mark.parametrize(
    "key",
    [
        "v1/mdc/a/b/c/1",
        "v1/instances/a/b/c",
        "v1/instances/a/b/c/1/2",
        "v1/instances/a/b/c/0",
        "v1/instances/a/b/c/01",
        "v1/instances/a/b/c/FF",
        "v1/instances/a/b/c/12345678901234567",
        "v1/instances/a/%62/c/1",
        "v1/instances/a/b/c%2f/1",
        "v1/instances/a/b%2Fc/d/1",
        "",
    ],
)
def test_a_key_that_is_spelled_otherwise_is_no_instances(key: str) -> None:
    with pytest.raises(NameRefused):
        InstanceName.of_key(key)


@pytest.mark.parametrize("bad", [("a/b", None), ("a", "b/c"), ("", None), ("a", "")])
def test_prefixes_are_of_names_only(bad: tuple[str, str | None]) -> None:
    with pytest.raises(NameRefused):
        component_prefix(*bad)
