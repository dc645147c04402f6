"""One phantom to one image."""

from __future__ import annotations

import numpy as np

from medsae.data.phantom import frontal
from medsae.data.phantom.canvas import Film, develop
from medsae.data.phantom.devices import devices, marker
from medsae.data.phantom.findings import plant
from medsae.data.phantom.frontal import Scene
from medsae.data.phantom.lateral import lateral_thickness
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
    airways = frontal.airways(scene)
    frontal.shoulder_girdle(scene)
    bone = frontal.spine(scene)
    frontal.ribs(scene)
    keep = plant(scene)
    frontal.vessels(scene, keep)
    solid = devices(scene)
    inside = np.minimum(scene.body, 1)
    thickness = scene.body * frontal.texture(scene)
    lost = airways + scene.air * (1 - scene.density)
    thickness = np.maximum(thickness - np.minimum(lost, thickness * np.float32(0.93)), 0)
    thickness += (bone + np.maximum(film.fine(), -1.5)) * np.where(solid > 0, 1, np.maximum(inside, 0.25)) + solid
    typical = 12.2 + 1.6 * a.habitus + 0.25 * a.breast
    grey = develop(
        np.maximum(thickness, 0), np.random.default_rng([c.seed, 33]), c.noise, typical + 4.0 * c.exposure, 11.5 if c.projection == "PA" else 12.5
    )
    return marker(phantom, grey)


def render_lateral(phantom: Phantom, size: int) -> np.ndarray:
    """A lateral phantom as uint8 [H, W]."""
    film, a, c = film_of(phantom, size), phantom.anatomy, phantom.capture
    thickness = lateral_thickness(film, phantom) + np.maximum(film.fine(), -1.5)
    typical = 17.5 + 2.4 * a.habitus
    grey = develop(np.maximum(thickness, 0), np.random.default_rng([c.seed, 33]), c.noise, typical + 4.5 * c.exposure, 14.5)
    return marker(phantom, grey)


def render(phantom: Phantom, size: int = 320) -> np.ndarray:
    """Draws one phantom.

    Args:
        phantom: what to draw.
        size: length of the image's shorter side in pixels.

    Returns:
        Grey values, uint8 [H, W]; dense tissue is bright. A pure function of its arguments.
    """
    return render_lateral(phantom, size) if phantom.capture.view == "lateral" else render_frontal(phantom, size)
