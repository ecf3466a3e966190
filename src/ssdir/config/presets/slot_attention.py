"""Presets of Slot Attention; imports no torch."""

from __future__ import annotations

from dataclasses import replace

from ssdir.config.presets.base import BaselinePreset
from ssdir.config.slot_attention import SlotAttentionConfig, SlotAttentionRun
from ssdir.config.training import TrainingConfig

_PAPER = TrainingConfig(
    steps=500_000,
    batch_size=64,
    learning_rate=0.0004,
    schedule="halving",
    half_life=100_000,
    warmup_steps=10_000,
    clip_norm=1.0,
    validate_every=10_000,
    checkpoint_every=5_000,
    log_every=100,
)
"""The paper's, and gradients clipped at norm 1, which is not."""
_FULL = replace(_PAPER, precision="auto", channels_last=True)
_OCL = SlotAttentionConfig(encoder_strides=(1, 2, 2, 1))

SLOT_ATTENTION_PRESETS: dict[str, BaselinePreset[SlotAttentionRun]] = {
    "paper": BaselinePreset(
        help="the paper's settings for CLEVR with up to 10 objects, 128 px; wants a GPU",
        run=SlotAttentionRun(training=_PAPER),
    ),
    "clevr": BaselinePreset(
        help="the same with object-centric-library's strides and batch, 128 px; wants a GPU",
        run=SlotAttentionRun(model=_OCL, training=replace(_FULL, batch_size=32)),
    ),
    "mnist": BaselinePreset(
        help="multi-scale MNIST at 128 px, 25 slots; wants a GPU",
        run=SlotAttentionRun(model=replace(_OCL, n_slots=25), training=replace(_FULL, batch_size=32)),
    ),
    "quickstart": BaselinePreset(
        help="the quickstart's scenes on a CPU, 128 px: 17 slots, half the channels, pixels rendered in blocks",
        run=SlotAttentionRun(
            model=SlotAttentionConfig(
                n_slots=17,
                width=32,
                encoder_strides=(2, 2, 1, 1),
                decoder_strides=(2, 2),
                block=4,
                patch_size=32,
            ),
            training=TrainingConfig(
                steps=1_500,
                batch_size=12,
                learning_rate=0.0004,
                schedule="one_cycle",
                warmup_steps=150,
                clip_norm=1.0,
                precision="auto",
                validate_every=0,
                checkpoint_every=300,
                log_every=50,
            ),
        ),
    ),
}
"""By name. Scenes of multi-scale MNIST hold 13 digits on average and up to 36: 24 objects and a background cover 86 %
of the scenes, the quickstart's 16 and a background 68 %; more slots cost in proportion."""
