"""Checkpoints, from which a run goes on bit for bit.

A checkpoint is a folder that is either whole or absent (see :mod:`ssdir.common.storage`):

- ``config.json`` and ``model.safetensors``: the model as :func:`from_pretrained` loads it (the moving average of
  the weights, where one is kept);
- ``training.safetensors``: the optimizer's moments, the live weights where they differ from the model's, and the
  sums behind the next line of metrics.csv;
- ``training.json``: the step and what the numbers were made with;
- ``run.json``: the settings of the run and what else decides it (:func:`ssdir.training.run_folder.load_run_config`).

Nothing is pickled, and no generator state is kept: randomness is a pure function of seed, step and process.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdir.common.errors import DataError
from ssdir.common.storage import (
    atomic_folder,
    load_tensors,
    read_json,
    require_free_space,
    save_tensors,
    write_json,
)
from ssdir.config import TrainingConfig
from ssdir.model.pretrained import fill, require_finite
from ssdir.training.metrics import MetricAccumulator
from ssdir.training.optim import MovingAverage
from ssdir.training.run_folder import RUN, checkpoints
from ssdir.training.tasks.base import Task

# -- checkpoints -------------------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path,
    step: int,
    save_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    description: Mapping[str, Any],
    keep: int,
    model_bytes: int = 0,
) -> Path:
    """Write ``RUN/checkpoints/step_XXXXXX`` whole or not at all, then drop all but the ``keep`` newest.

    Args:
        run: the run folder.
        step: finished optimizer steps.
        save_model: writes config.json and model.safetensors into the folder it is given.
        tensors: the rest of the state (``training.safetensors``).
        values: the rest of the state that JSON holds (``training.json``); ``step`` is added, and how many tensors.
        description: of the run, as in its config.json (``run.json``).
        keep: checkpoints to keep, at least 1.
        model_bytes: size of the model, for the check of the free space.

    Raises:
        DataError: where the disk is too full; the older checkpoints are then untouched.
    """
    folder = run / "checkpoints" / f"step_{step:06d}"
    n_bytes = model_bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    require_free_space(folder.parent, n_bytes + 1_000_000, f"the checkpoint of step {step}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, "checkpoint") as temporary:
        save_model(temporary)
        save_tensors(temporary / "training.safetensors", tensors)
        write_json(temporary / "training.json", {"step": step, "tensors": len(tensors), **values})
        write_json(temporary / RUN, description)
    for old in checkpoints(run)[:-keep]:
        discard(old)
    return folder


def discard(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: a kill half-way must not leave what looks like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.tmp")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``model.safetensors`` and of ``training.safetensors``, and the values of ``training.json``.

    Raises:
        DataError: a truncated or missing file, parts that are not of one step, numbers that are not finite; the message
            says how to go on from the checkpoint before.
    """
    remedy = f"remove {folder} to resume from the checkpoint before it"
    try:
        model = load_tensors(folder / "model.safetensors")
        training = load_tensors(folder / "training.safetensors")
        values = read_json(folder / "training.json")
        _require_whole(folder, training, values)
    except DataError as error:
        raise DataError(f"{error}; or {remedy}") from error
    require_finite(model, f"{folder / 'model.safetensors'} cannot be used", remedy)
    # What waits to be logged may be undefined, such as the mean over no objects.
    state = {name: tensor for name, tensor in training.items() if name != "window"}
    require_finite(state, f"{folder / 'training.safetensors'} cannot be used", remedy)
    return model, training, values


def _require_whole(folder: Path, training: Mapping[str, Tensor], values: Any) -> None:
    """Refuse a checkpoint whose step is not that of its name and of its optimizer, or that lacks tensors."""
    step = values.get("step") if isinstance(values, dict) else None
    if type(step) is not int:
        raise DataError(f"{folder / 'training.json'} does not say the step")
    if folder.name != f"step_{step:06d}":
        raise DataError(f"{folder / 'training.json'} is of step {step}, not of the step in its folder's name")
    file, n = folder / "training.safetensors", len(training)
    counters = [float(item) for name, item in training.items() if name.startswith("optimizer/step/")]
    if not counters:
        raise DataError(f"{file} holds no state of the optimizer; copy the checkpoint again")
    if values.get("tensors", n) != n:
        raise DataError(f"{file} holds {n} of {values['tensors']} tensors; copy the checkpoint again")
    # Counters of parameters that had no gradient in some steps lag behind.
    if max(counters) != step:
        raise DataError(f"{file} is of step {max(counters):g}, but {folder / 'training.json'} of step {step}")


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy tensors into a module's parameters and buffers, keeping the memory formats of the module.

    Raises:
        DataError: names or shapes that are not the module's, each named.
    """
    fill(module, tensors, f"{source} is of another architecture", "use the settings it was trained with")


# -- optimizer state as named tensors ----------------------------------------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """An optimizer's state as ``optimizer/KEY/PARAMETER`` -> tensor."""
    return {
        f"optimizer/{key}/{name}": torch.as_tensor(value)
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of :func:`optimizer_tensors`; moments take the memory format of their parameter.

    Raises:
        DataError: state of a parameter that the optimizer does not have, or of another shape.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    fused = {item for group in optimizer.param_groups if group.get("fused") for item in group["params"]}
    for full_name, tensor in tensors.items():
        prefix, _, rest = full_name.partition("/")
        if prefix != "optimizer":
            continue
        key, _, name = rest.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.ndim > 0 and tensor.shape != parameter.shape):
            raise DataError(
                f"the checkpoint holds optimizer state for {name} with shape {tuple(tensor.shape)}, which the "
                "model does not train; resume with the settings of the run"
            )
        if key == "step":
            # A fused optimizer keeps its step counters beside the parameters, others on the CPU.
            optimizer.state[parameter][key] = tensor.to(
                parameter.device if parameter in fused else "cpu", copy=True
            )
        else:
            optimizer.state[parameter][key] = torch.empty_like(parameter, requires_grad=False).copy_(tensor)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``{"a": t}`` as ``{"prefix/a": t}``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`prefixed`; names with other prefixes are left out."""
    return {
        name.removeprefix(f"{prefix}/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}/")
    }


def nbytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of all parameters and buffers."""
    return sum(
        tensor.numel() * tensor.element_size() for item in modules for tensor in item.state_dict().values()
    )


class RunState:
    """All that a run needs to go on: weights, optimizer, moving average, open window, step and seconds."""

    def __init__(
        self,
        out: Path,
        task: Task,
        optimizer: Any,
        average: MovingAverage,
        window: MetricAccumulator,
        settings: TrainingConfig,
        description: Mapping[str, Any],
    ) -> None:
        self.out, self.task, self.average, self.window, self.settings = out, task, average, window, settings
        self.description = description
        self.optimizer: torch.optim.Optimizer = optimizer.optimizer  # inside Accelerate's wrapper
        self.names: dict[nn.Parameter, str] = {
            parameter: name for name, parameter in task.model.named_parameters() if parameter.requires_grad
        }
        self.trained = list(self.names)
        self.seconds = 0.0
        self.last_save: float | None = None
        self.notes: list[str] = []

    def save(self, step: int, seconds: float) -> None:
        """Write the checkpoint of ``step``, ``seconds`` into the run."""
        began = time.perf_counter()
        tensors = optimizer_tensors(self.optimizer, self.names)
        if self.average.shadow:  # model.safetensors then holds the average
            live = {name: parameter.detach().clone() for parameter, name in self.names.items()}
            tensors |= prefixed("live", live)
        if self.window.sums is not None:
            tensors["window"] = self.window.sums
        values = {
            "seconds": seconds,
            "window": {"names": self.window.names, "count": self.window.count},
            **_environment(),
        }
        with self.average.applied():
            save_checkpoint(
                self.out,
                step,
                self.task.save,
                tensors,
                values,
                description=self.description,
                keep=self.settings.keep_checkpoints,
                model_bytes=nbytes([self.task.model]),
            )
        self.last_save = time.perf_counter() - began

    def seconds_to_save(self) -> float:
        """What the last checkpoint took; before the first, what the model and two moments take at 100 MB/s."""
        return 3 * nbytes([self.task.model]) / 1e8 if self.last_save is None else self.last_save

    def load(self, folder: Path) -> int:
        """Take everything from a checkpoint; returns its step."""
        model, tensors, values = load_checkpoint(folder)
        self.task.restore(folder)
        load_weights(self.task.model, model, folder / "model.safetensors")
        if self.average.shadow:
            self.average.load(model)
        live = without_prefix("live", tensors)
        if live:
            load_weights(self.task.model, model | live, folder / "training.safetensors")
        load_optimizer_tensors(self.optimizer, self.names, tensors)
        self.seconds = float(values.get("seconds", 0.0))
        kept = values.get("window", {})
        if "window" in tensors:
            device = next(self.task.model.parameters()).device
            self.window.names, self.window.count = list(kept["names"]), int(kept["count"])
            self.window.sums = tensors["window"].to(device)
        self.notes = [
            f"note: {name} was {values.get(name)} and is {now}: the run goes on, but not bit for bit"
            for name, now in _environment().items()
            if values.get(name) != now
        ]
        return int(values["step"])


def _environment() -> dict[str, Any]:
    """What bit-exact resuming asks to be the same."""
    from accelerate import PartialState

    state = PartialState()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": state.num_processes,
        "device": state.device.type,
    }
