"""The feature pyramid: VGG11 with BatchNorm, then SSD's extra layers."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssdir.common.errors import ConfigError, DataError
from ssdir.config import DetectorConfig
from ssdir.detector.imagenet import VGG11_BN_SHA256, VGG11_BN_URL, download_weights, read_features

# VGG11: channels of the convolutions of each stage; a 2x2 max-pooling ends a stage.
_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_POOLED_STAGES = {3: 1, 4: 2}  # the maps that these stages end with
_FINE_STAGE = 3  # map 0 is what this stage has before its pooling
# Extra layers, one entry a map from map 3 on: channels of the 1x1 and of the 3x3 convolution; its stride, padding.
_EXTRAS = ((256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0))
_FIRST_EXTRA = 3


def to_channels_last(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images in the memory format that suits a backbone without gradients: on a CPU, channels_last takes three
    quarters of the time."""
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


class Backbone(nn.Module):
    """VGG11-BN and extra layers, built up to the last map used.

    The VGG part bears the parameter names of torchvision's ``vgg11_bn`` (``features.N.*``); each map from the third
    on has a block ``extras.N`` of a 1x1 and a 3x3 convolution, both followed by ReLU. At 300 pixels and width 1 the
    maps 0 to 5 have 512, 512, 512, 512, 256, 256 channels and 37, 18, 9, 5, 3, 1 cells a side. Maps 1 to 5 are the
    paper's; map 0 is the finer one that the two convolutions before map 1's pooling see.

    Initial values: Kaiming (fan out) in the VGG part, which is followed by BatchNorm and ReLU and may be trained
    from scratch, Xavier in the extra layers, zero biases.

    Attributes:
        map_channels: channels of each map used.
        map_cells: cells along one side of each map used.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.width = config.width
        self.maps = config.maps
        last = config.maps[-1]
        self.map_cells = tuple(cells_of_maps(config.image_size)[number] for number in config.maps)
        if self.map_cells[-1] < 1:
            raise ConfigError(
                f"detector.image_size {config.image_size} leaves nothing of map {last}; the smallest side for "
                f"maps {config.maps} is {smallest_side(last)}: make images larger or use fewer maps"
            )
        layers: list[nn.Module] = []
        channels_of: dict[int, int] = {}
        self._map_ends: dict[int, int] = {}
        channels = 3
        for stage, widths in enumerate(_STAGES[: _FINE_STAGE + 1 if last < 2 else None]):
            for wide in widths:
                out = self._scaled(wide)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            if stage == _FINE_STAGE:
                self._map_ends[0], channels_of[0] = len(layers), channels
                if last == 0:
                    break
            layers.append(nn.MaxPool2d(2))
            if stage in _POOLED_STAGES:
                self._map_ends[_POOLED_STAGES[stage]] = len(layers)
                channels_of[_POOLED_STAGES[stage]] = channels
        self.features = nn.Sequential(*layers)
        self.extras = nn.ModuleList()
        for number in range(_FIRST_EXTRA, last + 1):
            narrow, wide, stride, padding = _EXTRAS[number - _FIRST_EXTRA]
            middle, out = self._scaled(narrow), self._scaled(wide)
            self.extras.append(
                nn.Sequential(
                    nn.Conv2d(channels, middle, 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(middle, out, 3, stride=stride, padding=padding),
                    nn.ReLU(inplace=True),
                )
            )
            channels_of[number] = channels = out
        self.map_channels = tuple(channels_of[number] for number in config.maps)
        self._initialise()

    def _scaled(self, channels: int) -> int:
        return max(8, round(channels * self.width / 8) * 8)

    def _initialise(self) -> None:
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                zero_bias(module)
        for module in self.extras.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)

    def forward(self, normalised: Float[Tensor, "b 3 s s"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps, in the order of ``config.maps``, of images normalised by the detector's mean and std."""
        found: list[Tensor] = []
        x, start = normalised, 0
        for number, end in self._map_ends.items():
            for layer in itertools.islice(self.features, start, end):
                x = layer(x)
            start = end
            if number in self.maps:
                found.append(x)
        for number, block in enumerate(self.extras, start=_FIRST_EXTRA):
            x = block(x)
            if number in self.maps:
                found.append(x)
        return found

    def load_imagenet_weights(
        self, path: Path | None = None, url: str = VGG11_BN_URL, sha256: str | None = VGG11_BN_SHA256
    ) -> None:
        """Start the VGG part from torchvision's ImageNet weights (only ``features.*`` of the file is used).

        Args:
            path: a local copy of the official file; None downloads it (507 MiB) into the user's cache.
            url: where to download it from.
            sha256: how the file's SHA-256 must begin; None skips the check of a local file.

        Raises:
            ConfigError: the backbone's width is not 1.
            DataError: the file is absent, not the expected one, or does not fit; the download failed.
        """
        if self.width != 1.0:
            raise ConfigError(
                f"ImageNet weights fit detector.width 1.0 only, not {self.width}; train a narrow backbone from scratch"
            )
        if path is None:
            path = download_weights(url, sha256 or "")
            sha256 = None  # checked on the way
        found = read_features(path, sha256)
        own = {name: value for name, value in self.state_dict().items() if name.startswith("features.")}
        needed = {
            name for name in own if not name.endswith("num_batches_tracked")
        }  # old files lack the counter
        if missing := sorted(needed - set(found)):
            raise DataError(f"{path} lacks {missing[0]} ({len(missing)} tensors in all); it is not VGG11-BN")
        for name in sorted(needed):
            if found[name].shape != own[name].shape:
                raise DataError(
                    f"{path}: {name} has the shape {tuple(found[name].shape)}, not {tuple(own[name].shape)}; "
                    "it is not VGG11-BN"
                )
        self.load_state_dict({name: found[name] for name in own if name in found}, strict=False)


def zero_bias(module: nn.Conv2d) -> None:
    """Set a convolution's bias to 0."""
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def cells_of_maps(image_size: int) -> tuple[int, ...]:
    """Cells along one side of the maps 0 to 5; 0 where nothing is left.

    >>> cells_of_maps(300)
    (37, 18, 9, 5, 3, 1)
    >>> cells_of_maps(128)
    (16, 8, 4, 2, 1, 0)
    """
    cells = [image_size // stride for stride in (8, 16, 32)]
    for _, _, stride, padding in _EXTRAS:
        cells.append(max(0, (cells[-1] + 2 * padding - 3) // stride + 1) if cells[-1] > 0 else 0)
    return tuple(cells)


def smallest_side(last_map: int) -> int:
    """Smallest image side, in pixels, at which map ``last_map`` has a cell.

    >>> [smallest_side(number) for number in range(6)]
    [8, 16, 32, 32, 32, 288]
    """
    return next(side for side in itertools.count(1) if cells_of_maps(side)[last_map] > 0)
