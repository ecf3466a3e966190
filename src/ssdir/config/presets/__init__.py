"""Named settings that belong together: of scenes, of detector and SSDIR, and of each baseline."""

from ssdir.config.presets.base import BaselinePreset, BaselineRun
from ssdir.config.presets.crop_vae import CROP_VAE_PRESETS
from ssdir.config.presets.scenes import named_scenes, scenes_presets
from ssdir.config.presets.slot_attention import SLOT_ATTENTION_PRESETS
from ssdir.config.presets.space import SPACE_PRESETS
from ssdir.config.presets.spair import SPAIR_PRESETS
from ssdir.config.presets.ssdir import PRESETS, Preset, laptop_first, preset, who_trains

__all__ = [
    "CROP_VAE_PRESETS",
    "PRESETS",
    "SLOT_ATTENTION_PRESETS",
    "SPACE_PRESETS",
    "SPAIR_PRESETS",
    "BaselinePreset",
    "BaselineRun",
    "Preset",
    "laptop_first",
    "named_scenes",
    "preset",
    "scenes_presets",
    "who_trains",
]
