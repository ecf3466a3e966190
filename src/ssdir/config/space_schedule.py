"""SPACE's schedules: values that change during training, as pure functions of the step; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssdir.common.errors import ConfigError


@dataclass(frozen=True)
class LinearRamp:
    """A number that goes in a straight line from ``start`` to ``end``, and is constant before and after.

    >>> ramp = LinearRamp(0.1, 0.01, 4_000, 10_000)
    >>> [round(ramp.at(step), 3) for step in (0, 4_000, 7_000, 10_000, 50_000, None)]
    [0.1, 0.1, 0.055, 0.01, 0.01, 0.01]
    """

    start: float
    """Value up to the step ``first``."""
    end: float
    """Value from the step ``last`` on."""
    first: int = 0
    """Step at which it begins to change."""
    last: int = 0
    """Step at which it has arrived."""

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ConfigError(f"a ramp from step {self.first} to {self.last}: need 0 <= first <= last")

    @classmethod
    def constant(cls, value: float) -> LinearRamp:
        """The same value at every step."""
        return cls(value, value)

    def at(self, step: int | None) -> float:
        """The value at a step (0 is the first); None: the end."""
        if step is None or step >= self.last:
            return self.end
        if step <= self.first:
            return self.start
        share = (step - self.first) / (self.last - self.first)
        return self.start + (self.end - self.start) * share

    @property
    def ends(self) -> tuple[float, float]:
        """Both values."""
        return self.start, self.end


@dataclass(frozen=True)
class Annealed:
    """The schedules' values at one step."""

    presence_prior: float
    """Probability that a cell holds an object, a priori."""
    scale_mean: float
    """Prior mean of the logit of a box's sides."""
    temperature: float
    """Temperature of the relaxed presence."""
    boundary: bool
    """Whether the boundary loss is on."""
    fixed_alpha: float | None
    """What stands in for the foreground's alpha in the likelihood; None: nothing."""
    background_only: bool
    """Whether the background learns alone."""


@dataclass(frozen=True)
class SpaceSchedule:
    """Ramps and switches of SPACE's training; defaults are the authors' for the 3D rooms."""

    presence_prior: LinearRamp = field(default_factory=lambda: LinearRamp(0.1, 0.01, 4_000, 10_000))
    """Prior probability of presence."""
    scale_mean: LinearRamp = field(default_factory=lambda: LinearRamp(-1.0, -2.0, 10_000, 20_000))
    """Prior mean of the logit of a box's sides: -1 is 0.27 of the image."""
    temperature: LinearRamp = field(default_factory=lambda: LinearRamp(2.5, 0.5, 0, 20_000))
    """Temperature of the relaxed presence."""
    boundary_until: int | None = 100_000
    """The boundary loss is on before this step; 0: never; None: always."""
    fix_alpha_steps: int = 0
    """Before this step the foreground's alpha is a constant in the likelihood: both branches learn before one wins."""
    fix_alpha: float = 0.1
    """That constant."""
    background_only_steps: int = 0
    """Before this step the background learns alone (as in G-SWM; 0 in SPACE)."""

    def __post_init__(self) -> None:
        for name, ramp, low, high in (
            ("presence_prior", self.presence_prior, 0.0, 1.0),
            ("temperature", self.temperature, 0.0, float("inf")),
        ):
            if not all(low < value < high for value in ramp.ends):
                raise ConfigError(
                    f"model.schedule.{name} goes from {ramp.start} to {ramp.end}; "
                    f"it must stay inside ({low:g}, {high:g})"
                )
        if not all(abs(value) <= 20 for value in self.scale_mean.ends):
            raise ConfigError(
                "model.schedule.scale_mean is the logit of a share of the image; give -20 to 20"
            )
        if not 0 < self.fix_alpha < 1:
            raise ConfigError(f"model.schedule.fix_alpha is {self.fix_alpha}; it must lie inside (0, 1)")
        for name in ("boundary_until", "fix_alpha_steps", "background_only_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"model.schedule.{name} is {getattr(self, name)}; it must not be negative")

    def at(self, step: int | None) -> Annealed:
        """All values at a step (0 is the first); None: fully annealed."""
        return Annealed(
            presence_prior=self.presence_prior.at(step),
            scale_mean=self.scale_mean.at(step),
            temperature=self.temperature.at(step),
            boundary=self.boundary_until is None or (step is not None and step < self.boundary_until),
            fixed_alpha=self.fix_alpha if step is not None and step < self.fix_alpha_steps else None,
            background_only=step is not None and step < self.background_only_steps,
        )
