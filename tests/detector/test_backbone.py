"""Shapes and parameter counts of the pyramid; loading of ImageNet weights."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from ssdir.common.errors import ConfigError, DataError
from ssdir.config import DetectorConfig
from ssdir.config.presets import PRESETS
from ssdir.detector.backbone import Backbone, cells_of_maps, smallest_side

FULL = DetectorConfig()
MAP_0 = replace(FULL, image_size=32, maps=(0,), min_sizes=(32.0,), max_sizes=(80.0,))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def config_of(maps: tuple[int, ...], side: int, width: float = 1 / 16) -> DetectorConfig:
    n = len(maps)
    return replace(
        FULL, image_size=side, width=width, maps=maps, min_sizes=(32.0,) * n, max_sizes=(80.0,) * n
    )


def test_full_size_layer_by_layer() -> None:
    backbone = Backbone(FULL).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 300, 300))
    assert [tuple(one.shape) for one in maps] == [
        (1, 512, 18, 18),
        (1, 512, 9, 9),
        (1, 512, 5, 5),
        (1, 256, 3, 3),
        (1, 256, 1, 1),
    ]
    assert backbone.map_cells == (18, 9, 5, 3, 1)
    assert backbone.map_channels == (512, 512, 512, 256, 256)
    assert parameters(backbone.features) == 9_225_984
    assert parameters(backbone.extras) == 2_000_384
    assert [parameters(block) for block in backbone.extras] == [1_311_488, 360_832, 328_064]
    # VGG11-BN of torchvision: indices of its convolutions, BatchNorms follow them
    convolutions = [
        name for name, layer in backbone.features.named_children() if isinstance(layer, nn.Conv2d)
    ]
    assert convolutions == ["0", "4", "8", "11", "15", "18", "22", "25"]
    assert backbone.state_dict()["features.26.running_var"].shape == (512,)


@pytest.mark.parametrize(
    ("maps", "side"),
    [((0,), 8), ((0, 2), 64), ((1, 2, 3, 4), 128), ((2,), 65), ((0, 1, 5), 290), ((3, 4), 33)],
)
def test_cells_and_channels_are_those_of_the_maps(maps: tuple[int, ...], side: int) -> None:
    backbone = Backbone(config_of(maps, side)).eval()
    with torch.no_grad():
        found = backbone(torch.rand(1, 3, side, side))
    assert [one.shape[1] for one in found] == list(backbone.map_channels)
    assert [one.shape[2] for one in found] == [one.shape[3] for one in found] == list(backbone.map_cells)
    assert all(one.min() >= 0 for one in found)


def test_map_0_is_what_map_1_has_before_its_pooling() -> None:
    torch.manual_seed(0)
    both = Backbone(config_of((0, 1), 64)).eval()
    with torch.no_grad():
        fine, coarse = both(torch.rand(1, 3, 64, 64))
    assert fine.shape == (1, 32, 8, 8)
    assert torch.equal(nn.functional.max_pool2d(fine, 2), coarse)
    full = Backbone(config_of((0,), 64, width=1.0))
    assert (full.map_channels, full.map_cells) == ((512,), (8,))


def test_layers_after_the_last_map_are_not_built() -> None:
    def built(maps: tuple[int, ...]) -> tuple[int, int]:
        backbone = Backbone(config_of(maps, 300))
        return len(backbone.features), len(backbone.extras)

    assert [built((number,)) for number in range(6)] == [(21, 0), (22, 0), (29, 0), (29, 1), (29, 2), (29, 3)]
    assert built((0, 2)) == (29, 0) and built((1, 4)) == (29, 2)


def test_width_scales_channels_to_multiples_of_8() -> None:
    quarter = Backbone(config_of((1, 4), 128, width=0.25))
    assert quarter.map_channels == (128, 64)
    assert quarter.features[0].out_channels == 16
    assert Backbone(config_of((1,), 32, width=0.01)).map_channels == (8,)
    odd = Backbone(config_of((1,), 32, width=0.3))
    assert [layer.out_channels for layer in odd.features if isinstance(layer, nn.Conv2d)] == [
        16, 40, 80, 80, 152, 152,
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(6))
def test_smallest_side_is_exact_and_named(number: int) -> None:
    side = smallest_side(number)
    assert cells_of_maps(side)[number] == 1 and cells_of_maps(side - 1)[number] == 0
    Backbone(config_of((number,), side))
    with pytest.raises(ConfigError, match=f"smallest side for .* is {side}"):
        Backbone(config_of((number,), side - 1))


def test_every_preset_fits_its_image_size() -> None:
    for preset in PRESETS.values():
        config = preset.detector.detector
        assert cells_of_maps(config.image_size)[config.maps[-1]] >= 1


def test_initial_values() -> None:
    torch.manual_seed(0)
    backbone = Backbone(config_of((3,), 32, width=0.5))
    convolution = backbone.features[25]
    assert convolution.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    extra = backbone.extras[0][0]
    assert extra.weight.abs().max().item() == pytest.approx((6 / (256 + 128)) ** 0.5, rel=0.01)
    assert all(not layer.bias.any() for layer in backbone.modules() if isinstance(layer, nn.Conv2d))


def official_like(folder: Path) -> Path:
    """A file like torchvision's: all of VGG11-BN up to map 0, without counters, and a classifier."""
    torch.manual_seed(1)
    values = {
        name: torch.rand_like(value) for name, value in Backbone(MAP_0).state_dict().items() if value.ndim
    }
    values["features.22.weight"] = torch.zeros(3)  # a later layer, which these maps do not build
    values["classifier.0.weight"] = torch.zeros(2, 2)
    folder.mkdir(exist_ok=True)
    torch.save(values, folder / "vgg.pth")
    return folder / "vgg.pth"


def begin_of_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def test_weights_of_a_local_file(tmp_path: Path) -> None:
    path = official_like(tmp_path)
    backbone = Backbone(MAP_0)
    backbone.load_imagenet_weights(path, sha256=begin_of_hash(path))
    saved = torch.load(path, weights_only=True)
    own = {name: value for name, value in backbone.state_dict().items() if value.ndim}
    assert own.keys() == {name for name in saved if name.startswith("features.")} - {"features.22.weight"}
    assert all(torch.equal(value, saved[name]) for name, value in own.items())


def test_weights_of_a_wrong_file_are_refused(tmp_path: Path) -> None:
    path = official_like(tmp_path)
    backbone = Backbone(MAP_0)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(DataError, match=r"vgg\.pth.*SHA-256.*not 6002323d"):
        backbone.load_imagenet_weights(path)
    with pytest.raises(DataError, match=r"nowhere\.pth does not exist"):
        backbone.load_imagenet_weights(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(DataError, match=r"text\.pth is not a file of weights"):
        backbone.load_imagenet_weights(tmp_path / "text.pth", sha256=None)
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"half\.pth is not a file of weights"):
        backbone.load_imagenet_weights(tmp_path / "half.pth", sha256=None)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(DataError, match=r"list\.pth holds no tensors named features"):
        backbone.load_imagenet_weights(tmp_path / "list.pth", sha256=None)
    values = torch.load(path, weights_only=True)
    torch.save({**values, "features.4.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    with pytest.raises(DataError, match=r"features\.4\.weight has the shape \(1,\), not \(128, 64, 3, 3\)"):
        backbone.load_imagenet_weights(tmp_path / "shape.pth", sha256=None)
    del values["features.1.running_mean"]
    torch.save(values, tmp_path / "missing.pth")
    with pytest.raises(DataError, match=r"missing\.pth lacks features\.1\.running_mean \(1 tensors"):
        backbone.load_imagenet_weights(tmp_path / "missing.pth", sha256=None)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_weights_need_full_width(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"width 1\.0 only, not 0\.5"):
        Backbone(config_of((1,), 32, width=0.5)).load_imagenet_weights(tmp_path / "any.pth")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with the folder ``served``."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_weights_are_downloaded_once_into_the_cache(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = official_like(tmp_path / "served")
    expected = torch.load(path, weights_only=True)["features.11.weight"]
    sha256 = begin_of_hash(path)
    for _ in range(2):  # the second time without the server's file
        backbone = Backbone(MAP_0)
        backbone.load_imagenet_weights(url=f"{server}/vgg.pth", sha256=sha256)
        assert torch.equal(backbone.features[11].weight, expected)
        path.unlink(missing_ok=True)
    assert [item.name for item in (tmp_path / "cache/ssdir").iterdir()] == ["vgg.pth"]
    (tmp_path / "cache/ssdir/vgg.pth").write_text("damaged")
    with pytest.raises(DataError, match=r"ssdir/vgg\.pth is not the expected file"):
        Backbone(MAP_0).load_imagenet_weights(url=f"{server}/vgg.pth", sha256=sha256)


def test_failed_downloads_leave_nothing(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    official_like(tmp_path / "served")
    backbone = Backbone(MAP_0)
    with pytest.raises(DataError, match="not the expected file"):
        backbone.load_imagenet_weights(url=f"{server}/vgg.pth", sha256="00000000")
    with pytest.raises(DataError, match=r"absent\.pth cannot be downloaded .*404.*give the path"):
        backbone.load_imagenet_weights(url=f"{server}/absent.pth")
    with pytest.raises(DataError, match="cannot be downloaded"):
        backbone.load_imagenet_weights(url="http://127.0.0.1:9/vgg.pth")
    assert list((tmp_path / "cache/ssdir").iterdir()) == []


def test_each_convolution_of_the_extra_layers_has_a_relu() -> None:
    backbone = Backbone(FULL).eval()
    for block in backbone.extras:
        assert [type(layer) for layer in block] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]
        x = torch.randn(1, block[0].in_channels, 5, 5)
        first = block[0](x).clamp(min=0)  # before the block, whose ReLUs may work in place
        torch.testing.assert_close(block(x), block[2](first).clamp(min=0))
