"""One phantom to one image."""

from __future__ import annotations

import numpy as np

from medsae.data.phantom import frontal
from medsae.data.phantom.canvas import Film, develop
from medsae.data.phantom.devices import devices, marker
from medsae.data.phantom.findings import plant
from medsae.data.phantom.frontal import SIDES, Scene
from medsae.data.phantom.model import Phantom


def film_of(phantom: Phantom, size: int) -> Film:
    """The pixel grid of a capture; `size` is the length of the shorter side in pixels."""
    c = phantom.capture
    height, width = (size, round(size * c.aspect)) if c.aspect >= 1 else (round(size / c.aspect), size)
    # A film covers 35 cm along its shorter side.
    return Film(height, width, 35.5 / (size * c.zoom), -c.shift_x, 1.8 - c.shift_y, c.tilt)


def scene_of(phantom: Phantom, size: int = 320) -> Scene:
    """The geometry of a frontal phantom before anything is drawn: what regions of findings are derived from."""
    scene = frontal.begin(film_of(phantom, size), phantom)
    frontal.body(scene)
    frontal.lungs(scene)
    return scene


def render_frontal(phantom: Phantom, size: int) -> np.ndarray:
    """A frontal phantom as uint8 [H, W]."""
    scene = scene_of(phantom, size)
    film, a, c = scene.film, phantom.anatomy, phantom.capture
    assert scene.body is not None and scene.air is not None and scene.density is not None
    airways = frontal.airways(scene)
    frontal.shoulder_girdle(scene)
    bone = frontal.spine(scene)
    frontal.ribs(scene)
    keep = plant(scene)
    frontal.vessels(scene, keep)
    solid = devices(scene)
    inside = np.minimum(scene.body, 1)
    thickness = scene.body * frontal.texture(scene)
    lost = airways
    for side in SIDES:
        lost = lost + scene.air[side] * (1 - scene.density[side])
    thickness = np.maximum(thickness - np.minimum(lost, thickness * np.float32(0.93)), 0)
    thickness += (bone + np.maximum(film.fine(), -1.5)) * np.where(solid > 0, 1, np.maximum(inside, 0.25)) + solid
    typical = 13.3 + 1.6 * a.habitus + 0.25 * a.breast
    grey = develop(
        np.maximum(thickness, 0), np.random.default_rng([c.seed, 33]), c.noise, typical + 3.0 * c.exposure, 9.0 if c.projection == "PA" else 10.0
    )
    return marker(scene, grey)


def render(phantom: Phantom, size: int = 320) -> np.ndarray:
    """Draws one phantom.

    Args:
        phantom: what to draw.
        size: length of the image's shorter side in pixels.

    Returns:
        Grey values, uint8 [H, W]; dense tissue is bright. A pure function of its arguments.
    """
    return render_frontal(phantom, size)
