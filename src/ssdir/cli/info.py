"""``ssdir info``: the environment for a bug report, and the layers of a preset's networks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssdir.baselines.kinds import BASELINES, baseline
from ssdir.common.errors import ConfigError
from ssdir.common.machine import available_cores, computes_in_bf16
from ssdir.config import did_you_mean
from ssdir.config.presets import PRESETS, preset
from ssdir.detector.ssd import Detector
from ssdir.model.decoder import UpsampleDecoder, WhatDecoder
from ssdir.model.ssdir import SSDIR

PACKAGES = (
    "ssdir", "torch", "numpy", "pillow", "pyyaml", "safetensors", "tyro", "rich", "accelerate", "jaxtyping",
    "scikit-learn", "faster-coco-eval", "matplotlib", "mitsuba", "pyarrow", "duckdb", "tensorboard", "wandb",
)  # fmt: skip

PARTS = (
    "detector.backbone.features", "detector.backbone.extras", "detector.where", "detector.present", "depth", "what",
    "decoder", "backdrop", "projector",
)  # fmt: skip
"""What parameters are summed over, where the model has it."""


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
        "cores": available_cores(),
        "torch_threads": torch.get_num_threads(),
        "bf16": computes_in_bf16("auto"),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "presets": sorted(PRESETS)
        + [f"{name}/{key}" for name, kind in BASELINES.items() for key in sorted(kind.presets)],
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


@dataclass(frozen=True)
class Networks:
    """A preset's SSDIR, layer by layer."""

    preset: str
    layers: list[Layer]
    maps: list[tuple[int, ...]]
    """Shapes of the feature maps used."""
    cells: int
    boxes: int
    patch: tuple[int, ...]
    cloned_backbone: bool
    """Whether the what and depth encoders have a backbone of their own: the detector's layers once more."""

    def parts(self) -> dict[str, int]:
        """Parameters of each part; a cloned backbone is not counted again."""
        sums = {
            part: sum(layer.parameters for layer in self.layers if f"{layer.name}.".startswith(f"{part}."))
            for part in PARTS
        }
        return {part: number for part, number in sums.items() if number > 0}


@dataclass(frozen=True)
class BaselineNetworks:
    """A preset of a baseline, layer by layer."""

    preset: str
    layers: list[Layer]
    """In the order of the model's parts, with the output of their first call; () where parameters are used without
    calling the layer that holds them."""
    parameters: dict[str, int]
    """Of each part of the model, frozen ones included."""
    objects: int
    """Cells or slots of an image."""
    patch: tuple[int, ...]


def describe_baseline(name: str) -> BaselineNetworks:
    """Every layer of a baseline's preset, named KIND/PRESET, with its output shape and number of parameters.

    A baseline that stands on a detector is shown on that of SSDIR's preset of the same name, else the quickstart's.

    Raises:
        ConfigError: there is no such baseline or preset.
    """
    kind, _, chosen = name.partition("/")
    known = baseline(kind)
    if chosen not in known.presets:
        raise ConfigError(f"{kind} has no preset {chosen!r}{did_you_mean(chosen, known.presets)}")
    run = known.presets[chosen].run
    build: Any = known.load_class()
    if known.needs_detector:
        under = PRESETS.get(chosen, PRESETS["quickstart"])
        model = build(Detector(under.detector.detector), run.model)
    else:
        model = build(run.model)
    model.eval()
    outputs: dict[str, tuple[int, ...]] = {}

    def record(layer_name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs.setdefault(layer_name, tuple(first.shape[1:]))

        return hook

    for layer_name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(record(layer_name))
    image = torch.zeros(1, 3, model.image_size, model.image_size)
    model.reconstruct(image)
    found = model.infer(image, present_threshold=-1.0, nms_iou=None)
    layers = []
    for layer_name, module in model.named_modules():
        own = sum(item.numel() for item in module.parameters(recurse=False))
        if layer_name in outputs or own:
            shape = outputs.get(layer_name, ())
            layers.append(Layer(layer_name or "itself", type(module).__name__, shape, own))
    parameters = {
        part: sum(item.numel() for item in module.parameters()) for part, module in model.named_children()
    }
    parameters |= {part: item.numel() for part, item in model.named_parameters(recurse=False)}
    patch = () if found.patches is None else tuple(found.patches.shape[1:])
    return BaselineNetworks(name, layers, {k: v for k, v in parameters.items() if v}, len(found), patch)


def describe_preset(name: str) -> Networks:
    """Every layer of a preset's SSDIR with its output shape and number of parameters.

    A cloned backbone is not listed: it has the layers of the detector's.

    Raises:
        ConfigError: there is no such preset.
    """
    chosen = preset(name)
    detector_config = chosen.detector.detector
    model = SSDIR(Detector(detector_config), chosen.ssdir.model).eval()
    layers: list[Layer] = []

    def record(layer_name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            layers.append(Layer(layer_name, type(module).__name__, tuple(output.shape[1:]), own))

        return hook

    for layer_name, module in model.named_modules():
        whole = not list(module.children()) or module is model.backdrop  # which holds a picture of its own
        if whole and not layer_name.startswith("backbone."):
            module.register_forward_hook(record(layer_name))
    side = detector_config.image_size
    with torch.inference_mode():
        features = model.finder.features(torch.zeros(1, 3, side, side))
        heads = model.finder.heads(features)
        if model.by_glimpses:
            size = chosen.ssdir.model.glimpse_size
            what = model.what(torch.zeros(1, 3, size, size))
            near = features[0][:, :, 0, 0] if chosen.ssdir.model.depth_features else None
            model.depth(what, torch.zeros(1, 4), near)
        else:
            what = model.what(features)[0, :1]
            model.depth(features)
        if model.backdrop is not None:
            model.backdrop(torch.zeros(1, 3, side, side), side)
        if model.projector is not None:
            model.projector(what)
        patch = _decode_by_layers(
            model.decoder,
            what,
            lambda layer, kind, x: layers.append(Layer(f"decoder.{layer}", kind, tuple(x.shape[1:]), 0)),
        )
    return Networks(
        preset=name,
        layers=layers,
        maps=[tuple(feature.shape[1:]) for feature in features],
        cells=int(model.finder.cell_of_box[-1]) + 1,
        boxes=heads.offsets.shape[1],
        patch=tuple(patch.shape[1:]),
        cloned_backbone=model.backbone is not None,
    )


def _decode_by_layers(
    decoder: nn.Module,
    what: Float[Tensor, "m d"],
    activated: Callable[[str, str, Tensor], None] = lambda layer, kind, x: None,
) -> Float[Tensor, "m c p p"]:
    """What the decoder computes (logits), but as the layers that it stands for, so that each is seen with its shapes.

    ``activated`` is told each activation, which is no module of the decoder: after which layer, its kind, its output.
    """
    assert isinstance(decoder, WhatDecoder | UpsampleDecoder)
    if isinstance(decoder, UpsampleDecoder):
        x = decoder.first(what).relu().view(len(what), -1, 4, 4)
    else:
        x = decoder.first(what[:, :, None, None]).relu()
    activated("first.relu", "ReLU", x)
    for index, layer in enumerate(decoder.up):
        x = layer(functional.interpolate(x, scale_factor=2.0) if isinstance(decoder, UpsampleDecoder) else x)
        x = (decoder.norms[index](x) if len(decoder.norms) else x).relu()
        activated(f"up.{index}.relu", "ReLU", x)
    logits = decoder.last(x)
    activated("last.sigmoid", "Sigmoid", logits)
    return logits


def print_preset(name: str, as_json: bool = False) -> None:
    """Print :func:`describe_preset`, or :func:`describe_baseline` for KIND/PRESET, as a table or as JSON."""
    if "/" in name:
        _print_baseline(describe_baseline(name), as_json)
        return
    networks = describe_preset(name)
    parts = networks.parts()
    if as_json:
        print(json.dumps(dataclasses.asdict(networks) | {"parameters": parts}, indent=2))
        return
    for layer in networks.layers:
        print(f"{layer.name:36} {layer.kind:16} {_shape(layer.output):>16} {layer.parameters:>12,}")
    print()
    print(f"maps   {', '.join(map(_shape, networks.maps))}")
    print(f"boxes  {networks.boxes:,} in {networks.cells:,} cells")
    print(f"patch  {_shape(networks.patch)}")
    print()
    for part, parameters in parts.items():
        print(f"{part:36} {parameters:>46,}")
    cloned = " (the cloned backbone not counted again)" if networks.cloned_backbone else ""
    print(f"{'total' + cloned:60} {sum(parts.values()):>22,}")


def _print_baseline(networks: BaselineNetworks, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(networks), indent=2))
        return
    for layer in networks.layers:
        print(f"{layer.name:44} {layer.kind:16} {_shape(layer.output):>16} {layer.parameters:>12,}")
    print()
    print(f"objects  {networks.objects:,} an image")
    print(f"patch    {_shape(networks.patch)}")
    print()
    for part, parameters in networks.parameters.items():
        print(f"{part:44} {parameters:>46,}")
    print(f"{'total':44} {sum(networks.parameters.values()):>46,}")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
