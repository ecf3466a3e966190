"""Training of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.config import PRESENT_THRESHOLD, DetectorLossConfig
from ssdir.data.batch import Batch
from ssdir.data.mnist.streaming import Images
from ssdir.detector.loss import MultiboxLoss
from ssdir.detector.ssd import Detections, Detector
from ssdir.evaluation.threshold import best_f1
from ssdir.model.loss_output import LossOutput
from ssdir.model.pretrained import CONFIG, read_config, save_detector, suggested_threshold
from ssdir.plots.overlay import grid_of, to_picture, with_boxes
from ssdir.training.tasks.base import PICTURE_IMAGES, Task
from ssdir.training.tasks.validation import Means, box_average_precision, recall_precision


class DetectorTask(Task):
    """A detector and the multibox loss.

    Args:
        detector: the network, with the weights it starts from.
        config: of the loss.
        categories: names of the classes, saved with the model.
        initial_weights: where its first weights come from, for the run's description; None: from the seed.
    """

    kind = "detector"
    validation_columns = (
        "loss", "box", "score", "AP50", "AP", "recall", "precision", "best_F1", "best_presence",
    )  # fmt: skip

    def __init__(
        self,
        detector: Detector,
        config: DetectorLossConfig,
        categories: tuple[str, ...] | None = None,
        initial_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.categories = categories
        self.initial_weights = initial_weights
        self.model: Detector = detector
        self.objective = MultiboxLoss(config)
        self.weights = self.objective.weights
        self.image_size = detector.config.image_size

    def forward(self, batch: Batch, generator: torch.Generator, step: int | None = None) -> LossOutput:
        output = self.model(batch.images)
        losses = self.objective(self.model, output, batch)
        n_images = len(batch)
        with torch.no_grad():
            fired = (self.model.presence(output) > PRESENT_THRESHOLD).sum() / n_images
        return LossOutput(losses, {"fired_per_image": fired, "true_per_image": len(batch.boxes) / n_images})

    def validate(self, dataset: Images, limit: int) -> dict[str, float]:
        """Mean losses; COCO AP where faster-coco-eval is installed; recall and precision at presence > 0.5; the best
        F1, and the presence above which it is reached, which is kept as the detector's suggestion."""
        losses = Means()
        found: list[Detections] = []
        truth, truth_index, n_images = [], [], 0
        for batch, generator in self._batches(dataset, limit):
            terms = self(batch, generator)
            losses.add({"loss": self.weighted(terms.losses), **terms.losses}, len(batch))
            found.append(self.model.detect(batch.images).to("cpu"))
            truth.append(cxcywh_to_xyxy(batch.boxes).cpu())
            truth_index.append(batch.image_index.cpu() + n_images)
            n_images += len(batch)
        if n_images == 0:
            return {}
        boxes = torch.cat([item.boxes_xyxy for item in found])
        scores = torch.cat([item.scores for item in found])
        counts = [0, *torch.tensor([item.n_images for item in found]).cumsum(0).tolist()]
        index = torch.cat([item.image_index + first for item, first in zip(found, counts[:-1], strict=True)])
        true_boxes, true_index = torch.cat(truth), torch.cat(truth_index)
        objects = scores > PRESENT_THRESHOLD
        best = best_f1(boxes, scores, index, true_boxes, true_index)
        self.model.suggested_present_threshold = None if best is None else best[1]
        return (
            losses.means()
            | ({} if best is None else {"best_F1": best[0], "best_presence": best[1]})
            | box_average_precision(boxes, scores, index, true_boxes, true_index, n_images)
            | recall_precision(boxes[objects], index[objects], true_boxes, true_index)
        )

    def visualize(self, dataset: Images) -> Image.Image:
        """Rows of: input, input with the true boxes, input with the boxes found."""
        batch = dataset.batch(range(min(PICTURE_IMAGES, len(dataset)))).to(self.device)
        found = self.model.detect(batch.images, score_threshold=PRESENT_THRESHOLD)
        rows = []
        for i, image in enumerate(batch.images):
            true = cxcywh_to_xyxy(batch.boxes[batch.image_index == i])
            boxed = [with_boxes(image, boxes) for boxes in (true, found.of_image(i).boxes_xyxy)]
            rows.append([to_picture(image), *boxed])
        return grid_of(rows)

    def summary(self, values: Mapping[str, float]) -> str:
        """
        >>> DetectorTask.summary(None, {"loss": 1.5, "best_F1": 0.8125, "best_presence": 0.32})
        'loss 1.5  best F1 0.81 at presence 0.32'
        """
        others = {name: value for name, value in values.items() if not name.startswith("best_")}
        summary = "  ".join(f"{name} {value:.4g}" for name, value in others.items())
        if "best_F1" not in values:
            return summary
        return f"{summary}  best F1 {values['best_F1']:.2f} at presence {values['best_presence']:g}"

    def restore(self, folder: Path) -> None:
        """The suggestion of the last validation."""
        self.model.suggested_present_threshold = suggested_threshold(read_config(folder), folder / CONFIG)

    def save(self, folder: Path) -> None:
        save_detector(self.model, folder, self.categories)

    def fingerprint(self) -> dict[str, Any]:
        """Where the first weights come from, unless the seed gives them."""
        return {} if self.initial_weights is None else {"initial_weights": self.initial_weights}

    def image_networks(self) -> Sequence[nn.Module]:
        return (self.model.backbone,)
