"""Log lines for people ("text": logfmt) or for collectors ("json": one object per line). Set up once, by the CLI.

Everything logs through the standard library; structlog renders. Request lines come from `rpc.py` with their fields in
`extra`: ids, counts, times and how it ended, never content. A caller's label is escaped: it cannot forge a line.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["text", "json"]

_logfmt = structlog.processors.LogfmtRenderer(
    key_order=("time", "level", "logger", "message"), drop_missing=True, bool_as_flag=False
)


def formatter(log_format: LogFormat) -> logging.Formatter:
    """Renders one record as one line."""
    renderer: Processor = _render_text
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer(ensure_ascii=True)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", key="time", utc=True),
            _add_fields,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            renderer,
        ],
    )


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Send all of the process's log records to stderr in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _add_fields(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """The `fields` of the record's `extra`, control characters escaped: logfmt itself escapes line feeds only."""
    fields = getattr(event["_record"], "fields", {})
    event.update({key: _escaped(value) if isinstance(value, str) else value for key, value in fields.items()})
    return event


def _render_text(logger: WrappedLogger, name: str, event: EventDict) -> str:
    """logfmt; a traceback stays as people know it, below the line."""
    trace = event.pop("exception", "")
    line = _logfmt(logger, name, event)
    return f"{line}\n{trace}" if trace else line


def _escaped(value: str) -> str:
    return value if value.isprintable() else value.encode("unicode_escape").decode("ascii")
