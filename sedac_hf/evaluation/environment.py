"""What a result was obtained with: software and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sedac_hf import __version__

__all__ = ["commit", "machine", "software_versions"]

_ROOT = Path(__file__).resolve().parents[2]


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), "sedac_hf": __version__, **packages}


def machine() -> dict[str, Any]:
    """Processor, threads and accelerator; no names of hosts, users or folders."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def commit() -> str | None:
    """The commit that this package is at, with `-dirty` behind it where files were changed.

    Returns:
        None where the package does not run from its own repository.
    """
    here = Path(__file__).relative_to(_ROOT).as_posix()
    if _git("ls-files", here) != here:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{_git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"


def _git(*arguments: str) -> str | None:
    """What git says in the folder of the package; None where it says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()
