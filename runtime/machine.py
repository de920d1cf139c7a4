"""What this process may use of the machine, and a fingerprint that measurements are filed under."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores that this process may compute on: its affinity, without hyper-threads, within its cgroup quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_siblings(processor) for processor in allowed}
    quota = cgroup_cores()
    return max(1, len(siblings) if quota is None else min(len(siblings), int(quota)))


def cgroup_cores(root: Path = CGROUP) -> float | None:
    """The cgroup's CPU quota in cores (version 2's ``cpu.max``, version 1's ``cfs_quota_us``), or ``None``."""
    unified = _read(root / "cpu.max").split()
    if len(unified) == 2:
        return None if unified[0] == "max" else float(unified[0]) / float(unified[1])
    quota, period = _read(root / "cpu/cpu.cfs_quota_us"), _read(root / "cpu/cpu.cfs_period_us")
    return float(quota) / float(period) if quota and period and float(quota) > 0 else None


def memory_limit(root: Path = CGROUP) -> int | None:
    """Bytes of memory that this process may use: the smaller of the machine's and the cgroup's, or ``None``."""
    names = ("memory.max", "memory/memory.limit_in_bytes")
    limits = [int(text) for text in (_read(root / name) for name in names) if text.isdigit()]
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    return min(limits, default=None)


def machine() -> dict[str, str]:
    """What decides how fast a network runs here: processor, its instruction sets, cores, memory, operating system."""
    features = sorted(_cpuinfo("flags", "Features").split())
    return {
        "processor": _cpuinfo("model name", "Model") or _device_tree() or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instruction_sets": hashlib.sha256(" ".join(features).encode()).hexdigest()[:12],
        "cores": str(usable_cores()),
        "memory_gib": str(round((memory_limit() or 0) / 2**30)),
        "system": platform.system(),
    }


def machine_fingerprint() -> str:
    """Sixteen hex digits that are equal on machines where a latency measured on one holds on the other."""
    text = "\n".join(f"{name}={value}" for name, value in sorted(machine().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _siblings(processor: int) -> str:
    """The hyper-threads of a processor's core, as the kernel lists them; itself where it does not."""
    path = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    return _read(path) or str(processor)


def _cpuinfo(*fields: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            return value.strip()
    return ""


def _device_tree() -> str:
    """The board's name on arm64, such as "NVIDIA Jetson Orin Nano"."""
    return _read(Path("/proc/device-tree/model")).strip("\0")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
