"""Presets of SPAIR; imports no torch."""

from __future__ import annotations

from dataclasses import replace

from ssdir.config.presets.base import BaselinePreset
from ssdir.config.spair import SPAIRConfig, SPAIRRun
from ssdir.config.training import TrainingConfig

# What the authors of SSDIR ran, as far as it is recorded: their fork of a PyTorch port, at its defaults. Its defects
# (a cross-entropy summed over the batch, a noisy presence in the count prior, a count that is always 1) are not here.
_PUBLISHED = SPAIRConfig(
    lateral=False,
    size_range=5.0,
    size_mean=3.0,
    alpha_bias=5.0,
    count_decay=1_000,
)
_PUBLISHED_TRAINING = TrainingConfig(
    steps=10_000,
    batch_size=32,
    learning_rate=1e-4,
    clip_norm=None,
    validate_every=2_000,
    checkpoint_every=1_000,
)
# A wide prior of sizes around 48 of 128 pixels. The frames of digits have 24 to 96; nine tenths of the sides of their
# tight boxes lie between 10 and 34 pixels, within two standard deviations.
_MNIST = SPAIRConfig(
    cell=16,
    trunk="large",
    z_what_size=64,
    anchor=128.0,
    size_mean=-0.51,
    size_std=1.0,
    alpha_scale=1.0,
    background="solid",
)
_CLEVR = SPAIRConfig(
    cell=16,
    trunk="large",
    z_what_size=64,
    patch_networks="conv",
    anchor=96.0,
    size_mean=-1.1,
    size_std=0.7,
    rgb_scale=1.0,
    alpha_scale=1.0,
    background="vae",
    likelihood="normal",
)
# Of the sides of WIDER's faces, as shares of the image, the mean logit is -1.74 and the standard deviation 0.98 (median
# 17 of 128 pixels, 95 % below 66). A photograph behind them takes more than one latent.
_WIDER = replace(_CLEVR, anchor=128.0, size_mean=-1.74, size_std=1.0, background_size=32)
_LONG = TrainingConfig(
    steps=100_000,
    batch_size=32,
    learning_rate=1e-4,
    clip_norm=1.0,
    precision="auto",
    validate_every=5_000,
    checkpoint_every=2_000,
)
_QUICKSTART = replace(_MNIST, background="black", count_decay=100, wheels_steps=50)

SPAIR_PRESETS: dict[str, BaselinePreset[SPAIRRun]] = {
    "published": BaselinePreset(
        "128 px, 11x11 cells, no lateral context, boxes of 229 px expected: as SSDIR's authors ran it; wants a GPU",
        SPAIRRun(_PUBLISHED, _PUBLISHED_TRAINING),
    ),
    "published-sequential": BaselinePreset(
        "the same with lateral context, SPAIR proper; wants a GPU",
        SPAIRRun(replace(_PUBLISHED, lateral=True), _PUBLISHED_TRAINING),
    ),
    "mnist": BaselinePreset(
        "multi-scale MNIST at 128 px, 8x8 cells, a wide prior of sizes, a learned colour behind them; wants a GPU",
        SPAIRRun(_MNIST, _LONG),
    ),
    "clevr": BaselinePreset(
        "CLEVR at 128 px, 8x8 cells, convolutional patches, a background VAE, normal likelihood; wants a GPU",
        SPAIRRun(_CLEVR, replace(_LONG, steps=150_000, batch_size=64)),
    ),
    "wider": BaselinePreset(
        "WIDER FACE at 128 px, 8x8 cells, CLEVR's networks, a prior of faces' sizes, a larger background VAE; ours; "
        "wants a GPU",
        SPAIRRun(_WIDER, replace(_LONG, steps=150_000, batch_size=64)),
    ),
    "quickstart": BaselinePreset(
        "128 px scenes on a CPU: 8x8 cells, a wide prior of sizes, black background, fast schedules",
        SPAIRRun(
            _QUICKSTART,
            TrainingConfig(
                steps=2_000,
                batch_size=16,
                learning_rate=1e-3,
                clip_norm=None,
                validate_every=0,
                checkpoint_every=500,
            ),
        ),
    ),
}
