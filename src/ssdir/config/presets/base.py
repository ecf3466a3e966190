"""The type of a baseline's preset; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from ssdir.config import TrainingConfig


@runtime_checkable
class BaselineRun(Protocol):
    """All that decides a baseline's training: a frozen dataclass with these two sections."""

    @property
    def model(self) -> Any: ...

    @property
    def training(self) -> TrainingConfig: ...


R_co = TypeVar("R_co", bound=BaselineRun, covariant=True)


@dataclass(frozen=True)
class BaselinePreset(Generic[R_co]):
    """Settings that belong together, and a line that says what for."""

    help: str
    """One line: data, image side, where the settings come from."""
    run: R_co
