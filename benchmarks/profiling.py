"""Where the time of a training step goes, operator by operator."""

from __future__ import annotations

import os
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.inputs import Setup
from benchmarks.machine import Limits
from benchmarks.results import Row, share
from benchmarks.training import FP32_CHANNELS_LAST, Step, detector_step, ssdir_step

_SHOWN = 8
"""Operators of a step that get a row; the others share one."""


def profiles(setup: Setup, limits: Limits) -> list[Row]:
    """The operators in which both trainings spend most time, without what they call."""
    return [
        *_profile(setup, "SSDIR", ssdir_step(setup, FP32_CHANNELS_LAST, setup.objects)),
        *_profile(setup, "detector", detector_step(setup, FP32_CHANNELS_LAST, setup.batch)),
    ]


def _profile(setup: Setup, name: str, step: Step) -> list[Row]:
    step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its start and stop are no news
    on_gpu = setup.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        step()

    def seconds(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    # A GPU's kernels are listed too, but their time is that of the operators which started them.
    operators = [event for event in recorded.key_averages() if event.device_type == DeviceType.CPU]
    events = sorted(operators, key=seconds, reverse=True)
    total = sum(map(seconds, events))
    spent = {event.key: seconds(event) for event in events[:_SHOWN]}
    spent["all others"] = total - sum(spent.values())
    return [
        share(f"profile of {name} training: {key}", value, total, setup.shapes())
        for key, value in spent.items()
    ]
