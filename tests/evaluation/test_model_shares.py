"""What models say their pixels show: their own renderers say the same."""

from __future__ import annotations

import pytest
import torch
from tests.baselines.test_every_baseline import detector, small_model
from tests.baselines.test_slot_attention import model_of

from ssdir.baselines.space.compose import compose, pixel_shares
from ssdir.baselines.spair import render as spair
from ssdir.config import ModelConfig
from ssdir.model.latents import Objects
from ssdir.model.object_model import DetectorModel
from ssdir.model.ssdir import SSDIR
from ssdir.rendering.shares import PixelShares, box_shares

N, IMAGES, SIDE, P = 9, 2, 16, 6


def made(seed: int = 0) -> dict[str, torch.Tensor]:
    """Overlapping objects, each in one colour."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    return {
        "colour": rand(N, 3),
        "alpha": rand(N, 1, P, P),
        "present": 0.5 + rand(N) / 2,
        "depth": 4 * rand(N) - 2,
        "boxes": torch.cat([rand(N, 2), 0.2 + rand(N, 2) / 2], 1),
        "image": torch.arange(N) // 5,
    }


def painted(shares: PixelShares, colour: torch.Tensor) -> torch.Tensor:
    """The shares, each in its object's colour."""
    planes = shares.behind.new_zeros(IMAGES * SIDE**2, 3)
    planes.index_add_(0, shares.pixels, shares.share[:, None] * colour[shares.objects])
    return planes.view(IMAGES, SIDE, SIDE, 3).permute(0, 3, 1, 2)


def test_space_composes_what_it_shares() -> None:
    made_of = made()
    patches = made_of["colour"][:, :, None, None].expand(-1, -1, P, P)
    rest = [made_of[name] for name in ("alpha", "present", "depth", "boxes", "image")]
    whole = compose(patches, *rest, IMAGES, SIDE, 16)
    shares = pixel_shares(*rest, IMAGES, SIDE, 16)
    torch.testing.assert_close(painted(shares, made_of["colour"]), whole.mean)
    torch.testing.assert_close(1 - shares.behind.view(IMAGES, 1, SIDE, SIDE), whole.alpha)


def test_spair_composes_what_it_shares() -> None:
    made_of = made(1)
    patches = made_of["colour"][:, :, None, None].expand(-1, -1, P, P)
    alpha, depth, boxes, image = (made_of[name] for name in ("alpha", "depth", "boxes", "image"))
    behind = torch.rand(IMAGES, 3, SIDE, SIDE)
    whole = spair.composite(patches, alpha, depth.abs(), boxes, image, behind)
    shares = spair.pixel_shares(alpha, depth.abs(), boxes, image, IMAGES, SIDE)
    rest = shares.behind.view(IMAGES, 1, SIDE, SIDE) * behind
    torch.testing.assert_close(painted(shares, made_of["colour"]) + rest, whole)


def ssdir(**settings: object) -> SSDIR:
    torch.manual_seed(0)
    config = ModelConfig(
        z_what_size=4,
        what_encoder="glimpses",
        glimpse_size=8,
        glimpse_width=4,
        decoder_channels=(8, 8),
        **settings,
    )
    return SSDIR(detector(SIDE), config)


def objects_of(made_of: dict[str, torch.Tensor], opaque: bool) -> Objects:
    return Objects(
        boxes=made_of["boxes"],
        present=made_of["present"],
        what=None,
        depth=made_of["depth"],
        image_index=made_of["image"],
        n_images=IMAGES,
        patches=made_of["colour"][:, :, None, None].expand(-1, -1, P, P),
        alpha=made_of["alpha"] if opaque else None,
    )


def test_ssdir_with_opacity_composes_what_it_shares() -> None:
    made_of, model = made(2), ssdir(opacity=True)
    objects = objects_of(made_of, opaque=True)
    shares = model.shares(torch.zeros(IMAGES, 3, SIDE, SIDE), objects, SIDE)
    assert shares.kind == "opacity"
    torch.testing.assert_close(painted(shares, made_of["colour"]), model.composite(objects, SIDE).images)
    total = shares.behind.index_add(0, shares.pixels, shares.share)
    torch.testing.assert_close(total, torch.ones(IMAGES * SIDE**2))


def test_without_opacity_boxes_are_opaque_the_nearest_first() -> None:
    made_of, images = made(3), torch.zeros(IMAGES, 3, SIDE, SIDE)
    objects = objects_of(made_of, opaque=False)
    shares = ssdir(opacity=False).shares(images, objects, SIDE)
    boxes, image = objects.boxes, objects.image_index
    assert shares.kind == "boxes"
    expected = box_shares(boxes, made_of["depth"], image, IMAGES, SIDE).winners()
    assert torch.equal(shares.winners(), expected) and len(expected.unique()) > 5
    no_depth = Objects(boxes, objects.present, None, None, image, IMAGES)
    surest = DetectorModel(detector(SIDE)).shares(images, no_depth, SIDE).winners()
    assert torch.equal(surest, box_shares(boxes, objects.present, image, IMAGES, SIDE).winners())
    assert not torch.equal(surest, expected)


@pytest.mark.parametrize("size", [16, 10])
def test_slots_compete_by_their_masks(size: int) -> None:
    model = model_of().eval()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shares = model.shares(images, model.infer(images), size)
    assert shares.kind == "weights"
    total = shares.behind.index_add(0, shares.pixels, shares.share)
    torch.testing.assert_close(total, torch.ones(3 * size**2))
    if size != 16:
        return
    with torch.no_grad():
        masks = model.decoder.apart(model.decoder(model.slots(images))).masks
    best = masks.argmax(1)
    for image, (found, winner) in enumerate(zip(shares.winners().view(3, 16, 16), best, strict=True)):
        back = torch.bincount(winner.flatten(), minlength=4).argmax()
        expected = torch.where(winner == back, 0, image * 4 + winner + 1)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["space", "spair", "slot-attention", "crop-vae"])
def test_every_baseline_shares_its_pixels(kind: str) -> None:
    model = small_model(kind).eval()
    side = model.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        shares = model.shares(images, model.infer(images, present_threshold=0.0), side)
    assert shares.kind == {"slot-attention": "weights", "crop-vae": "boxes"}.get(kind, "opacity")
    assert len(shares.share) > 0 and shares.share.min() >= 0 and not shares.share.requires_grad
    total = shares.behind.index_add(0, shares.pixels, shares.share)
    torch.testing.assert_close(total, torch.ones(2 * side**2))
    assert shares.winners().shape == (2 * side**2,)
