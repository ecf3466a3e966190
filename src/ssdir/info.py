"""What a bug report needs, and what a preset's networks are made of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssdir.config import PRESETS, preset

if TYPE_CHECKING:
    from torch import nn

PACKAGES = (
    "ssdir", "torch", "numpy", "pillow", "safetensors", "tyro", "rich", "accelerate", "jaxtyping",
    "scikit-learn", "faster-coco-eval", "matplotlib", "tensorboard", "wandb",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer of a network as it stands in the model."""

    name: str
    kind: str
    output: tuple[int, ...]
    """Shape of the output for one image (what decoder: for one object)."""
    parameters: int


def environment() -> dict[str, Any]:
    """Versions, processor and devices of this machine."""
    import torch

    from ssdir.train import computes_in_bf16

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "bf16": computes_in_bf16("auto"),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "presets": sorted(PRESETS),
    }


def print_environment(as_json: bool = False) -> None:
    """Print :func:`environment`, as text or as JSON."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, version in value.items():
                print(f"  {name:18} {version or 'not installed'}")
        else:
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            print(f"{key + ':':20} {shown}")


def describe_preset(name: str) -> list[Layer]:
    """Every layer of a preset's SSDIR with its output shape and number of parameters.

    A cloned backbone is listed once, under the detector: it has the same layers.

    Raises:
        ConfigError: there is no such preset.
    """
    import torch

    from ssdir.detector.ssd import Detector
    from ssdir.model.ssdir import SSDIR

    chosen = preset(name)
    detector_config = chosen.detector.detector
    model = SSDIR(Detector(detector_config), chosen.ssdir.model).eval()
    layers: list[Layer] = []

    def record(layer_name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            layers.append(Layer(layer_name, type(module).__name__, tuple(output.shape[1:]), own))

        return hook

    handles = [
        module.register_forward_hook(record(layer_name))
        for layer_name, module in model.named_modules()
        if not list(module.children()) and not layer_name.startswith("backbone.")
    ]
    side = detector_config.image_size
    with torch.inference_mode():
        model.encode(torch.zeros(1, 3, side, side))
        model.decoder(torch.zeros(1, chosen.ssdir.model.z_what_size))
    for handle in handles:
        handle.remove()
    return layers


def print_preset(name: str, as_json: bool = False) -> None:
    """Print :func:`describe_preset`, as a table or as JSON."""
    layers = describe_preset(name)
    if as_json:
        print(json.dumps([vars(layer) for layer in layers], indent=2))
        return
    for layer in layers:
        shape = " x ".join(map(str, layer.output))
        print(f"{layer.name:40} {layer.kind:18} {shape:>18} {layer.parameters:>12,}")
    parts: dict[str, int] = {}
    for layer in layers:
        words = layer.name.split(".")
        part = ".".join(words[:2]) if words[0] == "detector" else words[0]
        parts[part] = parts.get(part, 0) + layer.parameters
    print()
    for part, parameters in parts.items():
        print(f"{part:40} {parameters:>51,}")
    print(f"{'total (a cloned backbone counted once)':40} {sum(parts.values()):>51,}")
