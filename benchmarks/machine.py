"""What a figure was measured on: printed beside every table of the benchmarks.

python benchmarks/machine.py
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch


def machine() -> str:
    """The machine and the versions, in one line."""
    parts = [f"{_processor()}, {_cores()} cores", f"{_memory_gib():.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("slimgraph", "torch", "transformers")]
    return ", ".join([*parts, platform.system(), *versions, f"Python {platform.python_version()}"])


def footer() -> str:
    """Lines to put under a table: the command, the machine, and how busy it was."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    load = os.getloadavg()[0]
    return (
        f"Made by `{command}` with {torch.get_num_threads()} threads on {machine()}. Load of the machine over the last "
        f"minute, this program included: {load:.1f}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2**30


if __name__ == "__main__":
    print(machine())
