"""Triangle meshes of the solids of CLEVR's scenes: a cube with rounded edges, a cylinder, a sphere."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_SIGNS = [(1, 1), (-1, 1), (-1, -1), (1, -1)]  # of the quarters
_FACETS = 24  # in a quarter turn


class SolidMesh(NamedTuple):
    """A closed surface of triangles."""

    points: Float[np.ndarray, "v 3"]
    normals: Float[np.ndarray, "v 3"]
    uv: Float[np.ndarray, "v 2"]
    """u runs around the vertical axis, v upwards."""
    faces: Int[np.ndarray, "t 3"]


@functools.lru_cache(maxsize=8)
def solid_mesh(square: float, disc: float, height: float, ball: float, facets: int = _FACETS) -> SolidMesh:
    """The surface of one of :class:`~ssdir.data.clevr.geometry.Solids`, at the origin, not turned.

    Vertices are the support points of a net of normals, ``facets`` to a quarter turn. Between the quarters, and at the
    equator, the same normal has two support points or more: there lie flat faces and straight edges.
    """
    quarter = np.linspace(0, np.pi / 2, facets + 1)
    flat = np.arange(1, facets) / facets if square else np.empty(0)  # between two quarters
    turn, east, north = (
        np.concatenate(parts)
        for parts in zip(
            *(
                (
                    np.concatenate([quarter + k * np.pi / 2, np.full(len(flat), (k + 1) * np.pi / 2)]),
                    np.concatenate([np.full(facets + 1, x), x + (next_x - x) * flat]),
                    np.concatenate([np.full(facets + 1, y), y + (next_y - y) * flat]),
                )
                for k, ((x, y), (next_x, next_y)) in enumerate(
                    zip(_SIGNS, _SIGNS[1:] + _SIGNS[:1], strict=True)
                )
            ),
            strict=True,
        )
    )
    rise = np.concatenate([-quarter[::-1], quarter])[:, None]
    up = np.repeat((-1, 1), facets + 1)[:, None]
    across, along = np.cos(turn), np.sin(turn)
    normals = np.stack(np.broadcast_arrays(np.cos(rise) * across, np.cos(rise) * along, np.sin(rise)), -1)
    points = ball * normals
    points[..., 0] += square * east + disc * across
    points[..., 1] += square * north + disc * along
    points[..., 2] += height * up
    rows, columns = points.shape[:2]
    here = np.arange(rows * columns).reshape(rows, columns)
    beside = np.roll(here, -1, 1)
    corners = np.stack([here[:-1], beside[:-1], beside[1:], here[1:]], -1).reshape(-1, 4)
    bottom = rows * columns + np.arange(columns)
    top = bottom + columns
    faces = np.concatenate(
        [
            corners[:, [0, 1, 2]],
            corners[:, [0, 2, 3]],
            np.stack([beside[0], here[0], bottom], 1),
            np.stack([here[-1], beside[-1], top], 1),
        ]
    )
    poles = np.repeat([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]], columns, axis=0)
    points = np.concatenate([points.reshape(-1, 3), (height + ball) * poles])
    first, second, third = points[faces].swapaxes(0, 1)
    areas = np.linalg.norm(np.cross(second - first, third - first), axis=1)
    u, v = np.meshgrid(np.arange(columns) / columns, np.arange(1, rows + 1) / (rows + 1))
    ends = np.stack([np.tile(u[0] + 0.5 / columns, 2), np.repeat([0.0, 1.0], columns)], 1)
    return SolidMesh(
        points,
        np.concatenate([normals.reshape(-1, 3), poles]),
        np.concatenate([np.stack([u, v], -1).reshape(-1, 2), ends]),
        faces[areas > 1e-12],
    )
