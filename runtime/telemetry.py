"""Logging of a program: structlog in front, the standard library's loggers routed in behind.

One line per event, its name first, facts as keys: JSON for machines, aligned text on a terminal.
Under systemd each line carries its priority as `<N>`, which journald takes off again. Programs
call `configure` once, first thing; libraries only ever call `structlog.get_logger()`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Final, Literal, TextIO

import structlog
from pydantic import Field
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from runtime.settings import Section

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

# syslog(3), as journald reads it
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_FIRST: Final = ("event", "level", "timestamp", "logger")
# These say at "info" what is our "debug".
_TALKATIVE: Final = (
    *("nats", "uvicorn", "asyncio", "httpx2", "httpcore2"),
    *("botocore", "boto3", "urllib3", "s3transfer"),
)


def configure(
    log_format: LogFormat, level: LogLevel, stream: TextIO, environ: Mapping[str, str]
) -> None:
    """Set up logging of the whole process to `stream`; a second call replaces the first."""
    console = log_format == "console" or (log_format == "auto" and stream.isatty())
    journald = _is_journal(stream, environ)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *(_console(stream, environ) if console else _json()),
        ],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_WithPriority(formatter) if journald else formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    quiet = root.level if level == "debug" else max(root.level, logging.WARNING)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(quiet)


def _json() -> list[Processor]:
    return [
        # Local variables stay out of the log: they may be secrets, and are long.
        ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
        _event_first,
        structlog.processors.JSONRenderer(serializer=json.dumps, default=str),
    ]


def _console(stream: TextIO, environ: Mapping[str, str]) -> list[Processor]:
    colors = stream.isatty() and not environ.get("NO_COLOR")
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]


def _event_first(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """What a person looks for first comes first; the rest as it was given."""
    first = {name: event.pop(name) for name in _FIRST if name in event}
    return {**first, **event}


class LogSettings(Section):
    format: LogFormat = Field(
        default="auto", description="`auto` is `console` on a terminal and `json` elsewhere."
    )
    level: LogLevel = Field(default="info", description="The least severe level that is logged.")


class _WithPriority(logging.Formatter):
    """Each line begins with its priority: journald makes one entry of each."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelname.lower(), _PRIORITIES["info"])
        lines = self._inner.format(record).splitlines()
        return "\n".join(f"<{priority}>{line}" for line in lines)


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is the very pipe that JOURNAL_STREAM names, not merely inherited."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))
