"""Devices and marks on frontal radiographs."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from medsae.data.phantom.canvas import curve, steps
from medsae.data.phantom.frontal import SIGN, Scene
from medsae.data.phantom.model import Phantom


def wire(scene: Scene, points: list[tuple[float, float]], metal: float, layer: int = 0) -> np.ndarray:
    """A thin dense thread through points; `metal` is its water-equivalent cross-section in cm^2. Returns its samples."""
    path = curve(points, 0.05)
    scene.film.splat(layer, path[:, 0], path[:, 1], metal * steps(path))
    return path


def devices(scene: Scene) -> np.ndarray:
    """Draws what the patient carries; returns extra thickness of solid parts on the grid, cm."""
    f = scene.phantom.findings
    solid = np.zeros(scene.film.shape, np.float32)
    rng = np.random.default_rng([scene.phantom.anatomy.seed, 30])
    if f.central_line > 0:
        central_line(scene, rng)
    if f.endotracheal_tube > 0:
        endotracheal_tube(scene, rng)
    if f.pacemaker > 0:
        solid += pacemaker(scene)
    if f.ecg_leads > 0:
        solid += ecg_leads(scene)
    return solid


def central_line(scene: Scene, rng: np.random.Generator) -> None:
    """A catheter from the neck or below the clavicle to the superior vena cava."""
    s = SIGN[scene.phantom.anatomy.line_side]
    cava = -1.5 + scene.shift * 0.8 + 1.0 * scene.yaw
    tip = rng.uniform(1.0, 3.0)
    if rng.random() < 0.55:
        start = [(s * rng.uniform(4.5, 7.5), -18.5), (s * 4.0, -14.0), (s * 2.9, -10.5)]
    else:
        start = [(s * 17.5, -2.0), (s * rng.uniform(13, 15), -7.5), (s * 7.5, -8.9), (s * 3.6, -8.2)]
    crossing = [(0.5, -6.4)] if s > 0 else []
    wire(scene, [*start, *crossing, (cava, -4.2), (cava - 0.1, -1.0), (cava, tip)], 0.55)


def endotracheal_tube(scene: Scene, rng: np.random.Generator) -> None:
    """A tube in the trachea: two pale walls, a radiopaque stripe, its tip above the carina."""
    middle = scene.shift * 0.9 + 2.0 * scene.yaw
    tip = rng.uniform(-4.6, -2.4)
    for offset, metal in ((-0.42, 0.16), (0.42, 0.16), (0.20, 0.42)):
        wire(scene, [(0.3 + offset, -19.0), (0.1 + offset, -13.0), (0.4 * middle + offset, -7.5), (0.8 * middle + offset, tip)], metal)


def pacemaker(scene: Scene) -> np.ndarray:
    """A generator below the clavicle with two leads to the right heart."""
    film = scene.film
    s = SIGN[scene.phantom.anatomy.pacemaker_side]
    cu, cv = s * 10.6, -5.2
    du, dv = (film.u - np.float32(cu)) / np.float32(2.35), (film.v - np.float32(cv)) / np.float32(1.95)
    du2, dv2 = du * du, dv * dv
    inside = du2 * du2 + dv2 * dv2
    box = np.float32(7.0) * (inside < 1) + np.float32(4.0) * ((inside > 0.62) & (inside < 1))
    connector = (np.abs(film.u - np.float32(cu - s * 0.6)) < 1.3) & (np.abs(film.v - np.float32(cv - 2.0)) < 0.55)
    box = np.maximum(box, np.float32(4.0) * connector)
    hx, hy = scene.heart_centre
    ax, ay, _ = scene.heart_axes
    cava = -1.6 + scene.shift
    loop = [(cu - s * 1.2, cv - 2.2), (cu + s * 1.0, cv - 3.4), (s * 6.0, -8.6), (s * 2.6, -7.6)]
    bridge = [(0.6, -5.8)] if s > 0 else []
    wire(scene, [*loop, *bridge, (cava, -3.0), (cava - 0.5, hy - 1.0), (hx - 0.2 * ax, hy + 0.62 * ay), (hx + 0.55 * ax, hy + 0.74 * ay)], 0.42)
    wire(scene, [*loop, *bridge, (cava + 0.2, -3.2), (cava - 0.3, hy - 1.5), (hx - 0.75 * ax, hy - 0.3 * ay), (hx - 0.55 * ax, hy - 0.75 * ay)], 0.36)
    return np.asarray(box, np.float32)


def ecg_leads(scene: Scene) -> np.ndarray:
    """Electrodes on the chest with snaps and loose cables."""
    film = scene.film
    rng = np.random.default_rng([scene.phantom.capture.seed, 31])
    solid = np.zeros(film.shape, np.float32)
    spots = [(-11.0, -6.5), (11.0, -6.5), (11.8, 6.5), (-11.5, 8.0), (1.0, 3.0)]
    for k in rng.permutation(5)[: int(rng.integers(3, 6))]:
        u = spots[k][0] + rng.normal(0, 1.2)
        v = spots[k][1] + rng.normal(0, 1.2)
        r2 = np.square(film.u - np.float32(u)) + np.square(film.v - np.float32(v))
        solid += np.float32(4.0) * (r2 < 0.30) + np.float32(2.2) * ((r2 > 0.55) & (r2 < 0.95))
        away = np.sign(u) if abs(u) > 2 else 1.0
        bend = rng.normal(0, 2.2, (3, 2))
        down = rng.random() < 0.5
        ends = (away * rng.uniform(10, 24), 21.0 if down else -17.0)
        wire(
            scene,
            [
                (u, v),
                (u + away * 2.0 + 0.5 * bend[0, 0], v + 1.5 + 0.5 * bend[0, 1]),
                (0.5 * (u + ends[0]) + bend[1, 0], 0.5 * (v + ends[1]) + bend[1, 1]),
                ends,
            ],
            0.32,
        )
    return solid


def marker(phantom: Phantom, grey: np.ndarray) -> np.ndarray:
    """Lead letters in the upper corner, burnt into the grey image."""
    c = phantom.capture
    if not c.marker:
        return grey
    image = Image.fromarray(grey)
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng([c.seed, 32])
    h, w = grey.shape
    x = w * (rng.uniform(0.90, 0.95) if c.marker == "L" else rng.uniform(0.04, 0.09))
    y = h * rng.uniform(0.04, 0.16)
    draw.text((x, y), c.marker, fill=245, font_size=round(h / rng.uniform(17, 22)))
    if c.projection == "AP":
        draw.text((x - (h / 16 if c.marker == "L" else 0), y + h / 15), "PORTABLE", fill=225, font_size=round(h / 42))
    return np.asarray(image)
