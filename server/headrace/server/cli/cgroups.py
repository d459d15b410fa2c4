"""The limits that this process's control groups set: version 2, version 1, and hosts that mix them. For `hardware`.

A process is in one group per hierarchy and bound by the groups around it too. In a container the paths of
/proc/self/cgroup may be the host's, of which only the end, or nothing, is mounted: what does not exist limits nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as the largest number of whole pages


def cpu_limit(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> float | None:
    """CPUs' worth of time that this process may use; None: no limit."""
    limits = []
    for folder in _folders("cpu", membership, mount):
        with suppress(OSError, ValueError):
            quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
            if quota != "max":
                limits.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                limits.append(quota_us / int((folder / "cpu.cfs_period_us").read_text()))
    return min(limits, default=None)


def memory_limit(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> int | None:
    """Bytes that this process and its neighbours in the group may use; None: no limit."""
    limits = []
    for folder in _folders("memory", membership, mount):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max"
                limits.append(int((folder / name).read_text()))
    return min((limit for limit in limits if limit < _UNLIMITED_BYTES), default=None)


def _folders(controller: str, membership: Path, mount: Path) -> Iterator[Path]:
    """Where the files of a controller lie for this process: its groups and all around them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = ["0::/", f"1:{controller}:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            roots = [mount / controller, mount / controllers]
        else:
            continue
        for root in roots:
            here = root / path.lstrip("/")
            for folder in (here, *here.parents):
                yield folder
                if folder == root:
                    break
