"""The machine: its name, and what it can do at best (matrix products, copying), measured in the same run."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Row, compared
from benchmarks.timing import timed
from ssdir.common.machine import available_cores
from ssdir.training.start import computes_in_bf16


@dataclass(frozen=True)
class Limits:
    """What no program on this machine exceeds."""

    fp32: float
    """Floating point operations a second of a large matrix product in float32."""
    bf16: float
    """The same in bfloat16; 0 where the processor does not compute in it."""
    copy: float
    """Bytes a second, read and written, of a copy."""


def measure_limits(device: torch.device, repetitions: int) -> tuple[Limits, list[Row]]:
    """The limits, and their rows."""
    on_gpu = device.type == "cuda"
    side, copied = (8192, 2**30) if on_gpu else (2048, 2**28)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Any] = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "fp32" or computes_in_bf16("auto"):
            a, b = torch.randn(2, side, side, device=device).to(dtype).unbind(0)
            out = torch.empty_like(a)
            calls[name] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
    times = timed(calls, device, repetitions)
    # The fastest, not the median: a limit.
    best = {name: min(timing.samples) for name, timing in times.items()}
    flops = {name: 2 * side**3 / best[name] if name in best else 0.0 for name in ("fp32", "bf16")}
    shapes = {"side": side}
    rows = [
        compared(f"matrix product in {name}", rate / 1e9, None, shapes, units="GFLOP/s")
        for name, rate in flops.items()
        if rate
    ]
    limits = Limits(flops["fp32"], flops["bf16"], 2 * copied / best["copy"])
    rows.append(compared("copy", limits.copy / 1e9, None, {"bytes": copied}, units="GB/s"))
    return limits, rows


def machine_name(device: torch.device) -> str:
    """A readable file name: processor (or GPU), what it computes bf16 with, cores.

    >>> re.fullmatch(r"[a-z0-9-]+", machine_name(torch.device("cpu"))) is not None
    True
    """
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    # bf16 by whichever unit: it decides what a training step costs.
    flags = _cpuinfo("flags").split()
    unit = "amx" if "amx_bf16" in flags else "bf16" if computes_in_bf16("auto") else ""
    return _slug(f"{processor()} {unit} {available_cores()}cores")


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """The first entry of that name in Linux's /proc/cpuinfo, else nothing."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _slug(text: str) -> str:
    """
    >>> _slug("Intel(R) Xeon(R) Processor amx 2cores")
    'intel-xeon-amx-2cores'
    """
    text = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b|@.*?ghz", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def where(device: torch.device) -> dict[str, Any]:
    """Where and when rows are measured: a part of every row."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }


def commit() -> str:
    """The commit of this working tree, with a + where tracked files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
        return run.stdout.strip()

    # What a run itself writes does not count.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../src", "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
