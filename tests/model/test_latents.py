"""The packed form."""

from __future__ import annotations

import torch

from ssdir.model.latents import CellLatents, Objects


def objects() -> Objects:
    return Objects(
        boxes=torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4], [0.6, 0.6, 0.1, 0.1]]),
        present=torch.tensor([0.9, 0.8, 0.7]),
        what=torch.arange(6.0).view(3, 2),
        depth=torch.tensor([1.0, 2.0, 3.0]),
        image_index=torch.tensor([0, 2, 2]),
        n_images=4,
        patches=torch.zeros(3, 3, 2, 2),
    )


def test_boxes_as_corners():
    expected = torch.tensor([[0.4, 0.3, 0.6, 0.7], [-0.05, 0.0, 0.25, 0.4], [0.55, 0.55, 0.65, 0.65]])
    torch.testing.assert_close(objects().boxes_xyxy, expected)


def test_counts_include_images_without_objects():
    assert objects().counts().tolist() == [1, 0, 2, 0]
    assert len(objects()) == 3


def test_objects_of_one_image():
    second = objects().of_image(2)
    assert second.n_images == 1
    assert second.image_index.tolist() == [0, 0]
    assert second.what.tolist() == [[2, 3], [4, 5]]
    assert second.patches.shape == (2, 3, 2, 2)
    assert second.alpha is None
    assert len(objects().of_image(1)) == 0


def test_rows_by_mask_and_by_index():
    kept = objects().where(objects().present > 0.75)
    assert kept.depth.tolist() == [1, 2]
    assert kept.n_images == 4
    assert objects().where(torch.tensor([2])).depth.tolist() == [3]


def test_moving_keeps_everything():
    moved = objects().to("cpu")
    assert torch.equal(moved.boxes, objects().boxes)
    assert moved.n_images == 4


def test_predictions_take_the_means_of_their_cell():
    latents = CellLatents(
        boxes=torch.arange(24.0).view(1, 6, 4),
        present=torch.arange(6.0).view(1, 6) / 10,
        what=torch.arange(6.0).view(1, 3, 2),
        depth=torch.tensor([[7.0, 8.0, 9.0]]),
        cell_of_box=torch.tensor([0, 0, 1, 1, 2, 2]),
        reset=torch.zeros(1, 6, dtype=torch.bool),
    )
    boxes, present, what, depth = latents.gather(torch.tensor([0, 0]), torch.tensor([3, 4]))
    assert boxes[0].tolist() == [12, 13, 14, 15]
    torch.testing.assert_close(present, torch.tensor([0.3, 0.4]))
    assert what.tolist() == [[2, 3], [4, 5]]
    assert depth.tolist() == [8, 9]


def test_gradients_of_gathered_means_are_the_same_every_time_on_several_threads():
    generator = torch.Generator().manual_seed(0)
    b, k, d, m = 2, 3, 4, 60_000
    latents = CellLatents(
        boxes=torch.rand(b, 2 * k, 4, generator=generator),
        present=torch.rand(b, 2 * k, generator=generator),
        what=torch.rand(b, k, d, generator=generator).requires_grad_(),
        depth=torch.rand(b, k, generator=generator).requires_grad_(),
        cell_of_box=torch.arange(2 * k) // 2,
        reset=torch.zeros(b, 2 * k, dtype=torch.bool),
    )
    image = torch.randint(b, (m,), generator=generator).sort().values
    prediction = torch.randint(2 * k, (m,), generator=generator)
    _, _, what, depth = latents.gather(image, prediction)
    loss = (what * torch.randn(m, d, generator=generator)).sum() + (
        depth * torch.randn(m, generator=generator)
    ).sum()
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 2, 2, 2):
            torch.set_num_threads(n)
            found.append(torch.autograd.grad(loss, (latents.what, latents.depth), retain_graph=True))
    finally:
        torch.set_num_threads(threads)
    for what_grad, depth_grad in found[1:]:
        assert torch.equal(what_grad, found[0][0]) and torch.equal(depth_grad, found[0][1])
