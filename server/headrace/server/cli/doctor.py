"""`headrace doctor`: what this machine has, what a server would use of it, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.server.cli import options, output

if TYPE_CHECKING:
    from headrace.models.sources import KnownModel
    from headrace.server.cli.hardware import Backend, Machine
    from rich.console import RenderableType


def doctor(as_json: options.Json = False) -> None:
    """Show the hardware, the threads and back end that a server would choose and why, the model cache, versions."""
    from headrace.models.sources import cache_root, list_models
    from headrace.server.cli import hardware

    machine = hardware.detect_machine()
    backends = hardware.detect_backends(machine)
    threads = hardware.choose_threads(machine)
    versions = hardware.versions()
    cached = [model for model in list_models() if model.path is not None]
    if as_json:
        output.print_json(
            {
                "machine": machine,
                "threads": {"chosen": threads.count, "why": threads.why},
                "backends": backends,
                "cache": {
                    "path": str(cache_root()),
                    "models": [{"spec": m.spec, "path": str(m.path), "bytes": m.nbytes} for m in cached],
                },
                "versions": versions,
            }
        )
    else:
        console = output.console()
        for title, body in (
            ("machine", _machine_table(machine, f"{threads.count} ({threads.why})")),
            ("back ends", _backend_table(backends)),
            ("model cache", _cache_table(str(cache_root()), cached)),
            ("versions", "  ".join(f"{name} {version}" for name, version in versions.items())),
        ):
            console.print(f"[bold]{title}[/]")
            console.print(body)
            console.print()
    if not any(backend.is_chosen for backend in backends):
        raise output.CommandError("no back end can run here; see above for what to install")


def _rows(rows: list[tuple[str, ...]]) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _machine_table(machine: Machine, threads: str) -> RenderableType:
    limit = f", limited to {machine.cpu_limit:g} CPUs" if machine.cpu_limit is not None else ""
    memory_limit = f", limited to {output.bytes_text(machine.memory_limit)}" if machine.memory_limit else ""
    memory = f"{output.bytes_text(machine.memory)}, {output.bytes_text(machine.memory_available)} available"
    return _rows(
        [
            ("system", machine.system),
            ("CPU", machine.cpu),
            ("cores", f"{machine.physical_cores} physical, {machine.logical_cores} logical{limit}"),
            ("NUMA nodes", str(machine.numa_nodes)),
            ("instructions", " ".join(machine.simd) or "none of those that matter"),
            ("memory", memory + memory_limit),
            ("GPU", "; ".join(machine.gpus) or "none that can be used"),
            ("threads", threads),
        ]
    )


def _backend_table(backends: list[Backend]) -> RenderableType:
    def state(backend: Backend) -> str:
        return "chosen" if backend.is_chosen else "available" if backend.is_available else "not available"

    return _rows([(backend.name, state(backend), backend.why) for backend in backends])


def _cache_table(root: str, cached: list[KnownModel]) -> RenderableType:
    rows = [(root, "" if cached else "empty: headrace pull fetches the default model")]
    return _rows([*rows, *((model.spec, output.bytes_text(model.nbytes)) for model in cached)])
