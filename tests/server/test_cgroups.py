"""Limits of control groups, read from trees of files as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace.server.cli import cgroups


def tree(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc/self/cgroup and a mount with these files."""
    (root / "membership").write_text(membership)
    mount = root / "mount"
    mount.mkdir()
    for name, content in files.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root / "membership", mount


@pytest.mark.parametrize(
    ("membership", "files", "cpus", "memory"),
    [
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ("0::/\n", {"cpu.max": "250000 100000", "memory.max": "1073741824"}, 2.5, 1 << 30),
        # the group around it is the tighter one
        (
            "0::/pod/main\n",
            {"pod/cpu.max": "100000 100000", "pod/main/cpu.max": "max 100000", "pod/memory.max": "4096"},
            1.0,
            4096,
        ),
        (
            "4:memory:/docker/a\n1:cpu,cpuacct:/docker/a\n",
            {
                "cpu,cpuacct/docker/a/cpu.cfs_quota_us": "150000",
                "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000",
                "memory/docker/a/memory.limit_in_bytes": "536870912",
            },
            1.5,
            1 << 29,
        ),
        # no limit, as version 1 says it
        (
            "4:memory:/\n1:cpu:/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
            None,
        ),
        # the path is the host's, the container sees its own group as the root
        ("1:cpu:/kubepods/x\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5, None),
        # mixed: version 2 beside version 1
        ("1:cpu:/\n0::/x\n", {"unified/x/memory.max": "8192", "cpu/cpu.cfs_quota_us": "-1"}, None, 8192),
        ("", {}, None, None),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, membership: str, files: dict[str, str], cpus: float | None, memory: int | None
) -> None:
    paths = tree(tmp_path, membership, files)
    assert cgroups.cpu_limit(*paths) == cpus
    assert cgroups.memory_limit(*paths) == memory
