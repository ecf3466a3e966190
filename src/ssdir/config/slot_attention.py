"""Settings of the Slot Attention autoencoder; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ssdir.config import (
    TrainingConfig,
    require,
    require_at_least,
    require_bounded,
)


@dataclass(frozen=True)
class SlotAttentionConfig:
    """Slot Attention autoencoder (Locatello et al., arXiv:2006.15055)."""

    image_size: int = 128
    """Side of the images in pixels: a multiple of the products of encoder_strides and of decoder_strides (times
    block)."""
    n_slots: int = 11
    """Slots, that of the background included (K): one more than the objects of the fullest image, where that is
    affordable."""
    slot_size: int = 64
    """Size of a slot, which is z_what."""
    n_iterations: int = 3
    """Rounds of attention."""
    width: int = 64
    """Channels of the encoder and the decoder."""
    hidden: int = 128
    """Hidden units of the slots' residual network."""
    encoder_strides: tuple[int, ...] = (1, 1, 1, 1)
    """Strides of the encoder's convolutions: the paper's; (1, 2, 2, 1), as in object-centric-library, gives a 16th of
    the tokens."""
    decoder_strides: tuple[int, ...] = (2, 2, 2, 2, 1)
    """Strides of the decoder's transposed convolutions (the paper's); what they leave of the image's side is the grid
    that a slot is broadcast to, 8 x 8 at 128 pixels."""
    block: int = 1
    """Side of the block of pixels that the decoder's last convolution renders at each of its positions: 1 in the
    paper."""
    patch_size: int = 64
    """Side of the patches that objects are given, in pixels."""
    min_area: float = 0.001
    """A slot whose mask wins no more than this share of the image is no object."""
    evaluation_seed: int = 0
    """Seed of the noise that slots start from in evaluation, the same in every image."""

    def __post_init__(self) -> None:
        require_bounded(self, "model")
        require_at_least(
            self, "model", 1,
            "image_size", "n_slots", "slot_size", "n_iterations", "width", "hidden", "block", "patch_size",
        )  # fmt: skip
        require(self.n_slots >= 2, f"model.n_slots is {self.n_slots}; one object and a background take 2")
        require_at_least(self, "model", 0, "evaluation_seed")
        for name in ("encoder_strides", "decoder_strides"):
            strides = getattr(self, name)
            require(
                len(strides) >= 1 and set(strides) <= {1, 2},
                f"model.{name} is {list(strides)}; list at least one stride, each 1 or 2",
            )
        step = math.lcm(math.prod(self.encoder_strides), math.prod(self.decoder_strides) * self.block)
        below = self.image_size // step * step
        require(
            self.image_size == below,
            f"model.image_size is {self.image_size}; with these encoder_strides, decoder_strides and block it must be "
            f"a multiple of {step}, such as {' or '.join(str(side) for side in (below, below + step) if side)}",
        )
        require(
            0 <= self.min_area < 1,
            f"model.min_area is {self.min_area}; it is a share of the image, in [0, 1)",
        )

    @property
    def token_side(self) -> int:
        """Side of the grid of tokens that slots attend to."""
        return self.image_size // math.prod(self.encoder_strides)

    @property
    def broadcast_side(self) -> int:
        """Side of the grid that a slot is broadcast to."""
        return self.image_size // (math.prod(self.decoder_strides) * self.block)


@dataclass(frozen=True)
class SlotAttentionRun:
    """All that decides the training of a Slot Attention autoencoder."""

    model: SlotAttentionConfig = field(default_factory=SlotAttentionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
