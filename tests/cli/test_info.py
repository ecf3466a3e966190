"""What ``ssdir info`` prints: the environment, and presets layer by layer."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

from ssdir.baselines.kinds import BASELINES
from ssdir.cli.info import Networks, describe_preset, environment
from ssdir.cli.main import main
from ssdir.common.errors import ConfigError
from ssdir.config.presets import PRESETS, preset
from ssdir.detector.ssd import Detector
from ssdir.model.ssdir import SSDIR


@pytest.fixture(scope="module")
def described() -> dict[str, Networks]:
    return {name: describe_preset(name) for name in PRESETS}


def outputs(networks: Networks, prefix: str) -> list[tuple[int, ...]]:
    return [layer.output for layer in networks.layers if layer.name.startswith(f"{prefix}.")]


@pytest.mark.parametrize(
    ("name", "what", "decoder"),
    [("mnist", 706_112, 2_863_139), ("clevr", 9_705_728, 3_059_747), ("wider", 49_560_576, 3_321_891)],
)
def test_parameters_of_each_part_are_the_papers(
    described: dict[str, Networks], name: str, what: int, decoder: int
) -> None:
    assert described[name].parts() == {
        "detector.backbone.features": 9_225_984,
        "detector.backbone.extras": 2_000_384,
        "detector.where": 147_496,
        "detector.present": 36_874,
        "depth": 18_437,
        "what": what,
        "decoder": decoder,
    }


def test_shapes_of_the_mnist_preset_are_the_papers(described: dict[str, Networks]) -> None:
    found = described["mnist"]
    cells = (18, 9, 5, 3, 1)
    channels = (512, 512, 512, 256, 256)
    assert found.maps == [(c, n, n) for c, n in zip(channels, cells, strict=True)]
    assert (found.cells, found.boxes, found.patch) == (440, 880, (3, 64, 64))
    assert outputs(found, "detector.where") == [(8, n, n) for n in cells]
    assert outputs(found, "detector.present") == [(2, n, n) for n in cells]
    assert outputs(found, "depth") == [(1, n, n) for n in cells]
    assert outputs(found, "what") == [(64, n, n) for n in cells for _ in range(8)]  # 5 convolutions, 3 ReLUs
    painted = [
        (1024, 1, 1), (512, 2, 2), (256, 4, 4), (128, 8, 8), (64, 16, 16), (32, 32, 32), (16, 64, 64), (3, 64, 64),
    ]  # fmt: skip
    assert outputs(found, "decoder") == [
        output for output in painted for _ in range(2)
    ]  # each with its activation
    convolutions = [
        layer.output for layer in found.layers if "features" in layer.name and layer.kind == "Conv2d"
    ]
    assert convolutions == [
        (64, 300, 300), (128, 150, 150), (256, 75, 75), (256, 75, 75), (512, 37, 37), (512, 37, 37), (512, 18, 18),
        (512, 18, 18),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["mnist", "quickstart"])
def test_no_layer_is_missing_and_none_is_double(described: dict[str, Networks], name: str) -> None:
    chosen = preset(name)
    model = SSDIR(Detector(chosen.detector.detector), chosen.ssdir.model)
    total = sum(
        item.numel() for key, item in model.named_parameters() if not key.startswith("backbone.")
    )  # a cloned backbone is not listed again
    layers = described[name].layers
    assert sum(layer.parameters for layer in layers) == total == sum(described[name].parts().values())
    assert len({layer.name for layer in layers}) == len(layers)


def test_norms_of_the_decoder_are_listed(described: dict[str, Networks]) -> None:
    names = [layer.name for layer in described["quickstart"].layers if layer.kind == "BatchNorm2d"]
    assert [name for name in names if name.startswith("decoder")] == [f"decoder.norms.{i}" for i in range(3)]
    assert described["quickstart"].patch == (3, 32, 32)
    assert described["quickstart"].maps == [(128, 16, 16), (128, 8, 8), (128, 4, 4)]


def test_the_decoder_is_shown_as_drawn_with_its_activations(described: dict[str, Networks]) -> None:
    found = [layer for layer in described["mnist"].layers if layer.name.startswith("decoder.")]
    kinds = ["Conv2d", "ReLU", *["ConvTranspose2d", "ReLU"] * 6, "Conv2d", "Sigmoid"]
    assert [layer.kind for layer in found] == kinds


def test_layers_of_the_decoder_compute_what_it_computes() -> None:
    from ssdir.cli.info import _decode_by_layers

    chosen = preset("quickstart").ssdir.model
    decoder = SSDIR(Detector(preset("quickstart").detector.detector), chosen).decoder.eval()
    what = torch.randn(3, chosen.z_what_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_decode_by_layers(decoder, what), decoder(what), atol=1e-5, rtol=1e-5)


def test_table_and_json_tell_the_same(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    described: dict[str, Networks],
) -> None:
    monkeypatch.setattr("ssdir.cli.info.describe_preset", described.__getitem__)
    assert main(["info", "--preset", "clevr", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["parameters"] == described["clevr"].parts()
    assert [tuple(layer["output"]) for layer in value["layers"]] == [
        layer.output for layer in described["clevr"].layers
    ]
    assert value["cloned_backbone"] and not described["mnist"].cloned_backbone
    assert main(["info", "--preset", "clevr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for layer, line in zip(value["layers"], lines, strict=False):
        words = line.split()
        assert words[:2] == [layer["name"], layer["kind"]]
        assert [int(word) for word in words[2:-1:2]] == layer["output"]
        assert int(words[-1].replace(",", "")) == layer["parameters"]
    assert lines[-1].split()[-1] == "24,194,650" == f"{sum(value['parameters'].values()):,}"
    assert "the cloned backbone not counted again" in lines[-1]


def test_an_unknown_preset_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="perhaps you meant 'mnist'"):
        describe_preset("mnits")
    assert main(["info", "--preset", "mnits"]) == 1
    assert "perhaps you meant 'mnist'" in capsys.readouterr().err


def test_environment_names_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    facts = environment()
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["torch_threads"] == torch.get_num_threads()
    baselines = {f"{kind}/{name}" for kind, about in BASELINES.items() for name in about.presets}
    assert set(facts["presets"]) == set(PRESETS) | baselines
    assert isinstance(facts["bf16"], bool)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch              {facts['packages']['torch']}" in text
    absent = [name for name, version in facts["packages"].items() if version is None]
    assert text.count("not installed") == len(absent)
