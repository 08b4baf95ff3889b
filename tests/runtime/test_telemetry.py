"""Logging: what a line looks like for a machine, a terminal and the journal."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from runtime.telemetry import LogLevel, configure


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def logged(level: LogLevel = "info") -> io.StringIO:
    stream = io.StringIO()
    configure("auto", level, stream, {})
    return stream


def test_a_line_is_json_with_the_event_first() -> None:
    stream = logged()
    structlog.get_logger("kvbm.test").info("tier_opened", tier="G3", path=Path("/ssd"))
    line = json.loads(stream.getvalue())
    assert list(line)[:2] == ["event", "level"]
    assert line["event"] == "tier_opened"
    assert line["logger"] == "kvbm.test"
    assert (line["tier"], line["path"]) == ("G3", "/ssd")


def test_the_standard_librarys_loggers_come_out_alike() -> None:
    stream = logged()
    logging.getLogger("some.library").warning("took %d s", 3, extra={"tier": "G4"})
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["tier"]) == ("took 3 s", "warning", "G4")


def test_levels_below_the_one_asked_for_are_left_out() -> None:
    stream = logged("warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("other").info("quiet")
    logging.getLogger("uvicorn.error").info("quiet")
    assert stream.getvalue() == ""


def test_talkative_libraries_are_heard_at_debug_only() -> None:
    stream = logged("info")
    logging.getLogger("uvicorn.error").info("Started server")
    assert stream.getvalue() == ""
    stream = logged("debug")
    logging.getLogger("uvicorn.error").info("Started server")
    assert "Started server" in stream.getvalue()


def test_an_exception_stays_on_one_line() -> None:
    stream = logged()
    secret = "hunter2"
    try:
        Path("/absent" + secret[:0]).read_text()
    except OSError:
        structlog.get_logger().exception("tier_failed")
    assert stream.getvalue().count("\n") == 1
    assert "No such file" in json.loads(stream.getvalue())["exception"][0]["exc_value"]
    assert secret not in stream.getvalue()


def test_bound_context_is_on_every_line() -> None:
    stream = logged()
    structlog.contextvars.bind_contextvars(session="s1")
    structlog.get_logger().info("a")
    logging.getLogger("b").warning("b")
    assert [json.loads(line)["session"] for line in stream.getvalue().splitlines()] == ["s1", "s1"]


def test_the_console_form_is_for_people() -> None:
    stream = io.StringIO()
    configure("console", "info", stream, {})
    structlog.get_logger().info("tier_opened", tier="G3")
    assert "tier_opened" in stream.getvalue()
    assert "tier=G3" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_the_journal_gets_priorities_if_the_stream_is_its_own(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as stream:
        found = os.fstat(stream.fileno())
        configure("json", "info", stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        structlog.get_logger().error("broken")
        structlog.get_logger().info("fine")
        configure("json", "info", stream, {"JOURNAL_STREAM": "1:1"})
        structlog.get_logger().info("elsewhere")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert [line[:4] for line in lines] == ["<3>{", "<6>{", '{"ev']
