"""Settings of data: generated scenes, and augmentation of training images. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ssdir.config.base import require, require_at_least, require_bounded


@dataclass(frozen=True)
class ScenesConfig:
    """Multi-scale scattered MNIST: how its scenes are sampled (supplementary material, "Datasets")."""

    side: int = 512
    """Width of a scene, and its height where none is given, in pixels."""
    grids: tuple[tuple[int, int], ...] = ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6))
    """Grids (rows, columns) of which each scene draws one."""
    digit_min: int = 96
    """Smallest side of a digit's 28x28 frame after resizing, in pixels."""
    digit_max: int = 384
    """Largest side of a digit's 28x28 frame after resizing, in pixels."""
    delta_position: float = 0.7
    """Range in which a digit's centre varies around its cell's centre, as a share of the cell's side."""
    theta_filled: float = 0.4
    """A cell counts as filled when a digit's box covers more than this share of its area."""
    n_train: int = 50_000
    """Training scenes (train digits only)."""
    n_val: int = 2_000
    """Validation scenes, for choosing anything (one half of the test digits of each class)."""
    n_test: int = 5_000
    """Test scenes, for reporting (the other half of the test digits)."""
    seed: int = 0
    """Every scene is a pure function of (seed, split, index)."""
    height: int | None = None
    """Height of a scene, in pixels; None: as wide as high."""

    def __post_init__(self) -> None:
        require_bounded(self, "scenes", side=16_384, digit_max=16_384, height=16_384)
        for name, pixels in (("side", self.side), ("height", self.size[1])):
            require(pixels >= 8, f"scenes.{name} is {pixels}; it must be at least 8 pixels")
        require(len(self.grids) > 0, "scenes.grids is empty; give at least one (rows, columns) pair")
        require(
            all(rows >= 1 and columns >= 1 for rows, columns in self.grids),
            f"scenes.grids is {self.grids}; rows and columns must be at least 1",
        )
        require(
            1 <= self.digit_min <= self.digit_max <= min(self.size),
            f"scenes.digit_min={self.digit_min}, digit_max={self.digit_max}, side={self.side}"
            + ("" if self.height is None else f", height={self.height}")
            + ": need 1 <= digit_min <= digit_max <= side"
            + ("" if self.height is None else " and height"),
        )
        require(0 <= self.delta_position <= 1, "scenes.delta_position must lie in [0, 1]")
        require(0 <= self.theta_filled <= 1, "scenes.theta_filled must lie in [0, 1]")
        require(self.seed >= 0, "scenes.seed must not be negative")
        require(min(self.n_train, self.n_val, self.n_test) >= 0, "numbers of scenes must not be negative")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, the paper's [s_x, s_y]."""
        return self.side, self.side if self.height is None else self.height


@dataclass(frozen=True)
class ClevrLikeConfig:
    """CLEVR-like scenes: how many, and how they are rendered."""

    width: int = 480
    """Width of the images in pixels; CLEVR's is 480."""
    height: int = 320
    """Height of the images in pixels; CLEVR's is 320."""
    samples: int = 24
    """Paths of light per pixel: time grows with them, noise falls."""
    n_train: int = 600
    """Training scenes."""
    n_val: int = 100
    """Validation scenes."""
    n_test: int = 100
    """Test scenes."""
    seed: int = 0
    """Every scene is a pure function of (seed, split, index)."""
    masks: bool = False
    """Write masks/{split}/NAME.png too: which object each pixel shows."""

    def __post_init__(self) -> None:
        require_bounded(self, "scenes")
        for name in ("width", "height"):
            side = getattr(self, name)
            require(16 <= side <= 4096, f"scenes.{name} is {side}; it must be 16 to 4096 pixels")
        require(
            0.5 <= self.height / self.width <= 2,
            f"scenes of {self.width} x {self.height} pixels are too narrow; no side may be over twice the other",
        )
        require(self.samples >= 2, f"scenes.samples is {self.samples}; it must be at least 2")
        require(self.seed >= 0, "scenes.seed must not be negative")
        require(min(self.n_train, self.n_val, self.n_test) >= 0, "numbers of scenes must not be negative")


@dataclass(frozen=True)
class AugmentationConfig:
    """How training images are varied before the detector sees them; by default not at all."""

    flip: float = 0.0
    """Probability that an image is mirrored, left and right."""
    colour: float = 0.0
    """Probability that an image's colours change, by all of the following four."""
    brightness: float = 0.2
    """Brightness is multiplied by 1 +- up to this."""
    contrast: float = 0.2
    """Contrast, around the image's mean luma, is multiplied by 1 +- up to this."""
    saturation: float = 0.2
    """Saturation is multiplied by 1 +- up to this."""
    hue: float = 0.02
    """Hues turn by up to this share of a full turn, either way."""
    zoom_out: float = 0.0
    """Probability that an image is laid on a larger canvas of its mean colour, somewhere."""
    zoom_out_max_side: float = 2.0
    """Largest side of that canvas, in sides of the image."""
    crop: float = 0.0
    """Probability that an image (or canvas) is cropped."""
    crop_min_side: float = 0.3
    """Smallest side of a crop as a share of the image's: the geometric mean of its shares of width and height."""
    crop_max_aspect: float = 2.0
    """Most that a crop stretches one axis against the other."""
    crop_min_iou: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    """One of these is sampled: IoU with the crop that some object must reach; in any case a centre stays inside."""

    def __post_init__(self) -> None:
        require_bounded(self, "augmentation")
        for name in ("flip", "colour", "brightness", "contrast", "saturation", "zoom_out", "crop"):
            require(
                0 <= getattr(self, name) <= 1,
                f"augmentation.{name} is {getattr(self, name)}; it must lie in [0, 1]",
            )
        require(0 <= self.hue <= 0.5, f"augmentation.hue is {self.hue}; it must lie in [0, 0.5]")
        require_at_least(self, "augmentation", 1, "zoom_out_max_side", "crop_max_aspect")
        require(
            0 < self.crop_min_side <= 1,
            f"augmentation.crop_min_side is {self.crop_min_side}; it must lie in (0, 1]",
        )
        require(
            len(self.crop_min_iou) > 0 and all(0 <= value < 1 for value in self.crop_min_iou),
            f"augmentation.crop_min_iou is {self.crop_min_iou}; list at least one IoU, each in [0, 1)",
        )

    @property
    def active(self) -> bool:
        """Whether anything is ever changed."""
        return max(self.flip, self.colour, self.zoom_out, self.crop) > 0
