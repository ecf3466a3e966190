"""The packed form of objects, :class:`Objects`: what every model gives, one row an object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssdir.boxes import cxcywh_to_xyxy
from ssdir.common.errors import DataError, UserError, shown
from ssdir.common.storage import load_metadata, load_tensors, save_tensors
from ssdir.model.rows import chosen_rows

_SHAPES: dict[str, tuple[int | str, ...]] = {
    "boxes": ("m", 4),
    "present": ("m",),
    "what": ("m", "d"),
    "depth": ("m",),
    "image_index": ("m",),
    "patches": ("m", 3, "p", "p"),
    "alpha": ("m", 1, "p", "p"),
    "labels": ("m",),
}
"""The tensors of :class:`Objects`; a letter stands for the same number wherever it is."""
_INTEGERS = ("image_index", "labels")
_OPTIONAL = ("what", "depth", "patches", "alpha", "labels")
_MOST = 1 << 31  # images, or values of one
_KIND = "objects of ssdir, version 1"


class ObjectsError(UserError):
    """Parts of objects that do not fit together; the message names the part and both shapes."""


@dataclass(frozen=True, eq=False, repr=False)
class Objects:
    """Objects of a batch of images, one row each; what every model gives. A part a model lacks is None.

    Shapes are checked when objects are made. Patches belong to the ``what`` that they were rendered from: where
    :meth:`edit` (or ``dataclasses.replace``) gives another ``what``, the old patches and alpha are dropped, and
    ``render`` decodes new ones. So never change a tensor in place: patches would not notice.

    >>> scene = Objects(
    ...     boxes=torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.5, 0.5, 0.5]]), present=torch.tensor([0.9, 0.6]),
    ...     what=torch.eye(2), depth=torch.tensor([1.0, 2.0]), image_index=torch.tensor([0, 0]), n_images=1,
    ...     patches=torch.zeros(2, 3, 8, 8))
    >>> scene
    Objects(2 objects in 1 image, z_what 2, patches 3x8x8)
    >>> moved = scene.edit(boxes=scene.boxes + torch.tensor([0.25, 0, 0, 0]))
    >>> moved.boxes[0].tolist(), moved.patches is scene.patches
    ([0.5, 0.25, 0.5, 0.5], True)
    >>> scene.edit(what=-scene.what)
    Objects(2 objects in 1 image, z_what 2)
    >>> scene[-1].depth.tolist(), scene[scene.present > 0.8]
    ([2.0], Objects(1 object in 1 image, z_what 2, patches 3x8x8))
    >>> [round(float(one.present), 1) for one in scene]
    [0.9, 0.6]

    Raises:
        ObjectsError: a part is of another shape or type than the others ask for.
    """

    boxes: Float[Tensor, "m 4"]
    """cxcywh in [0, 1]."""
    present: Float[Tensor, " m"]
    """Probability in [0, 1]."""
    what: Float[Tensor, "m d"] | None
    """z_what."""
    depth: Float[Tensor, " m"] | None
    """z_depth; larger is nearer."""
    image_index: Int[Tensor, " m"]
    """The image of each object; rising in what models give."""
    n_images: int
    """Images of the batch; some may have no object."""
    patches: Float[Tensor, "m 3 p p"] | None = None
    """Decoded appearance in [0, 1]."""
    alpha: Float[Tensor, "m 1 p p"] | None = None
    """Decoded opacity in [0, 1] (models that have one)."""
    labels: Int[Tensor, " m"] | None = None
    """The likeliest class 0..C-1, of a model whose detector tells classes."""
    _rendered: tuple[Tensor | None, Tensor | None, Tensor | None] | None = field(default=None, kw_only=True)
    """``what``, and the patches and alpha that belong to it; ``dataclasses.replace`` hands it on."""

    def __post_init__(self) -> None:
        if self._rendered is not None and self._rendered[0] is not self.what:
            for name, old in zip(("patches", "alpha"), self._rendered[1:], strict=True):
                if getattr(self, name) is old:
                    object.__setattr__(self, name, None)
        object.__setattr__(self, "_rendered", (self.what, self.patches, self.alpha))
        # Comparing sizes would tie a traced graph to one number of objects.
        if not torch.compiler.is_compiling():
            self._check()

    def _check(self) -> None:
        """Shapes and types alone: values may lie on a GPU, which nobody should wait for."""
        sizes: dict[int | str, int] = {}
        for name, expected in _SHAPES.items():
            rows = getattr(self, name)
            if rows is None and name in _OPTIONAL:
                continue
            if not isinstance(rows, Tensor):
                raise ObjectsError(f"{name} is of type {type(rows).__name__}; give a tensor")
            for letter, size in zip(expected, rows.shape, strict=False):
                if isinstance(letter, str):
                    sizes.setdefault(letter, size)
            wanted = tuple(sizes.get(size, size) for size in expected)
            if rows.shape != wanted:
                raise ObjectsError(
                    f"{name} has shape {_written(rows.shape)}, but should have {_written(wanted)}"
                    + ("" if name == "boxes" else f", since boxes has {_written(self.boxes.shape)}")
                )
            if rows.is_floating_point() == (name in _INTEGERS):
                kind = "whole numbers" if name in _INTEGERS else "floating-point numbers"
                raise ObjectsError(f"{name} holds {rows.dtype}; give {kind}")
        if not isinstance(self.n_images, int) or self.n_images < 0:
            raise ObjectsError(f"n_images is {self.n_images!r}; give a number of images, 0 or more")

    def __repr__(self) -> str:
        words = [f"{_counted(len(self), 'object')} in {_counted(self.n_images, 'image')}"]
        if self.what is not None:
            words.append(f"z_what {self.what.shape[1]}")
        for name, part in (("patches", self.patches), ("alpha", self.alpha)):
            if part is not None:
                words.append(f"{name} {'x'.join(map(str, part.shape[1:]))}")
        return f"Objects({', '.join(words)})"

    def __len__(self) -> int:
        return int(self.boxes.shape[0])

    def __iter__(self) -> Iterator[Objects]:
        """The objects one by one, each as objects of one row."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, chosen: SupportsIndex | slice | Sequence[int] | np.ndarray | Tensor) -> Objects:
        """The chosen rows, of the same images.

        Args:
            chosen: one row (negative: from the end), a slice, a mask of m, or rows in any order.

        Raises:
            IndexError: there is no such row, or the mask has another length.
            TypeError: ``chosen`` is nothing of the kind.
        """
        rows = chosen_rows(chosen, self.boxes.shape[0])
        return self._mapped(lambda part: part[rows])

    @property
    def boxes_xyxy(self) -> Float[Tensor, "m 4"]:
        """Corners in [0, 1] (further out where a box leaves the image)."""
        return cxcywh_to_xyxy(self.boxes)

    def counts(self) -> Int[Tensor, " b"]:
        """Objects of each image.

        >>> two = Objects(torch.rand(2, 4), torch.ones(2), None, None, torch.tensor([0, 2]), n_images=3)
        >>> two.counts().tolist()
        [1, 0, 1]
        """
        return torch.bincount(self.image_index, minlength=self.n_images)

    def where(self, keep: Bool[Tensor, " m"] | Int[Tensor, "*r"] | int) -> Objects:
        """The same as ``objects[keep]``."""
        return self[keep]

    def of_image(self, i: int) -> Objects:
        """The objects of image ``i`` alone, as a batch of one image; IndexError where there is no such image."""
        if not 0 <= i < self.n_images:
            raise IndexError(f"there is no image {i}: there are {self.n_images}")
        chosen = self[self.image_index == i]
        return dataclasses.replace(chosen, image_index=torch.zeros_like(chosen.image_index), n_images=1)

    def edit(
        self,
        *,
        what: Float[Tensor, "m d"] | None = None,
        boxes: Float[Tensor, "m 4"] | None = None,
        depth: Float[Tensor, " m"] | None = None,
        present: Float[Tensor, " m"] | None = None,
    ) -> Objects:
        """The same objects with other values, brought to the device and type of the old ones; None keeps the old.

        With another ``what`` the patches and alpha are dropped: ``render`` decodes them anew.

        Raises:
            ObjectsError: a value has another shape than what it replaces, or these objects have no such part.
        """
        changes: dict[str, Tensor] = {}
        for name, new in (("what", what), ("boxes", boxes), ("depth", depth), ("present", present)):
            if new is None:
                continue
            old = self.require(name)
            if new.shape != old.shape:
                raise ObjectsError(
                    f"{name} has shape {_written(new.shape)}, but what it replaces has {_written(old.shape)}"
                )
            changes[name] = new.to(old)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Objects:
        """The same on another device."""
        return self._mapped(lambda rows: rows.to(device))

    def require(self, part: str) -> Tensor:
        """A part that may be absent, such as ``what``; :class:`ObjectsError` where it is."""
        found: Tensor | None = getattr(self, part)
        if found is None:
            raise ObjectsError(f"these objects have no {part}")
        return found

    def require_renderable(self, z_what_size: int, depth: bool = True, alpha: bool = False) -> None:
        """For models that render objects from their patches, or from ``what`` where there are none.

        Args:
            z_what_size: values of ``what`` that the model decodes.
            depth: whether it needs ``depth``.
            alpha: whether it needs ``alpha`` beside patches.

        Raises:
            ObjectsError: these objects lack what is needed.
        """
        if depth and self.depth is None:
            raise ObjectsError("these objects cannot be rendered: they have no depth")
        if self.patches is not None and not (alpha and self.alpha is None):
            return
        if self.what is None:
            raise ObjectsError("these objects cannot be rendered: they have neither patches nor what")
        if self.what.shape[1] != z_what_size:
            raise ObjectsError(
                f"these objects cannot be rendered: what has shape {_written(self.what.shape)}, but this model decodes "
                f"{_written((len(self), z_what_size))}"
            )

    def to_dict(self, patches: bool = True) -> dict[str, Any]:
        """Lists and numbers that JSON can hold; :meth:`from_dict` makes the same objects of them, in float32.

        Args:
            patches: whether to include patches and alpha, by far the longest of them.

        Raises:
            DataError: a value is NaN or infinite.
        """
        kept = self if patches else dataclasses.replace(self, patches=None, alpha=None)
        kept._require_valid("these objects cannot be written")
        sizes = {"n_images": self.n_images}
        if kept.what is not None:
            sizes["z_what_size"] = kept.what.shape[1]
        if kept.patches is not None:
            sizes["patch_size"] = kept.patches.shape[-1]
        return sizes | {name: part.tolist() for name, part in kept._parts().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Objects:
        """The objects of :meth:`to_dict`, on the CPU.

        Raises:
            DataError: an entry is missing, unknown, of another shape, NaN or infinite; the message names it.
        """
        if not isinstance(values, Mapping):
            raise DataError(
                f"these are no objects: from_dict takes what to_dict gives, not a {type(values).__name__}"
            )
        names = (*_SHAPES, "n_images", "z_what_size", "patch_size")
        for name in values:
            if name not in names:
                raise DataError(f"these are no objects: entry {str(name)[:100]!r} is unknown")
        for name in (*_SHAPES, "n_images"):
            if name not in _OPTIONAL and values.get(name) is None:
                raise DataError(f"these are no objects: entry {name!r} is missing")
        for name, of in (("n_images", "images"), ("z_what_size", "values"), ("patch_size", "pixels")):
            number = values.get(name)
            if number is not None and (type(number) is not int or not 0 <= number < _MOST):
                raise DataError(
                    f"these are no objects: {name} is {shown(number)}; give a number of {of}, 0 or more"
                )
        tails: dict[int | str, Any] = {"d": values.get("z_what_size"), "p": values.get("patch_size")}
        parts = {
            name: _tensor_of(name, values[name], [tails.get(size, size) for size in shape[1:]])
            for name, shape in _SHAPES.items()
            if values.get(name) is not None
        }
        return cls._read("these are no objects", parts, values["n_images"])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Only a file of objects is ever replaced.

        Raises:
            DataError: something else is at ``path``; a value is NaN or infinite; the disk is full.
        """
        path = Path(path)
        if path.exists() or path.is_symlink():
            ours = False
            with suppress(DataError):
                ours = load_metadata(path).get("kind") == _KIND
            if not ours:
                raise DataError(f"{path} exists and holds no objects that were saved; move it")
        self._require_valid(f"{path} is not written")
        save_tensors(path, self._parts(), {"kind": _KIND, "n_images": str(self.n_images)})

    @classmethod
    def load(cls, path: str | Path) -> Objects:
        """The objects of a file that :meth:`save` wrote, on the CPU.

        Raises:
            DataError: the file is absent, truncated, damaged, or holds something else.
        """
        metadata = load_metadata(path)
        if metadata.get("kind") != _KIND:
            raise DataError(f"{path} holds no objects; give a file that Objects.save wrote")
        n_images = metadata.get("n_images", "")
        return cls._read(
            f"{path} is damaged", load_tensors(path), int(n_images) if n_images.isdecimal() else -1
        )

    @classmethod
    def _read(cls, blame: str, parts: dict[str, Tensor], n_images: int) -> Objects:
        """Objects of tensors that were read; an error begins with ``blame``."""
        try:
            objects = cls(**{"what": None, "depth": None, **parts}, n_images=n_images)  # type: ignore[arg-type]
        except (ObjectsError, TypeError) as error:
            raise DataError(f"{blame}: {str(error).splitlines()[0]}") from error
        objects._require_valid(blame)
        return objects

    def _require_valid(self, blame: str) -> None:
        """Raise :class:`DataError` where a value is not finite or an object lies in no image."""
        for name, part in self._parts().items():
            if not part.isfinite().all():
                raise DataError(f"{blame}: {name} holds NaN or infinite values")
        outside = (self.image_index < 0) | (self.image_index >= self.n_images)
        if outside.any():
            raise DataError(
                f"{blame}: image_index names image {self.image_index[outside][0]} of {self.n_images}"
            )

    def _parts(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        parts = {name: getattr(self, name) for name in _SHAPES}
        return {name: part for name, part in parts.items() if part is not None}

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Objects:
        parts = {name: change(part) for name, part in self._parts().items()}
        return Objects(**{"what": None, "depth": None, **parts}, n_images=self.n_images)  # type: ignore[arg-type]


def _tensor_of(name: str, values: Any, tail: Sequence[Any]) -> Tensor:
    """A tensor of nested lists; ``tail`` is the shape of a row, for where there is none."""
    try:
        rows = torch.tensor(values) if values != [] else torch.zeros(0, *tail)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"these are no objects: {name} is no list of numbers of one shape") from error
    if name in _INTEGERS:
        if rows.numel() and rows.is_floating_point():
            raise DataError(f"these are no objects: {name} holds {rows.dtype}; give whole numbers")
        return rows.long()
    return rows.float()


def _written(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
