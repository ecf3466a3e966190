"""Pictures of CLEVR-like scenes, by Mitsuba 3 (extra ``render``).

Solids, camera, lamps and colours are those of CLEVR (Johnson et al., CVPR 2017; clevr-dataset-gen), whose pictures
Blender's Cycles rendered; lamp powers become radiances by Cycles' own rules. Three things are ours: rubber (diffuse
with a faint gloss, instead of velvet mixed by Fresnel's law; its two numbers were fitted to official pictures), the
ground (a plane that bends up behind the scene, likewise fitted), and light that other surfaces receive by way of metal:
it would need many more samples, and official pictures show it blurred, so that metal is taken for diffuse there.
Hence there are two renders: the whole picture with dull metal, and the pixels of metal objects with true metal.

A few samples a pixel leave noise, which :mod:`ssdir.data.clevr.denoise` takes out. Mitsuba's scalar variant needs no
compiler at run time, and on one thread a picture is a pure function of its arguments. Its LLVM variant would compile
kernels for nearly every scene (docs/data.md has the figures).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ssdir.common.errors import DataError
from ssdir.common.extras import how_to_install
from ssdir.data.clevr.denoise import denoise
from ssdir.data.clevr.geometry import FOCAL_SHARE, outlines, rasterize
from ssdir.data.clevr.meshes import SolidMesh, solid_mesh
from ssdir.data.clevr.placement import BEHIND, COLORS, LAMPS, RIGHT, PlacedScene

# Cycles: a square lamp of power P (its "strength") and area A has the radiance P / (4 A).
_LAMP_POWERS = (100.0, 30.0, 50.0)
_LAMP_SIDES = (0.5, 0.5, 1.0)
_LAMP_COLORS = ((1.0, 0.932, 0.817), (0.762, 0.818, 1.0), (1.0, 1.0, 1.0))
# How often a lamp (at last the sun) is sampled; near what each gives at the origin.
_LAMP_WEIGHTS = (1.0, 0.6, 1.0, 1.4)
_SUN_STRENGTH = 0.45
_SUN_TURN = (13.52, 23.89, 5.56)  # degrees about x, then y, then z, of a lamp that shines down
_SUN_SIZE, _SUN_DISTANCE = 0.1, 200.0  # tangent of the angle of its radius; far enough to be parallel
_BRIGHTNESS = 1.02  # of all lamps: fitted

_GROUND_ALBEDO = 0.8
_BEND_START, _BEND_RADIUS, _BEND_STEPS = 5.3, 18.0, 48
_REACH = 80.0  # of the ground to all sides: beyond what a camera sees

_RUBBER_ALBEDO, _RUBBER_GLOSS, _RUBBER_ROUGHNESS = 0.9, 0.03, 0.35
_METAL_ROUGHNESS = (0.01, 0.2)
_METAL_SHARE = 0.4  # of the rougher part
_METAL_ANISOTROPY = 0.25  # rougher across than around the vertical axis
_METAL_ALBEDO, _DULL_ALBEDO = 0.95, 0.6

_BOUNCES = 6
_BRIGHTEST = 3.0  # of a sample; 1 is white
_GUIDE = {"type": "aov", "aovs": "normals:sh_normal,colors:albedo"}
_GUIDE_SAMPLES = 4


def mitsuba() -> Any:
    """The module, set up.

    Raises:
        DataError: it is not installed; says how to.
    """
    try:
        import drjit
        import mitsuba as mi
    except ImportError as error:
        raise DataError(
            f"rendering CLEVR-like scenes needs Mitsuba 3 ({error}): {how_to_install('render')}"
        ) from error
    if mi.variant() != "scalar_rgb":
        mi.set_variant("scalar_rgb")
        mi.set_log_level(mi.LogLevel.Error)
    drjit.set_thread_count(1)
    return mi


def render(
    scene: PlacedScene, width: int = 480, height: int = 320, samples: int = 24
) -> UInt8[np.ndarray, "h w 3"]:
    """A scene's picture in sRGB.

    Args:
        scene: what is in it (:func:`ssdir.data.clevr.placement.make_scene`).
        width: pixels; the camera's focal length is 35/32 of it.
        height: pixels.
        samples: paths a pixel, half of them for either of the two renders whose difference tells the noise.

    Raises:
        DataError: Mitsuba is not installed, or ``samples`` is below 2.
    """
    if samples < 2:
        raise DataError(f"{samples} samples a pixel are too few to tell noise from content; take at least 2")
    mi = mitsuba()
    halves = np.empty((2, height, width, 3), np.float32)
    world, tracer = build(scene), mi.load_dict(_path_tracer())
    sensor = camera(scene, width, height, samples // 2)
    for half in range(2):
        halves[half] = mi.render(world, sensor=sensor, integrator=tracer, seed=2 * scene.noise_seed + half)
    sensor, guide = camera(scene, width, height, _GUIDE_SAMPLES), mi.load_dict(_GUIDE)
    features = np.array(mi.render(world, sensor=sensor, integrator=guide, seed=scene.noise_seed))
    _paint_metal(scene, world, halves, samples)
    return _srgb(denoise(halves, features))


def _paint_metal(scene: PlacedScene, world: Any, halves: Float[np.ndarray, "2 h w 3"], samples: int) -> None:
    """Render the surroundings of metal objects anew, with true metal, and take the pixels that show it.

    ``world`` has true metal afterwards. The ground that metal mirrors is lit by that metal in turn, along paths that
    few samples find and that are then bright beyond measure. So each sample is a render of its own, whose brightness is
    limited.
    """
    mi = mitsuba()
    height, width = halves.shape[1:3]
    points = outlines(scene.solids(), scene.camera, width, height)
    ids = rasterize(points, np.linalg.norm(scene.content.coords_3d - scene.camera, axis=1), width, height).ids
    tracer = mi.load_dict(_path_tracer())
    shapes = {shape.id(): shape for shape in world.shapes()}
    metals = np.flatnonzero(np.array(scene.content.materials) == "metal")
    for place in metals:
        color = np.array(COLORS[scene.content.colors[place]]) / 255
        shapes[f"object_{place}"].set_bsdf(mi.load_dict(_metal(color)))
    for place in metals:
        shown = _widened(ids == place + 1)
        if not shown.any():
            continue
        rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        sensor = camera(scene, width, height, 1, window, pixel_filter="box")
        colors = np.zeros((2, *shown[window].shape, 3), np.float32)
        for number, half in itertools.product(range(samples // 2), range(2)):
            seed = scene.noise_seed + 2 * number + half
            one = np.array(mi.render(world, sensor=sensor, integrator=tracer, seed=seed))
            colors[half] += one.clip(0, _BRIGHTEST) / (samples // 2)
        for half in range(2):
            halves[half][window][shown[window]] = _softened(colors[half])[shown[window]]


def _softened(image: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """Square pixels made about as soft as the Gaussian filter makes those of the other render."""
    for _ in range(2):
        before, after = np.insert(image, 0, image[:1], 0), np.append(image, image[-1:], 0)
        image = (0.8 * image + 0.1 * (before[:-1] + after[1:])).swapaxes(0, 1)
    return image


def _widened(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """With the pixels around it, which show it in part."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _path_tracer() -> dict[str, Any]:
    # "volpath", because it lets light pass by lamps, which are no obstacles in Cycles.
    return {"type": "volpath", "max_depth": _BOUNCES, "rr_depth": 100}


def camera(
    scene: PlacedScene,
    width: int,
    height: int,
    samples: int,
    window: tuple[slice, slice] | None = None,
    pixel_filter: str = "gaussian",
) -> Any:
    """Mitsuba's sensor; ``window`` (rows, columns) leaves out the rest of the picture."""
    mi = mitsuba()
    film: dict[str, Any] = {
        "type": "hdrfilm",
        "width": width,
        "height": height,
        "component_format": "float32",
        "pixel_format": "rgb",
        "rfilter": {"type": pixel_filter},
    }
    if window is not None:
        for name, part in zip(("y", "x"), window, strict=True):
            film[f"crop_offset_{name}"] = int(part.start)
        film |= {
            "crop_height": int(window[0].stop - window[0].start),
            "crop_width": int(window[1].stop - window[1].start),
        }
    return mi.load_dict(
        {
            "type": "perspective",
            "fov": float(np.degrees(2 * np.arctan(0.5 / FOCAL_SHARE))),
            "fov_axis": "x",
            "near_clip": 0.1,
            "far_clip": 2 * _REACH,
            "to_world": _looking_at_origin(mi, scene.camera),
            "film": film,
            "sampler": {"type": "multijitter" if samples > 1 else "independent", "sample_count": samples},
        }
    )


def build(scene: PlacedScene) -> Any:
    """Mitsuba's scene: objects (ids "object_0", ...), ground and lamps, with dull metal and without a camera."""
    mi = mitsuba()
    world: dict[str, Any] = {"type": "scene", "ground": _ground(mi), **_lights(mi, scene)}
    solids = scene.solids()
    for place, (color, material) in enumerate(
        zip(scene.content.colors, scene.content.materials, strict=True)
    ):
        look = _rubber if material == "rubber" else _dull_metal
        bsdf = mi.load_dict(look(np.array(COLORS[color]) / 255))
        mesh = solid_mesh(
            solids.squares[place], solids.discs[place], solids.heights[place], solids.balls[place]
        )
        cosine, sine = np.cos(solids.yaws[place]), np.sin(solids.yaws[place])
        turn = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
        name = f"object_{place}"
        world[name] = _mesh(
            mi,
            name,
            mesh._replace(points=mesh.points @ turn + solids.centres[place], normals=mesh.normals @ turn),
            bsdf,
        )
    # In order: when loading is optimized, the order of the lamps may vary, and with it the noise.
    return mi.load_dict(world, parallel=False, optimize=False)


def _rubber(color: Float[np.ndarray, "3"]) -> dict[str, Any]:
    return {
        "type": "blendbsdf",
        "weight": _RUBBER_GLOSS,
        "diffuse": {"type": "diffuse", "reflectance": _rgb(_RUBBER_ALBEDO * color)},
        "gloss": _mirror(np.full(3, 0.8), _RUBBER_ROUGHNESS),
    }


def _metal(color: Float[np.ndarray, "3"]) -> dict[str, Any]:
    sharp, rough = (
        _mirror(_METAL_ALBEDO * color, roughness, _METAL_ANISOTROPY) for roughness in _METAL_ROUGHNESS
    )
    return {"type": "blendbsdf", "weight": _METAL_SHARE, "sharp": sharp, "rough": rough}


def _dull_metal(color: Float[np.ndarray, "3"]) -> dict[str, Any]:
    return {"type": "diffuse", "reflectance": _rgb(_DULL_ALBEDO * color)}


def _mirror(color: Float[np.ndarray, "3"], roughness: float, anisotropy: float = 0.0) -> dict[str, Any]:
    return {
        "type": "roughconductor",
        "material": "none",
        "distribution": "ggx",
        "alpha_u": roughness * (1 - anisotropy),
        "alpha_v": roughness / (1 - anisotropy),
        "specular_reflectance": _rgb(color),
    }


def _lights(mi: Any, scene: PlacedScene) -> dict[str, Any]:
    world: dict[str, Any] = {}
    for number, place in enumerate(np.array(LAMPS) + scene.lamp_jitter):
        side, power = _LAMP_SIDES[number], _BRIGHTNESS * _LAMP_POWERS[number]
        radiance = power / (4 * side * side) * np.array(_LAMP_COLORS[number])
        world[f"lamp_{number}"] = {
            "type": "rectangle",
            "to_world": _looking_at_origin(mi, place) @ mi.ScalarTransform4f().scale(side / 2),
            "bsdf": {"type": "null"},
            "emitter": {
                "type": "area",
                "radiance": _rgb(radiance),
                "sampling_weight": _LAMP_WEIGHTS[number],
            },
        }
    x, y, z = np.radians(_SUN_TURN)
    away = np.array([np.sin(y) * np.cos(x), -np.sin(x), np.cos(y) * np.cos(x)])  # up, turned about x, then y
    away[:2] = np.cos(z) * away[0] - np.sin(z) * away[1], np.sin(z) * away[0] + np.cos(z) * away[1]
    of_sun = _BRIGHTNESS * _SUN_STRENGTH * (1 + _SUN_SIZE**-2) / np.pi
    world["sun"] = {
        "type": "disk",
        "to_world": _looking_at_origin(mi, _SUN_DISTANCE * away)
        @ mi.ScalarTransform4f().scale(_SUN_SIZE * _SUN_DISTANCE),
        "bsdf": {"type": "null"},
        "emitter": {
            "type": "area",
            "radiance": _rgb(np.full(3, of_sun)),
            "sampling_weight": _LAMP_WEIGHTS[3],
        },
    }
    return world


def _ground(mi: Any) -> Any:
    """A plane that bends up behind the scene, along a quarter of a circle."""
    angles = np.linspace(0, np.pi / 2, _BEND_STEPS)
    behind = np.concatenate([[-_REACH], _BEND_START + _BEND_RADIUS * np.sin(angles)])
    above = np.concatenate([[0.0], _BEND_RADIUS * (1 - np.cos(angles))])
    angles = np.concatenate([[0.0], angles])
    line = behind[:, None] * np.array(BEHIND) + above[:, None] * np.array([0, 0, 1])
    normals = np.cos(angles)[:, None] * np.array([0, 0, 1]) - np.sin(angles)[:, None] * np.array(BEHIND)
    points = np.concatenate([line - _REACH * np.array(RIGHT), line + _REACH * np.array(RIGHT)])
    first, n = np.arange(len(line) - 1), len(line)
    faces = np.concatenate(
        [np.stack([first, first + n, first + n + 1], 1), np.stack([first, first + n + 1, first + 1], 1)]
    )
    bsdf = mi.load_dict({"type": "diffuse", "reflectance": _rgb(np.full(3, _GROUND_ALBEDO))})
    return _mesh(
        mi, "ground", SolidMesh(points, np.concatenate([normals, normals]), points[:, :2], faces), bsdf
    )


def _mesh(mi: Any, name: str, surface: SolidMesh, bsdf: Any) -> Any:
    properties = mi.Properties()
    properties["bsdf"] = bsdf
    mesh = mi.Mesh(
        name,
        len(surface.points),
        len(surface.faces),
        props=properties,
        has_vertex_normals=True,
        has_vertex_texcoords=True,
    )
    parameters = mi.traverse(mesh)
    parameters["vertex_positions"] = surface.points.astype(np.float32).ravel()
    parameters["vertex_normals"] = surface.normals.astype(np.float32).ravel()
    parameters["vertex_texcoords"] = surface.uv.astype(np.float32).ravel()
    parameters["faces"] = surface.faces.astype(np.uint32).ravel()
    parameters.update()
    return mesh


def _looking_at_origin(mi: Any, place: Float[np.ndarray, "3"]) -> Any:
    return mi.ScalarTransform4f().look_at(origin=place.tolist(), target=[0, 0, 0], up=[0, 0, 1])


def _rgb(color: Float[np.ndarray, "3"]) -> dict[str, Any]:
    return {"type": "rgb", "value": color.tolist()}


def _srgb(linear: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.floor(255 * encoded + 0.5).astype(np.uint8)
