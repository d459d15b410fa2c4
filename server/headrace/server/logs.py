"""Log lines for people ("text") or for collectors ("json": one object per line). Set up once, by the CLI.

Request lines come from `rpc.py` with their fields in `extra`; a caller's label is escaped, so that it cannot forge a
line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal


class TextFormatter(logging.Formatter):
    """2026-11-24 06:31:11.123 INFO headrace.request request method=... status=OK ..."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        line = super().formatMessage(record)
        if fields:
            line += "".join(f" {key}={_text_value(value)}" for key, value in fields.items())
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(log_format: Literal["text", "json"], level: int = logging.INFO) -> None:
    """Send all of the process's log records to stderr in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _text_value(value: object) -> str:
    text = str(value)
    return text if text.isalnum() or text.replace(".", "", 1).isalnum() else json.dumps(text)
