"""Learning one vector per object of an image: SSDIR (Zieliński and Kajdanowicz, ICCS 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdir.detector.ssd import Detector
    from ssdir.model.latents import Objects
    from ssdir.model.ssdir import SSDIR

    __version__: str

__all__ = ["SSDIR", "Detector", "Objects"]


def __getattr__(name: str) -> Any:
    # The names need torch; importing them only when they are used keeps `ssdir --help` quick.
    if name == "SSDIR":
        from ssdir.model.ssdir import SSDIR

        return SSDIR
    if name == "Detector":
        from ssdir.detector.ssd import Detector

        return Detector
    if name == "Objects":
        from ssdir.model.latents import Objects

        return Objects
    if name == "__version__":
        import importlib.metadata

        try:
            return importlib.metadata.version("ssdir")
        except importlib.metadata.PackageNotFoundError:  # run from its source folder, not installed
            return "unknown"
    raise AttributeError(f"module 'ssdir' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
