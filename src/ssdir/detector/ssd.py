"""The SSD detector: a backbone, a box head and a score head for each map, and detection with NMS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssdir.boxes import cxcywh_to_xyxy, decode_offsets, select_boxes
from ssdir.common.errors import DataError
from ssdir.config import DetectorConfig
from ssdir.data.batch import DetectorOutput
from ssdir.detector.backbone import Backbone, to_channels_last, zero_bias
from ssdir.detector.priors import make_priors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Detections:
    """Objects found in ``n_images`` images, packed: by image, then by falling score."""

    boxes_xyxy: Float[Tensor, "m 4"]
    """Corners in [0, 1], clipped to the image, of positive area."""
    scores: Float[Tensor, " m"]
    """Presence, in [0, 1]."""
    labels: Int[Tensor, " m"]
    """Classes 0..C-1; all 0 where the detector is class-agnostic."""
    image_index: Int[Tensor, " m"]
    """Whose object each row is, 0..n_images-1, sorted."""
    n_images: int

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def counts(self) -> Int[Tensor, " b"]:
        """Objects of each image."""
        return torch.bincount(self.image_index, minlength=self.n_images)

    def of_image(self, index: int) -> Detections:
        """The objects of one image, as detections of that image alone."""
        mine = self.image_index == index
        zeros = torch.zeros_like(self.image_index[mine])
        return Detections(self.boxes_xyxy[mine], self.scores[mine], self.labels[mine], zeros, 1)

    def to(self, device: torch.device | str) -> Detections:
        return Detections(
            self.boxes_xyxy.to(device),
            self.scores.to(device),
            self.labels.to(device),
            self.image_index.to(device),
            self.n_images,
        )


class Detector(nn.Module):
    """SSD (arXiv:1512.02325) on VGG11-BN: 880 predictions an image at 300 pixels.

    The heads are one 3x3 convolution a map, with Xavier weights and zero biases; they compute in float32 also
    under autocast, since they are cheap and a bfloat16 score has ties at every 1/64 of a logit.

    Attributes:
        priors: ``cxcywh`` of the prior of each prediction.
        cell_of_box: the cell of each prediction (k cells in the order map, row, column).
        mean, std: what ``normalise`` takes from images (ImageNet's).
        categories: names of the classes it was trained with, where known.
        suggested_present_threshold: presence with the best F1 on its validation split, where it was measured.
    """

    mean: Tensor
    std: Tensor
    priors: Tensor
    cell_of_box: Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.categories: tuple[str, ...] | None = None
        self.suggested_present_threshold: float | None = None
        self.backbone = Backbone(config)
        per_cell = config.boxes_per_cell
        n_logits = 1 if config.class_agnostic else config.n_classes + 1
        channels = self.backbone.map_channels
        self.where = nn.ModuleList([_head(wide, 4 * per_cell) for wide in channels])
        self.present = nn.ModuleList([_head(wide, n_logits * per_cell) for wide in channels])
        priors = make_priors(config, self.backbone.map_cells)
        # All four follow from the configuration, so checkpoints do not hold them.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.register_buffer("priors", priors, persistent=False)
        self.register_buffer("cell_of_box", torch.arange(len(priors)) // per_cell, persistent=False)

    def normalise(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] with ImageNet's mean and standard deviation taken out."""
        return (images - self.mean) / self.std

    def features(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The backbone's feature maps of images in [0, 1].

        Raises:
            DataError: the images do not have the side ``config.image_size``.
        """
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            raise DataError(
                f"the detector takes images of {side}x{side} pixels, not {images.shape[-1]}x{images.shape[-2]}; "
                "resize them with ssdir.data.images.squash"
            )
        return self.backbone(self.normalise(images))

    def heads(self, features: list[Float[Tensor, "b _ _ _"]]) -> DetectorOutput:
        """Box offsets and scores of every prediction."""
        n_logits = 1 if self.config.class_agnostic else self.config.n_classes + 1
        offsets, logits = [], []
        with torch.autocast(features[0].device.type, enabled=False):
            for where, present, feature in zip(self.where, self.present, features, strict=True):
                full = feature.float()
                b, _, height, width = full.shape
                n = height * width * self.config.boxes_per_cell
                offsets.append(where(full).permute(0, 2, 3, 1).reshape(b, n, 4))
                logits.append(present(full).permute(0, 2, 3, 1).reshape(b, n, n_logits))
        return DetectorOutput(torch.cat(offsets, dim=1), torch.cat(logits, dim=1))

    def forward(self, images: Float[Tensor, "b 3 h w"], maps: bool = False) -> DetectorOutput:
        """Offsets and logits for images in [0, 1] of side ``config.image_size``; with ``maps`` the feature maps too."""
        features = self.features(images)
        output = self.heads(features)
        return replace(output, maps=tuple(features)) if maps else output

    def boxes(self, output: DetectorOutput) -> Float[Tensor, "b n 4"]:
        """Predicted boxes, ``cxcywh`` in [0, 1] of the image (not clipped to it)."""
        return decode_offsets(output.offsets, self.priors)

    def presence(self, output: DetectorOutput) -> Float[Tensor, "b n"]:
        """Probability beta that a prediction is an object: see ``config.presence``."""
        if self.config.class_agnostic:
            return torch.sigmoid(output.logits[..., 0])
        background, classes = output.logits[..., 0], output.logits[..., 1:]
        if self.config.presence == "not_background":
            return torch.sigmoid(torch.logsumexp(classes, dim=-1) - background)
        best = torch.softmax(output.logits, dim=-1)[..., 1:].amax(-1)
        return torch.where(classes.amax(-1) > background, best, torch.zeros_like(best))

    def class_of(self, output: DetectorOutput) -> Int[Tensor, "b n"]:
        """The likeliest class 0..C-1 of every prediction, objects or not; 0 where class-agnostic."""
        if self.config.class_agnostic:
            return torch.zeros(output.logits.shape[:2], dtype=torch.long, device=output.logits.device)
        return output.logits[..., 1:].argmax(-1)

    def detect(
        self,
        images: Float[Tensor, "b 3 h w"],
        score_threshold: float = 0.01,
        nms_iou: float | Literal["config"] | None = "config",
        max_detections: int | None = None,
    ) -> Detections:
        """Find the objects of images in [0, 1] (no gradients; put the detector in eval mode before).

        Args:
            images: of side ``config.image_size``.
            score_threshold: keep predictions whose presence exceeds this.
            nms_iou: see ``config.nms_iou``; "config" takes the value of the configuration.
            max_detections: most objects of an image; None takes the value of the configuration.
        """
        with torch.no_grad():
            return self.detections(self(to_channels_last(images)), score_threshold, nms_iou, max_detections)

    def detections(
        self,
        output: DetectorOutput,
        score_threshold: float = 0.01,
        nms_iou: float | Literal["config"] | None = "config",
        max_detections: int | None = None,
    ) -> Detections:
        """The objects that the heads' output stands for; arguments as in :meth:`detect`.

        See :func:`ssdir.boxes.select_boxes`; NMS is over all classes together, since one object is one row.
        """
        iou = self.config.nms_iou if nms_iou == "config" else nms_iou
        most = self.config.max_detections if max_detections is None else max_detections
        n_images, n_predictions = output.logits.shape[:2]
        boxes, presence = self.boxes(output).flatten(0, 1), self.presence(output).flatten()
        image = torch.arange(n_images, device=boxes.device).repeat_interleave(n_predictions)
        kept = select_boxes(boxes, presence, image, score_threshold, iou, most)
        corners = cxcywh_to_xyxy(boxes[kept]).clamp(0, 1)
        return Detections(
            corners, presence[kept], self.class_of(output).flatten()[kept], image[kept], n_images
        )


def _head(channels: int, outputs: int) -> nn.Conv2d:
    head = nn.Conv2d(channels, outputs, 3, padding=1)
    nn.init.xavier_uniform_(head.weight)
    zero_bias(head)
    return head
