"""How long-running work on model files tells its caller where it is; the CLI draws a bar from it.

Called back by `sources.py` and its helpers; this floor knows no terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["wait", "download", "extract", "verify"]


@dataclass(frozen=True)
class Progress:
    """One report. wait: another process is fetching the same model. `total_bytes` is None where it is not known.

    `done_bytes` of a download is measured on disk and may fall a little short of the total.
    """

    stage: Stage
    done_bytes: int
    total_bytes: int | None


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """The callback of a caller that does not want to know."""
