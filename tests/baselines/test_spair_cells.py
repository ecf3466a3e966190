"""The scan's values and gradients against those of the straightforward program, and against finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.straightforward_spair import straightforward
from torch.nn.utils import parametrize

from ssdir.baselines.spair.cells import CellNetworks, CellPosterior, Noise, draw_noise
from ssdir.baselines.spair.scan import Schedule, at_once, raster, scan, wavefront
from ssdir.config.spair import SPAIRConfig

CONFIG = SPAIRConfig(
    image_size=36, features=5, hidden=7, passthrough=3, z_what_size=4, patch_size=8, size_range=1.5
)


class Case:
    """Networks, in float64 far from their beginnings, and what they are applied to."""

    def __init__(self, config: SPAIRConfig, dtype: torch.dtype = torch.float64, noisy: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)  # of the buffers that hold offsets and scales of boxes
        try:
            self.networks = CellNetworks(config)
        finally:
            torch.set_default_dtype(torch.float32)
        if dtype == torch.float64:
            for parameter in self.networks.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        n, side = config.grid, config.image_size
        self.features = torch.randn(2, config.features, n, n, generator=generator, dtype=dtype)
        self.features.requires_grad_()
        self.images = torch.rand(2, 3, side, side, generator=generator, dtype=dtype)
        noise = draw_noise(config, 2, self.images, generator)
        self.noise: Noise | None = noise if noisy else None
        self.schedule: Schedule = wavefront(n, n, config.lookback) if config.lateral else at_once(n, n)

    def run(self, freeze_where: bool = False) -> CellPosterior:
        return scan(self.networks, self.schedule, self.features, self.images, self.noise, freeze_where)

    def expected(self, freeze_where: bool = False) -> CellPosterior:
        return straightforward(self.networks, self.features, self.images, self.noise, freeze_where)

    def gradients(self, found: CellPosterior) -> dict[str, torch.Tensor | None]:
        """Of a function of all that was inferred, other weights everywhere."""
        generator = torch.Generator().manual_seed(4)
        total = sum(
            (part * torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)).sum()
            for part in found
        )
        leaves = {"": self.features, **dict(self.networks.named_parameters())}
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(total, list(asked.values()), allow_unused=True)
        return dict(zip(asked, grads, strict=True))


CASES = [
    CONFIG,
    replace(CONFIG, patch_networks="conv"),
    replace(CONFIG, lookback=2),
    replace(CONFIG, lateral=False),
    replace(CONFIG, passthrough=0),
]


@pytest.mark.parametrize("freeze_where", [False, True])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("config", CASES)
def test_values_and_gradients_are_those_of_the_straightforward_program(
    config: SPAIRConfig, noisy: bool, freeze_where: bool
) -> None:
    case = Case(config, noisy=noisy)
    found = case.run(freeze_where)
    grads = case.gradients(found)
    expected = case.expected(freeze_where)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert (one - other).abs().max() < 1e-10, name
        assert one.requires_grad is other.requires_grad, name
    for name, other in case.gradients(expected).items():
        one = grads[name]
        if other is None or other.abs().max() == 0:
            assert one is None or one.abs().max() == 0, name
        else:
            assert one is not None, name
            assert (one - other).abs().max() < 1e-9 * other.abs().max(), name


def test_gradients_are_those_of_finite_differences() -> None:
    config = replace(CONFIG, image_size=24, features=2, hidden=3, passthrough=2, z_what_size=2)
    case = Case(config)
    names = ("edge", "context.weight", "where.last.bias", "what.own.weight", "depth.second.weight")
    parameters = dict(case.networks.named_parameters())

    def function(features: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        wrapped = _Scanned(case.networks)
        given = {f"networks.{name}": value for name, value in given.items()}
        found: CellPosterior = torch.func.functional_call(
            wrapped, given, (case.schedule, features, case.images, case.noise)
        )
        return found.boxes, found.present, found.depth, found.what

    leaves = [parameters[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, (case.features, *leaves), eps=1e-6, fast_mode=True)


class _Scanned(torch.nn.Module):
    def __init__(self, networks: CellNetworks) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, *inputs: object) -> CellPosterior:
        return scan(self.networks, *inputs)


def test_gradients_stop_at_the_clip_but_where_they_lead_back() -> None:
    """The straightforward program clamps: there presences beyond the clip have no gradient at all."""
    case = Case(CONFIG)
    torch.nn.init.constant_(case.networks.present.last.bias, 30.0)
    for outward in (True, False):
        found = case.run().logits
        assert found.eq(10).all()
        (grad,) = torch.autograd.grad(found.sum() * (-1 if outward else 1), case.networks.present.last.bias)
        assert grad.item() == pytest.approx(0 if outward else found.numel(), rel=1e-3)
        (other,) = torch.autograd.grad(case.expected().logits.sum(), case.networks.present.last.bias)
        assert other.item() == 0


@pytest.mark.parametrize("patch_networks", ["mlp", "conv"])
def test_frozen_parameters_and_features_get_no_gradient(patch_networks: str) -> None:
    case = Case(replace(CONFIG, patch_networks=patch_networks))
    case.networks.encoder.requires_grad_(False)
    case.networks.what.second.weight.requires_grad_(False)
    case.features = case.features.detach()
    found = case.run()
    sum(part.sum() for part in found).backward()
    for name, parameter in case.networks.named_parameters():
        frozen = name.startswith("encoder.") or name == "what.second.weight"
        assert (parameter.grad is None) is frozen, name
    for parameter in case.networks.parameters():
        parameter.requires_grad_(False)
    assert not case.run().boxes.requires_grad


def test_gradients_can_be_asked_for_twice() -> None:
    case = Case(replace(CONFIG, patch_networks="conv"))
    total = sum(part.square().sum() for part in case.run())
    first, second = (
        torch.autograd.grad(total, list(case.networks.parameters()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_weights_may_be_shared_and_made_of_others() -> None:
    case = Case(CONFIG)
    case.networks.depth.second = case.networks.what.second
    parametrize.register_parametrization(case.networks.where.second, "weight", _Doubled())
    parametrize.register_parametrization(case.networks.encoder[1], "weight", _Doubled())
    expected = case.gradients(case.expected())
    found = case.gradients(case.run())
    assert {"what.second.weight", "where.second.parametrizations.weight.original"} < set(found)
    for name, other in expected.items():
        one = found[name]
        assert one is not None and other is not None, name
        assert (one - other).abs().max() < 1e-9 * other.abs().max(), name


class _Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_networks_in_half_precision_keep_places_in_single() -> None:
    case = Case(CONFIG, torch.float32)
    expected = case.run()
    case.networks.to(torch.bfloat16)
    found = case.run()
    assert all(part.dtype == torch.float32 for part in found)
    assert (found.boxes - expected.boxes).abs().max() < 0.02
    grad = case.gradients(found)["where.last.weight"]
    assert grad is not None and grad.dtype == torch.bfloat16 and grad.isfinite().all()


def test_an_export_infers_the_same() -> None:
    case = Case(CONFIG, torch.float32)

    class Scanned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.networks = case.networks

        def forward(self, features: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(scan(self.networks, case.schedule, features, images, None))

    features = case.features.detach()
    with torch.no_grad():
        program = torch.export.export(Scanned(), (features, case.images), strict=False)
        case.noise = None
        for one, other in zip(program.module()(features, case.images), case.run(), strict=True):
            assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize("patch_networks", ["mlp", "conv"])
def test_autocast_computes_in_half_precision_and_gives_whole_gradients(patch_networks: str) -> None:
    case = Case(replace(CONFIG, patch_networks=patch_networks), torch.float32)
    whole = case.run()
    expected = case.gradients(whole)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run()
    assert all(part.dtype == torch.float32 for part in found)
    for name, one, other in zip(found._fields, found, whole, strict=True):
        assert 0 < (one - other).norm() < 0.05 * other.norm(), name
    for name, grad in case.gradients(found).items():
        other = expected[name]
        assert grad is not None and other is not None and grad.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(grad.flatten(), other.flatten(), 0) > 0.97, name


def test_nothing_is_kept_without_gradients() -> None:
    case = Case(CONFIG)
    with torch.inference_mode():
        found = case.run()
    assert not any(part.requires_grad for part in found)
    for one, other in zip(found, case.run(), strict=True):
        assert torch.equal(one, other)


def test_another_order_and_the_same_bytes_again() -> None:
    case = Case(CONFIG, torch.float32)
    first = case.gradients(case.run())
    again = case.gradients(case.run())
    assert all(torch.equal(first[name], again[name]) for name in first)
    case.schedule = raster(CONFIG.grid, CONFIG.grid, 1)
    for name, grad in case.gradients(case.run()).items():
        assert (grad - first[name]).abs().max() < 1e-4 * max(1, first[name].abs().max()), name
