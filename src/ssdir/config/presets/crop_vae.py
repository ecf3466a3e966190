"""Presets of the crop VAE; imports no torch."""

from __future__ import annotations

from dataclasses import replace

from ssdir.config.crop_vae import CropVAEConfig, CropVAERun
from ssdir.config.presets.base import BaselinePreset
from ssdir.config.presets.ssdir import PRESETS
from ssdir.config.training import TrainingConfig


def _matched(name: str, crops: int | None = None) -> CropVAEConfig:
    """z_what and decoder of SSDIR's preset of that name, and its detector's images."""
    under, model = PRESETS[name].detector.detector, PRESETS[name].ssdir.model
    return CropVAEConfig(
        image_size=under.image_size,
        z_what_size=model.z_what_size,
        decoder_channels=model.decoder_channels,
        decoder_norm=model.decoder_norm,
        sigma_what=model.sigma_what,
        crops=crops,
    )


_FULL = TrainingConfig(
    steps=100_000,
    batch_size=32,
    learning_rate=0.0005,
    warmup_steps=500,
    precision="auto",
    channels_last=True,
    feature_cache="disk",
    validate_every=5_000,
    checkpoint_every=2_000,
)
"""As SSDIR's presets; the cache keeps boxes and scores alone, 18 kB an image."""

CROP_VAE_PRESETS: dict[str, BaselinePreset[CropVAERun]] = {
    "mnist": BaselinePreset(
        help="z_what and decoder of the paper's MNIST column, 300 px; wants a GPU",
        run=CropVAERun(model=_matched("mnist", crops=512), training=_FULL),
    ),
    "clevr": BaselinePreset(
        help="z_what and decoder of the paper's CLEVR column, 300 px; wants a GPU",
        run=CropVAERun(model=_matched("clevr", crops=512), training=_FULL),
    ),
    "wider": BaselinePreset(
        help="z_what and decoder of the paper's WIDER column, 300 px; wants a GPU",
        run=CropVAERun(model=_matched("wider", crops=512), training=_FULL),
    ),
    "quickstart": BaselinePreset(
        help="z_what and decoder of the quickstart, 128 px, for a CPU",
        run=CropVAERun(
            model=_matched("quickstart"),
            training=replace(
                _FULL,
                steps=900,
                batch_size=32,
                learning_rate=0.003,
                schedule="one_cycle",
                warmup_steps=90,
                validate_every=0,
                checkpoint_every=300,
                log_every=50,
            ),
        ),
    ),
}
"""By the name of SSDIR's preset whose z_what and decoder they have; only the encoder and the loss differ."""
