"""Plain words for measured numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Findings:
    """The words of a report."""

    summary: list[str]
    """Paragraphs."""
    tiles: list[tuple[str, str]]
    """Name and value of the main figures."""
    captions: dict[str, str]
    """What one sees in each figure, by the figure's name."""


def describe(metrics: Mapping[str, Any], pretrained: bool = False) -> Findings:
    """Put the metrics of an evaluation into words.

    Args:
        metrics: as in ``metrics.json``; entries that are absent or None are passed over.
        pretrained: nothing was trained here.
    """
    facts = _Facts(metrics)
    summary = [facts.detection(), facts.vectors(), facts.rendering(), facts.masks()]
    if pretrained:
        summary.append("Nothing was trained for this report: the weights came with the package.")
    return Findings([text for text in summary if text], facts.tiles(), facts.captions())


def of_hundred(share: float, noun: str) -> str:
    """A share of some things, in words that do not promise more than it holds.

    >>> of_hundred(0.934, "digits"), of_hundred(0.999, "digits"), of_hundred(0.001, "digits")
    ('93 of 100 digits', 'more than 99 of 100 digits', 'fewer than 1 of 100 digits')
    >>> of_hundred(1.0, "digits"), of_hundred(0.0, "digits")
    ('all digits', 'none of the digits')
    """
    if share in (0.0, 1.0):
        return f"none of the {noun}" if share == 0.0 else f"all {noun}"
    rounded = round(100 * share)
    if rounded in (0, 100):
        return f"{'fewer than 1' if rounded == 0 else 'more than 99'} of 100 {noun}"
    return f"{rounded} of 100 {noun}"


class _Facts:
    """The metrics with their parts at hand."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self.boxes: Mapping[str, Any] = metrics.get("detection") or {}
        self.images: Mapping[str, Any] = metrics.get("reconstruction") or {}
        self.segments: Mapping[str, Any] = metrics.get("segmentation") or {}
        self.order: Mapping[str, Any] = metrics.get("depth_order") or {}
        self.down: Mapping[str, Any] = metrics.get("downstream") or {}
        self.seconds: Mapping[str, Any] = metrics.get("seconds") or {}
        self.counts: Mapping[str, Any] = metrics.get("counts") or {}
        self.provenance: Mapping[str, Any] = metrics.get("provenance") or {}
        names = list(self.provenance.get("categories") or [])
        self.noun = "digits" if names == [str(i) for i in range(10)] else "objects"

    def detection(self) -> str:
        """How many were found, how many were invented."""
        true, found, matched = (self.counts.get(f"{k}_objects", 0) for k in ("true", "found", "matched"))
        images = self.counts.get("images", 0)
        split = self.provenance.get("split", "test")
        if not images:
            return ""
        if not true:
            return (
                f"None of the {images:,} {split} images holds an object, so there is nothing to find; the model "
                f"marked {found:,} places all the same." if found else
                f"None of the {images:,} {split} images holds an object, and the model found none."
            )  # fmt: skip
        text = (
            f"On {images:,} {split} images with {true:,} {self.noun} in all, the model finds "
            f"{of_hundred(matched / true, self.noun)}, each with one box that overlaps the true one by at least half"
        )
        if found:
            wrong = of_hundred(1 - matched / found, "boxes")
            text += f"; {wrong} it draws match no true one (false alarms, loose boxes, second boxes of one object)"
        text += "."
        ap50 = self.boxes.get("AP50")
        if ap50 is None:
            return text
        verdict = (
            "nearly perfect" if ap50 >= 0.95 else "good" if ap50 >= 0.85 else "fair" if ap50 >= 0.6
            else "weak" if ap50 >= 0.3 else "poor: it has not learned to find objects"
        )  # fmt: skip
        return (
            f"{text} AP50, which weighs finding against inventing at every threshold, is {ap50:.3f} of at most 1: "
            f"{verdict}."
        )

    def vectors(self) -> str:
        """What a linear probe reads from z_what."""
        accuracy = self.down.get("matched_accuracy")
        if accuracy is None:
            reason = self.down.get("reason")
            return f"What the vectors know about classes was not measured: {reason}." if reason else ""
        end_to_end, chance = self.down.get("end_to_end_accuracy"), self.down.get("chance")
        what = "digit" if self.noun == "digits" else str(self.down.get("attribute", "class"))
        unsupervised = self.provenance.get("class_agnostic") is True
        text = (
            f"Each object is described by one vector, z_what{', learned without any class label' * unsupervised}. A "
            f"linear probe, fitted afterwards on labelled training objects, reads from it the {what} of "
            f"{of_hundred(accuracy, 'found ' + self.noun)}"
        )
        if chance is not None:
            text += f" (chance: {chance:.0%})"
        text += "."
        if end_to_end is not None:
            text += f" So {of_hundred(end_to_end, self.noun)} are both found and read right."
        text += self._attributes(what)
        untrained = (self.down.get("untrained") or {}).get("matched_accuracy")
        if untrained is None:
            return text
        text += (
            f" With the same boxes, the vectors of an untrained encoder give {untrained:.0%} of the found: "
        )
        gain = accuracy - untrained
        if gain > 0.02:
            return f"{text}learning adds {100 * gain:.0f} points."
        return f"{text}learning has added nothing that the probe can use."

    def _attributes(self, told: str) -> str:
        """The other attributes, where there are several."""
        others = [
            f"{name} {scores['matched_accuracy']:.0%} (chance: {scores['chance']:.0%})"
            for name, scores in (self.down.get("attributes") or {}).items()
            if name != told and None not in (scores.get("matched_accuracy"), scores.get("chance"))
        ]
        return f" Further attributes, read right of those found: {', '.join(others)}." if others else ""

    def rendering(self) -> str:
        """How near the rendered images come."""
        error, black = self.images.get("image_mse"), self.images.get("image_mse_black")
        if error is None:
            return ""
        parts = "with the background" if self.provenance.get("has_background") else "from its objects alone"
        text = f"Rendered {parts}, an image is off by {error:.4f} (mean squared error)"
        if black is None or black == 0:
            return text + "."
        if error < black:
            return f"{text}; leaving it black would be off by {black:.4f}, {black / error:.1f} times as much."
        return f"{text}, no better than leaving it black ({black:.4f})."

    def masks(self) -> str:
        """How well what pixels show agrees with true masks, and whether the nearer object is told."""
        parts = []
        agreement, overlap = self.segments.get("ari_fg"), self.segments.get("miou")
        if agreement is not None and overlap is not None:
            stand = {
                "opacity": "Its objects' opacity, by their order, stands for masks",
                "weights": "Its slots' normalised masks are compared",
                "boxes": "The model has no opacity, so its boxes stand for masks",
            }.get(str(self.segments.get("masks")), "Masks are compared")
            parts.append(
                f"{stand}: on {self.segments['images']:,} images with true masks ARI-FG is {agreement:.3f} (1 is "
                f"perfect, 0 is chance) and the mean IoU of true objects {overlap:.3f}."
            )
        if self.order.get("share") is not None:
            pairs = self.order["pairs"]
            parts.append(
                f"Of {pairs:,} {'pair' if pairs == 1 else 'pairs'} of found objects whose boxes overlap, z_depth tells "
                f"the nearer one in {self.order['share']:.1%}."
            )
        return " ".join(parts)

    def tiles(self) -> list[tuple[str, str]]:
        """The main figures."""
        pairs = [
            ("AP50: boxes", self.boxes.get("AP50"), "{:.3f}"),
            ("AP, mean over overlaps", self.boxes.get("AP"), "{:.3f}"),
            ("right count", self.boxes.get("count_accuracy"), "{:.0%}"),
            ("read right, of those found", self.down.get("matched_accuracy"), "{:.1%}"),
            ("found and read right", self.down.get("end_to_end_accuracy"), "{:.1%}"),
            ("ARI-FG: masks", self.segments.get("ari_fg"), "{:.3f}"),
            ("mIoU: masks of objects", self.segments.get("miou"), "{:.3f}"),
            ("image error (MSE)", self.images.get("image_mse"), "{:.4f}"),
            ("object error (MSE)", self.images.get("object_mse"), "{:.4f}"),
        ]
        tiles = [(name, pattern.format(value)) for name, value, pattern in pairs if value is not None]
        each = self.seconds.get("inference_per_image")
        if each:
            tiles.append(("an image, batched", f"{1000 * each:.1f} ms" if each < 1 else f"{each:.1f} s"))
        return tiles

    def captions(self) -> dict[str, str]:
        """What one sees in each figure."""
        renders = self.images.get("image_mse") is not None
        ap50 = self.boxes.get("AP50")
        scenes = (
            "One scene a row, from few objects to many, chosen by their number and not by their looks. The input; what "
            "the model renders; the same with the boxes it found; then single objects, as decoded "
            "from their vectors, framed in the colour of their box, large ones first (white boxes: further "
            "objects)."
            if renders else
            "One scene a row, from few objects to many, chosen by their number and not by their looks: the input, and "
            "the boxes found in it with a presence above 0.5."
        )  # fmt: skip
        apart = self.down.get("matched_accuracy")
        return {
            "scenes": scenes,
            "traversals": (
                "Two objects, each nearest to the middle of its class. In each row z_what moves along one principal "
                "component of all vectors, from two standard deviations below the mean to two above, while all else "
                "stays; the framed patch is the object itself. The rows are the components that vary most."
            ),
            "z_what": (
                f"Vectors of found {self.noun}, laid out in the plane by t-SNE so that similar ones lie together, and "
                "coloured by their true class afterwards; the layout does not know the classes. "
                + (
                    ""
                    if apart is None
                    else "Groups of one colour mean that the vectors tell that class apart without having been told."
                    if apart >= 0.6
                    else "Colours mix: the vectors tell the classes apart only in part."
                )
            ).strip(),
            "precision_recall": (
                "Going down the list of boxes from the surest to the least sure: which share of the true objects has "
                "been found so far (recall), and which share of the boxes so far is right (precision), at IoU 0.5. "
                + ("" if ap50 is None else f"The area below the curve is AP50 = {ap50:.3f}.")
            ).strip(),
            "curves": (
                "The loss and its terms over the training steps, as logged (faint) and smoothed; the number in the "
                "corner is the last smoothed value. A term that does not move is not being learned."
            ),
        }
