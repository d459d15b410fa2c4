"""The bar that is shown while a model is fetched or loaded; a line per stage where standard error is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.server.cli import output

if TYPE_CHECKING:
    from headrace.models.progress import Progress
    from rich.progress import Progress as Bar

_STAGES = {
    "wait": "waiting for another process that fetches it",
    "download": "downloading",
    "extract": "unpacking",
    "verify": "checking SHA-256",
    "load": "loading",
}


def fetch_model(spec: str) -> Path:
    """The file or directory of a model, fetched and checked if need be, with a bar. Raises ModelError."""
    from headrace.models.sources import resolve

    with model_bar() as bar:
        return resolve(spec, bar.report)


@contextmanager
def model_bar() -> Iterator[ModelBar]:
    """A bar on standard error that is gone when the work is done."""
    err = output.notes()
    if not err.is_terminal:
        yield ModelBar(None)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        yield ModelBar(bar)


class ModelBar:
    """Follows reports of headrace.models and of a server that loads."""

    def __init__(self, bar: Bar | None) -> None:
        self._bar = bar
        self._stage = ""

    def report(self, progress: Progress) -> None:
        """Shows one report; a new stage begins a new bar."""
        self.show(progress.stage, progress.done_bytes, progress.total_bytes)

    def show(self, stage: str, done: float, total: float | None) -> None:
        """Shows how far a stage is; `total` None where nobody knows."""
        if self._bar is None:
            # A log is told of what takes long; a check of a cached file does not.
            if stage != self._stage and stage in ("wait", "download"):
                output.notes().print(f"{_STAGES[stage]} ...")
            self._stage = stage
            return
        if stage != self._stage:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(_STAGES.get(stage, stage), total=total)
            self._stage = stage
        self._bar.update(self._bar.task_ids[-1], completed=done, total=total)
