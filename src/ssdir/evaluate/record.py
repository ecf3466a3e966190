"""For the record: where numbers come from, what they cost, and the line of every image."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import sys
from pathlib import Path
from typing import Any

import torch

from ssdir.data.folder import annotations_digest
from ssdir.evaluate.collect import Collected, device_of, image_side, joined
from ssdir.storage import atomic_write, tensors_fingerprint

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def provenance(
    model: Any, model_path: Path | str | None, data: Path, split: str, seed: int
) -> dict[str, Any]:
    """What was measured on what, with what."""
    config = getattr(getattr(model, "detector", model), "config", None)
    return {
        "model": type(model).__name__,
        "model_path": None if model_path is None else str(model_path),
        "model_checksum": tensors_fingerprint(model.state_dict())
        if isinstance(model, torch.nn.Module)
        else None,
        "class_agnostic": getattr(config, "class_agnostic", None),
        "has_background": bool(getattr(model, "has_background", False)),
        "image_side": image_side(model),
        "data": str(data),
        "data_checksum": annotations_digest(data, split),
        "split": split,
        "seed": seed,
        "ssdir": _version(),
        "torch": torch.__version__,
        "device": str(device_of(model)),
        "threads": torch.get_num_threads(),
    }


def reset_peak(device: torch.device) -> None:
    """Forget the peak memory so far, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        try:
            _RESET.write_text("5")
        except OSError:
            return  # not allowed here: the peak is then that of the whole process


def peak_mib(device: torch.device) -> float | None:
    """The most memory held since :func:`reset_peak`: of the accelerator where the model is on one, else of this
    process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def write_per_image(found: Collected, path: Path) -> None:
    """One line an image: how many objects there are, were found and were matched, and the image's error."""
    n = found.n_images
    pairs = found.matched()
    truth_image = joined(found.truth_image, torch.int64)
    columns: dict[str, list[Any]] = {
        "image_id": found.image_ids,
        "true_objects": truth_image.bincount(minlength=n).tolist(),
        "found_objects": joined(found.object_image, torch.int64).bincount(minlength=n).tolist(),
        "matched_objects": truth_image[pairs.truth].bincount(minlength=n).tolist(),
    }
    if found.image_mse:
        columns["image_mse"] = [f"{value:.6g}" for value in torch.cat(found.image_mse).tolist()]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue())


def _version() -> str | None:
    """The installed version; None when the package runs from its source folder."""
    try:
        return importlib.metadata.version("ssdir")
    except importlib.metadata.PackageNotFoundError:
        return None
