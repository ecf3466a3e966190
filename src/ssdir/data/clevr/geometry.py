"""The geometry of CLEVR scenes: cameras, solids, and their exact outlines, boxes and masks.

World: z up, objects rest on the plane z = 0. The camera looks at the origin and is level, so that its location says
all; its focal length is 35/32 of the image's width (a 35 mm lens on a 32 mm sensor). Image coordinates: u to the
right, v down, pixel i covering [i, i + 1); depth is the distance along the optical axis. These are the conventions and
constants of the programme that made CLEVR (Johnson et al., "CLEVR", CVPR 2017; clevr-dataset-gen), its meshes measured.

Solids are convex, and the outline of a convex body needs nothing but its support function. A point X lies within
``t`` pixels of the image's centre, along the direction e, exactly if n(t) . (X - C) <= 0, where C is the camera and
n(t) = f (e_u x_axis - e_v y_axis) + t z_axis. So the body's extent along e is the root of
h(n(t)) - n(t) . C, a convex function of t (h: support function). Newton's method takes the support point for n(t),
projects it, and has the next t: from any point of the body it climbs to the root, and converges quadratically.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

FOCAL_SHARE = 35 / 32
"""Focal length over the image's width."""
NOMINAL_CAMERA = (7.481131553649902, -6.5076398849487305, 5.34366512298584)
"""Where the camera stands, but for its jitter."""
JITTER = 0.5
"""Each coordinate of the camera is moved by a uniform draw within ± this."""
RADII = {"large": 0.7, "small": 0.35}
"""Radius, or half a side, by size."""

# At radius 1: the ball that rounds each solid's edges (a sphere is nothing else).
_CUBE_ROUNDING, _CYLINDER_ROUNDING, _SPHERE_RADIUS = 0.187, 0.05, 0.9993
# Standard deviations of what a scene file tells: depths are of single precision, pixels are rounded.
_DEPTH_DEVIATION, _PIXEL_DEVIATION = 1e-6, 12**-0.5
_PRIOR_DEVIATION = JITTER * 3**-0.5
# Depths count fully only in the end: else, with objects nearly in a row, the steps leave the region of the solution.
_FIT_DEPTH_DEVIATIONS = (*np.geomspace(0.03, _DEPTH_DEVIATION, 8), *(3 * [_DEPTH_DEVIATION]))
_ENOUGH_OBJECTS = 3
_NEWTON_STEPS = 4


def camera_axes(location: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3 3"]:
    """Unit vectors of a camera that looks at the origin: to the right, up, and back, as rows.

    >>> camera_axes(np.array([0.0, -5.0, 0.0])).astype(int).tolist()
    [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    """
    back = location / np.linalg.norm(location, axis=-1, keepdims=True)
    right = np.stack([-back[..., 1], back[..., 0], np.zeros_like(back[..., 0])], -1)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    return np.stack([right, np.cross(back, right), back], -2)


def project(
    points: Float[np.ndarray, "*s n 3"], location: Float[np.ndarray, "*s 3"], width: int, height: int
) -> Float[np.ndarray, "*s n 3"]:
    """World points in the image: u, v in pixels, and depth.

    >>> project(np.zeros((1, 3)), np.array([0.0, -5.0, 0.0]), 480, 320).tolist()
    [[240.0, 160.0, 5.0]]
    """
    seen = (points - location[..., None, :]) @ np.swapaxes(camera_axes(location), -1, -2)
    depth = -seen[..., 2]
    focal = FOCAL_SHARE * width
    return np.stack(
        [width / 2 + focal * seen[..., 0] / depth, height / 2 - focal * seen[..., 1] / depth, depth], -1
    )


@dataclass(frozen=True)
class Cameras:
    """Recovered cameras of several scenes."""

    locations: Float[np.ndarray, "s 3"]
    depth_residuals: Float[np.ndarray, " s"]
    """Root mean square, over a scene's objects, of recorded minus computed depth; in world units. 0 without objects."""
    pixel_residuals: Float[np.ndarray, " s"]
    """Largest distance between recorded and computed pixel, along an axis; rounding alone gives up to 0.5."""
    with_prior: Bool[np.ndarray, " s"]
    """Scenes of fewer than 3 objects, whose cameras lean on the nominal one."""


def fit_cameras(
    centres: Float[np.ndarray, "s n 3"],
    observed: Float[np.ndarray, "s n 3"],
    present: Bool[np.ndarray, "s n"],
    width: int,
    height: int,
) -> Cameras:
    """Cameras of scenes from where their objects are in the world and in the image: weighted least squares.

    Depths (exact to about 1e-6) and pixels (rounded) are weighted by their precision; Gauss-Newton from the nominal
    camera. Fewer than 3 objects do not fix a camera to that precision: there the nominal camera enters as a prior with
    the jitter's standard deviation.

    Args:
        centres: the objects' ``3d_coords``.
        observed: their ``pixel_coords``: u, v (rounded) and depth.
        present: which rows are objects; scenes of different sizes are filled up.
        width: of the images, pixels, as is ``height``.

    Returns:
        A camera for every scene, also for those that fit none: look at the residuals.
    """
    with_prior = present.sum(1) < _ENOUGH_OBJECTS
    prior = np.where(with_prior, _PRIOR_DEVIATION**-2, 0.0)[:, None]
    nominal = np.array(NOMINAL_CAMERA)
    locations = np.tile(nominal, (len(centres), 1))
    steps = 1e-6 * np.eye(3)
    for depth_deviation in _FIT_DEPTH_DEVIATIONS:
        weights = present[..., None] / np.array([_PIXEL_DEVIATION, _PIXEL_DEVIATION, depth_deviation])
        residuals = weights * (observed - project(centres, locations, width, height))
        slopes = [
            weights
            * (
                project(centres, locations + step, width, height)
                - project(centres, locations - step, width, height)
            )
            / 2e-6
            for step in steps
        ]
        jacobian = np.stack(slopes, -1).reshape(len(centres), -1, 3)
        transposed = np.swapaxes(jacobian, 1, 2)
        normal = transposed @ jacobian + prior[..., None] * np.eye(3)
        right = (transposed @ residuals.reshape(len(centres), -1, 1))[..., 0] + prior * (nominal - locations)
        # A trace of a ridge, for scenes that fix nothing; a bounded step, for scenes that do not fit.
        ridge = 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)
        locations = locations + np.linalg.solve(normal + ridge, right[..., None])[..., 0].clip(-0.5, 0.5)
    errors = np.where(present[..., None], observed - project(centres, locations, width, height), 0.0)
    count = present.sum(1).clip(1)
    return Cameras(
        locations,
        np.sqrt((errors[..., 2] ** 2).sum(1) / count),
        np.abs(errors[..., :2]).max(axis=(1, 2), initial=0.0),
        with_prior,
    )


@dataclass(frozen=True)
class Solids:
    """Upright convex bodies: the sum of a square, a disc, a vertical segment and a ball, each of which may be 0."""

    centres: Float[np.ndarray, "n 3"]
    yaws: Float[np.ndarray, " n"]
    """Rotation about z, radians."""
    squares: Float[np.ndarray, " n"]
    """Half a side."""
    discs: Float[np.ndarray, " n"]
    """Radius."""
    heights: Float[np.ndarray, " n"]
    """Half the segment's length."""
    balls: Float[np.ndarray, " n"]
    """Radius."""

    def support(self, directions: Float[np.ndarray, "n k 3"]) -> Float[np.ndarray, "n k 3"]:
        """The points of each body that lie furthest along ``directions`` (of any length)."""
        cosine, sine = (wave(self.yaws)[:, None] for wave in (np.cos, np.sin))
        x, y, z = directions[..., 0], directions[..., 1], directions[..., 2]
        flat = x * x + y * y
        round_ = self.balls[:, None] / np.sqrt(flat + z * z)
        level = round_ + self.discs[:, None] / np.sqrt(flat)
        corner_x = np.copysign(self.squares[:, None], cosine * x + sine * y)
        corner_y = np.copysign(self.squares[:, None], cosine * y - sine * x)
        points = np.empty_like(directions)
        points[..., 0] = level * x + cosine * corner_x - sine * corner_y
        points[..., 1] = level * y + sine * corner_x + cosine * corner_y
        points[..., 2] = round_ * z + np.copysign(self.heights[:, None], z)
        points += self.centres[:, None]
        return points


def clevr_solids(
    shapes: list[str],
    radii: Float[np.ndarray, " n"],
    centres: Float[np.ndarray, "n 3"],
    rotations: Float[np.ndarray, " n"],
) -> Solids:
    """CLEVR's cubes (with round edges), cylinders (with round rims) and spheres.

    ``rotations`` are taken as they stand in the scene files, as radians: the files' numbers lie in [0, 360), but
    the images were rendered with these numbers as radians.
    """
    cube, cylinder, sphere = (np.array([shape == name for shape in shapes]) * radii for name in SHAPES)
    straight = cube * (1 - _CUBE_ROUNDING), cylinder * (1 - _CYLINDER_ROUNDING)
    balls = cube * _CUBE_ROUNDING + cylinder * _CYLINDER_ROUNDING + sphere * _SPHERE_RADIUS
    return Solids(centres, rotations, *straight, straight[0] + straight[1], balls)


SHAPES = ("cube", "cylinder", "sphere")


def outlines(
    solids: Solids, location: Float[np.ndarray, "3"], width: int, height: int, directions: int = 256
) -> Float[np.ndarray, "n k 2"]:
    """The outline of each solid in the image: the furthest points (u, v) along ``directions`` evenly spaced angles.

    The angles start at "right" and turn by way of "down"; ``directions`` is a multiple of 4, so that the extreme
    points of the box are among them. The polygon of these points lies inside the true outline; 256 of them leave
    at most 1/13,000 of a round solid's radius between the two. Solids must lie before the camera.
    """
    right, up, back = camera_axes(location)
    focal = FOCAL_SHARE * width
    angles = 2 * np.pi / directions * np.arange(directions)
    cosine, sine = np.cos(angles), np.sin(angles)
    towards = focal * (cosine[:, None] * right - sine[:, None] * up)

    def seen(points: Float[np.ndarray, "n k 3"]) -> tuple[np.ndarray, np.ndarray]:
        in_camera = (points - location) @ np.stack([right, up, back], 1)
        scale = -focal / in_camera[..., 2]
        return in_camera[..., 0] * scale, -in_camera[..., 1] * scale

    u, v = seen(solids.centres[:, None])
    for _ in range(_NEWTON_STEPS):
        extent = cosine * u + sine * v
        u, v = seen(solids.support(towards + extent[..., None] * back))
    return np.stack([width / 2 + u, height / 2 + v], -1)


def outline_boxes(points: Float[np.ndarray, "n k 2"]) -> Float[np.ndarray, "n 4"]:
    """Corners of the boxes around outlines; they may leave the image."""
    return np.concatenate([points.min(1), points.max(1)], 1)


@dataclass(frozen=True)
class Rasterized:
    """Solids as an image shows them."""

    ids: UInt8[np.ndarray, "h w"]
    """Which solid a pixel shows: its place + 1, or 0."""
    visible: Int[np.ndarray, " n"]
    """Pixels of each solid that are seen."""
    amodal: Int[np.ndarray, " n"]
    """Pixels inside the image that each solid would have alone."""
    visible_boxes: Int[np.ndarray, "n 4"]
    """Corners of the boxes around the pixels that are seen; zeros where there are none."""


def rasterize(
    points: Float[np.ndarray, "n k 2"], distances: Float[np.ndarray, " n"], width: int, height: int
) -> Rasterized:
    """Rasterize convex outlines (as :func:`outlines` gives them) from far to near; a pixel is inside if its centre is.

    Raises :class:`ValueError` for more than 255 outlines.
    """
    n = len(points)
    if n > 255:
        raise ValueError(f"{n} objects do not fit into a mask of bytes (at most 255)")
    ids = np.zeros((height, width), np.uint8)
    amodal = np.zeros(n, np.int64)
    windows: list[tuple[slice, slice]] = [(slice(0), slice(0))] * n
    for index in np.argsort(-distances, kind="stable"):
        top, starts, ends = _runs(points[index], width, height)
        amodal[index] = (ends - starts).sum()
        if amodal[index]:
            window = (slice(top, top + len(starts)), slice(int(starts.min()), int(ends.max())))
            columns = np.arange(window[1].start, window[1].stop)
            inside = (columns >= starts[:, None]) & (columns < ends[:, None])
            ids[window][inside] = index + 1
            windows[index] = window
    visible = np.bincount(ids.reshape(-1), minlength=n + 1)[1:].astype(np.int64)
    boxes = [_visible_box(ids, index + 1, window) for index, window in enumerate(windows)]
    return Rasterized(ids, visible, amodal, np.array(boxes, np.int64).reshape(-1, 4))


def filled(points: Float[np.ndarray, "n k 2"], width: int, height: int) -> Bool[np.ndarray, "n height width"]:
    """Each convex outline alone, hidden parts too: the pixels whose centres lie in it."""
    masks = np.zeros((len(points), height, width), bool)
    columns = np.arange(width)
    for mask, outline in zip(masks, points, strict=True):
        top, starts, ends = _runs(outline, width, height)
        mask[top : top + len(starts)] = (columns >= starts[:, None]) & (columns < ends[:, None])
    return masks


def _runs(
    points: Float[np.ndarray, "k 2"], width: int, height: int
) -> tuple[int, Int[np.ndarray, " r"], Int[np.ndarray, " r"]]:
    """The pixels whose centres lie in a convex outline: first row, and each row's first and one-past-last column."""
    quarter = len(points) // 4
    first, last = points[3 * quarter, 1], points[quarter, 1]
    top, bottom = (int(np.clip(np.ceil(v - 0.5), 0, height)) for v in (first, last))
    rows = np.arange(top, bottom) + 0.5
    # Both sides run from the top to the bottom.
    right = np.concatenate([points[3 * quarter :], points[: quarter + 1]])
    left = points[3 * quarter : quarter - 1 : -1]
    starts, ends = (
        np.ceil(np.interp(rows, side[:, 1], side[:, 0]) - 0.5).clip(0, width).astype(np.int64)
        for side in (left, right)
    )
    return top, starts, np.maximum(starts, ends)


def _visible_box(
    ids: Shaped[np.ndarray, "h w"], number: int, window: tuple[slice, slice]
) -> tuple[int, int, int, int]:
    shown = ids[window] == number
    columns, rows = np.flatnonzero(shown.any(0)), np.flatnonzero(shown.any(1))
    if len(columns) == 0:
        return 0, 0, 0, 0
    left, top = window[1].start, window[0].start
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1
