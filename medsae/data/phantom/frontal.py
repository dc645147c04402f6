"""The frontal radiograph: healthy anatomy as thicknesses of tissue, with hooks for the findings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medsae.data.phantom.canvas import Film, curve, ellipse_box, ellipse_chord, noise_field, ramp, steps
from medsae.data.phantom.model import SIDES, Phantom

SIGN = {"left": 1.0, "right": -1.0}
"""Direction of a side on the image."""

RIB_WIDTH = (6.6, 9.6, 11.3, 12.3, 12.9, 13.3, 13.5, 13.5, 13.3, 12.9)
"""Half width of the rib cage at ribs 1 to 10, cm."""
RIB_DROP = (3.2, 5.0, 6.6, 7.6, 8.4, 8.8, 9.0, 9.0, 8.6, 8.0)
"""How far a rib descends from spine to sternum, cm."""


RIB_ANGLES = np.radians(np.linspace(10.0, 142.0, 320))
"""Angle around the chest of the samples of a rib, 0 at the spine."""


@dataclass
class Scene:
    """What is under construction: a film, its lungs and the tissue around them."""

    film: Film
    phantom: Phantom
    rng: np.random.Generator
    """Differences between patients; draws are in a fixed order so that findings never move the anatomy."""
    yaw: float
    """Sine of the patient's rotation."""
    width: float
    height: float
    dome: dict[str, float]
    """Height of each diaphragm dome, cm."""
    heart_centre: tuple[float, float]
    heart_axes: tuple[float, float, float]
    shift: float
    """Shift of the mediastinum by one-sided pressure or volume loss, cm."""
    body: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Thickness of the whole body, cm."""
    air: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Thickness of lung, cm."""
    density: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Density of lung relative to water; findings fill it."""
    lateral: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Half width of the inside of the rib cage, cm."""
    half: dict[str, np.ndarray] = field(default_factory=dict)
    """1 on a side of the patient, 0 on the other."""

    def x(self, u: Any, depth: Any = 0.0) -> Any:
        """Horizontal position (float or array) of something at `depth` cm in front of the body's axis, turned with the patient."""
        return u + depth * self.yaw


def rib_paths(scene: Scene, side: str) -> np.ndarray:
    """Centre lines of ribs 1 to 10, [10, n, 3]: u, v, and the length in space of a sample (tangential parts of a rib are bright)."""
    theta = RIB_ANGLES[None, :]
    a = np.array(RIB_WIDTH)[:, None] * scene.width + 0.35
    top = (-11.9 + 2.28 * np.arange(10)[:, None]) * scene.height
    drop = np.array(RIB_DROP)[:, None] * scene.height * (1.06 - 0.12 * scene.phantom.capture.inspiration)
    x = SIGN[side] * a * np.sin(theta) ** 0.92
    depth = -8.5 * np.cos(theta) * np.ones_like(x)
    y = top + drop * (1 - np.cos(theta)) / 2 - 0.5 * np.sin(2 * theta) * (theta < np.pi / 2)
    dx, dy, dz = (np.gradient(q, axis=1) for q in (x, y, depth))
    return np.stack([scene.x(x, depth), y, np.sqrt(dx * dx + dy * dy + dz * dz)], 2)


def begin(film: Film, phantom: Phantom) -> Scene:
    """Sizes and positions that everything else hangs on."""
    a, f, c = phantom.anatomy, phantom.findings, phantom.capture
    rng = np.random.default_rng([a.seed, 1])
    dome_base = 8.6 + 2.6 * c.inspiration - (0.5 if c.projection == "AP" else 0.0)
    individual = rng.normal(0, 0.35, 2)
    dome = {
        "right": (dome_base + individual[0]) * a.height - 1.9 * f.atelectasis_right,
        "left": (dome_base + 0.9 + individual[1]) * a.height - 1.9 * f.atelectasis_left,
    }
    shift = 0.0
    for side in SIDES:
        push = 1.8 * max(f.side("pneumothorax", side) - 0.55, 0) + 1.5 * max(f.side("effusion", side) - 0.6, 0) - 0.9 * f.side("atelectasis", side)
        shift -= SIGN[side] * push
    size = a.heart * (1.1 if c.projection == "AP" else 1.0) * (1 + 0.04 * (1 - c.inspiration))
    wide = size * (1 + 0.50 * f.cardiomegaly)
    axes = (6.0 * wide, 4.9 * size * (1 + 0.30 * f.cardiomegaly), 5.0 * size * (1 + 0.1 * f.cardiomegaly))
    yaw = float(np.sin(np.radians(c.rotation)))
    low = (dome["left"] + dome["right"]) / 2
    centre = (2.3 + 1.5 * f.cardiomegaly * size + shift + 4.0 * yaw, low - 3.7 * size - 0.6 * f.cardiomegaly)
    return Scene(film, phantom, rng, yaw, a.width, a.height, dome, centre, axes, shift)


def body(scene: Scene) -> None:
    """The soft-tissue outline: torso, neck, shoulders, arms and breasts, as thickness in cm."""
    film, a, c = scene.film, scene.phantom.anatomy, scene.phantom.capture
    u, v = film.u, film.v
    fat = 1.0 + 0.13 * a.habitus
    wall = (1.7 if a.sex == "Female" else 2.1) + 1.5 * max(a.habitus, -0.5)
    chest = 13.6 * scene.width + wall
    shoulder = (19.0 if a.sex == "Female" else 20.5) * scene.width * (0.5 + 0.5 * fat)
    abducted = 0.0 if c.projection == "AP" else 1.0
    half = film.along_v([-11, -7, -2.5, 1.0, 8, 18, 26], [shoulder, shoulder, chest + 1.6, chest, chest, chest + 1.0 * a.habitus, chest + a.habitus])
    depth = film.along_v([-20, -13, -7, 0, 10, 24], [5.2, 6.0, 8.8, 10.0 * fat, 10.4 * fat, 10.8 * fat])
    across = np.abs(u) / half
    across *= across
    top = film.along_u([-24, -19, -14, -7.5, -5, 5, 7.5, 14, 19, 24], [-7, -9.3, -10.6, -12.9, -15.5, -15.5, -12.9, -10.6, -9.3, -7])
    rise = np.clip((v - top) / np.float32(6.0), 0, 1)
    torso = depth * depth * (1 - across * np.sqrt(across)) * rise * (2 - rise)
    squared = np.maximum(torso, 0)
    middle = film.box(-7.5 * fat, 7.5 * fat, -60.0, -8.0)
    neck = np.float32(5.6 * fat) ** 2 - np.square(u[middle] - np.float32(0.5 * scene.yaw))
    neck *= ramp(-11.0 - v[middle], 3.0)
    np.maximum(squared[middle], neck, out=squared[middle])
    elbow_u, elbow_v = 23.5 + 3.0 * abducted, 14.0
    joint = 17.2 * (0.6 + 0.4 * scene.width)
    for sign in (-1.0, 1.0):
        # Distance to the upper arm's axis, from the shoulder joint to the elbow; beyond its radius there is no arm.
        du, dv, radius = elbow_u - joint, elbow_v + 6.2, 4.0 * fat
        near = sorted((sign * (joint - radius), sign * (elbow_u + radius)))
        arm = film.box(near[0], near[1], -6.2 - radius, elbow_v + radius)
        au, av = u[arm] * np.float32(sign) - np.float32(joint), v[arm] + np.float32(6.2)
        t = np.clip((au * np.float32(du) + av * np.float32(dv)) / np.float32(du * du + dv * dv), 0, 1)
        distance = np.square(au - t * np.float32(du)) + np.square(av - t * np.float32(dv))
        np.maximum(squared[arm], np.float32(radius**2) - distance, out=squared[arm])
    thickness = 2 * np.sqrt(squared)
    if a.breast > 0:
        for sign in (-1.0, 1.0):
            centre = (sign * (8.0 + 0.8 * a.habitus) * scene.width + 9 * scene.yaw, 5.2 + 0.8 * a.habitus)
            where, chord = ellipse_box(film, centre, (6.3, 6.0, a.breast), 0)
            thickness[where] += chord * ramp(v[where] - np.float32(centre[1] - 4.5), 7.0)
    # Turning the patient brings one side nearer to the film: it looks darker.
    thickness *= 1 + np.float32(0.45 * scene.yaw) * np.clip(u / np.float32(16), -1, 1)
    scene.body = thickness


def lungs(scene: Scene) -> None:
    """The air of each lung as thickness in cm, bounded by ribs, mediastinum and diaphragm."""
    film = scene.film
    u, v = film.u, film.v
    rib_v = [(-11.9 + 2.28 * i) * scene.height + RIB_DROP[i] * scene.height / 2 for i in range(10)]
    top = -12.0 * scene.height
    lateral = film.along_v([top - 0.6, top, top + 0.6, *rib_v, 26], [3.2, 4.8, 5.6, *(np.array(RIB_WIDTH) * scene.width), 12.6 * scene.width])
    # The apex is round: near the top the field narrows around u = 4.4.
    s = np.clip((v - np.float32(top)) / np.float32(3.6), 0, 1)
    cap = np.sqrt(s * (2 - s))
    outer = np.float32(4.3) + (lateral - np.float32(4.3)) * cap
    scene.lateral = outer
    heart = heart_chord(scene)
    centre = np.float32(scene.shift * 0.8)
    wide = 1 + 0.55 * scene.phantom.findings.mediastinum
    left_edge = film.along_v([-14, -9, -5, -3, -1, 1.5, 4, 20], [1.6, 2.2 * wide, 2.5 * wide, 2.7 * wide, 2.4 * wide, 2.2, 1.7, 1.5])
    right_edge = film.along_v([-14, -9, -5, -1, 2, 5, 20], [1.6, 2.1 * wide, 2.5 * wide, 2.3 * wide, 2.0, 1.6, 1.4])
    depth = np.float32(8.6) * cap
    medial_shift = centre + np.float32(3.0 * scene.yaw)
    # The lungs lie on either side of u = 0, so both are drawn at once on |u|.
    is_left = u > 0
    scene.half = {"left": is_left.astype(np.float32), "right": (~is_left).astype(np.float32)}
    across = np.abs(u)
    inner = np.where(is_left, left_edge + medial_shift, right_edge - medial_shift)
    inner = np.float32(4.3) + (inner - np.float32(4.3)) * np.sqrt(cap)
    relative = np.minimum(across / np.maximum(outer, 0.5), 1)
    squared = relative * relative
    chord = 2 * depth * np.sqrt(1 - squared * squared)
    # In front of the mediastinum and behind it the lungs nearly meet.
    chord = np.maximum(chord - heart, 0) * (np.float32(0.30) + np.float32(0.70) * ramp(across - inner, 0.28))
    # The dome is a cap that falls off toward the ribs: its rim makes the costophrenic angle.
    reach = (across - np.float32(5.2)) / np.float32(8.3 * scene.width)
    dome = np.where(is_left, np.float32(scene.dome["left"]), np.float32(scene.dome["right"]))
    below = v - dome - np.float32(4.0) * reach * reach * (np.float32(0.72) + np.float32(0.28) * reach)
    chord *= ramp(-below, 0.22) + np.float32(0.10) * np.exp(np.minimum(below * np.float32(-1 / 1.5), 0)) * (below > 0)
    scene.air = chord * (v > top)
    scene.density = np.full(film.shape, np.float32(0.27))


def heart_chord(scene: Scene) -> np.ndarray:
    """The heart and the great vessels: thickness of tissue in place of lung, cm."""
    film = scene.film
    cx, cy = scene.heart_centre
    ax, ay, az = scene.heart_axes
    a = scene.phantom.anatomy
    ventricle = ellipse_chord(film, (cx + 0.15 * ax, cy + 0.5), (ax, ay * 0.92, az), 27)
    atrium = ellipse_chord(film, (cx - 0.62 * ax, cy + 0.2), (0.50 * ax, 0.95 * ay, az * 0.9))
    base = ellipse_chord(film, (cx - 0.25 * ax, cy - 0.55 * ay), (0.58 * ax, 0.95 * ay, az * 0.85), 0)
    wide = 1 + 0.4 * scene.phantom.findings.mediastinum
    knob_size = a.aorta * wide
    knob = ellipse_chord(film, (1.9 * knob_size + scene.shift * 0.8 + 1.0 * scene.yaw, -2.6), (1.75 * knob_size, 1.9 * knob_size, 2.6))
    trunk = ellipse_chord(film, (2.5 + scene.shift * 0.8 + 3 * scene.yaw, 1.2), (1.7, 2.1, 3.0), 15)
    return np.maximum(np.maximum(np.maximum(ventricle, atrium), np.maximum(base, knob)), trunk) * np.float32(1.25)


def airways(scene: Scene) -> np.ndarray:
    """Air in trachea, main bronchi, stomach and bowel, cm (to take from the tissue)."""
    film, rng = scene.film, scene.rng
    middle = scene.shift * 0.9 + 2.0 * scene.yaw
    tree = film.box(middle - 6.0, middle + 6.0, -60.0, 4.5)
    u, v = film.u[tree], film.v[tree]
    bend = film.along_v([-20, -9, -4, 0], [0.0, 0.0, 0.15, -0.1], tree) + np.float32(middle) * ramp(v + 9.0, 7.0)
    inside = np.sqrt(np.maximum(1 - np.square((u - bend) / np.float32(0.95)), 0))
    air = np.zeros(film.shape, np.float32)
    air[tree] = np.float32(1.7) * inside * ramp(-0.2 - v, 0.8)
    for end in ((-3.3, 3.0), (4.0, 2.6)):
        du, dv = end[0], end[1]
        au, av = u - np.float32(middle - 0.1), v + 0.6
        t = np.clip((au * du + av * dv) / (du * du + dv * dv), 0, 1)
        distance = np.square(au - t * np.float32(du)) + np.square(av - t * np.float32(dv))
        air[tree] = np.maximum(air[tree], np.float32(1.6) * np.sqrt(np.maximum(np.float32(0.36) - distance, 0)))
    size, place = rng.uniform(0.6, 1.25), rng.uniform(4.0, 6.5)
    level = scene.dome["left"] + 1.1 + 1.3 * size
    where, bubble = ellipse_box(film, (place, level), (2.9 * size, 1.5 * size, 2.2 * size), rng.uniform(-12, 12))
    air[where] += bubble * ramp(np.float32(level + 0.6 * size) - film.v[where], 0.35)
    for _ in range(3):
        spot = (rng.uniform(-9, 10), scene.dome["left"] + rng.uniform(6, 11))
        where, gas = ellipse_box(film, spot, (rng.uniform(1.2, 3), rng.uniform(0.8, 1.4), 1.3), rng.uniform(-40, 40))
        air[where] += np.float32(0.7) * gas
    return air


def spine(scene: Scene) -> np.ndarray:
    """Vertebral bodies with disc spaces, pedicles and spinous processes, water-equivalent cm."""
    film = scene.film
    middle = scene.x(0.0, -6.5)
    column_box = film.box(middle - 3.6, middle + 3.6, -60.0, 60.0)
    u = film.u[column_box] - np.float32(middle)
    half = film.along_v([-18, -10, 10, 25], [1.35, 1.6, 2.1, 2.4], column_box)
    pitch = 2.32 * scene.height
    phase = film.v[column_box] / np.float32(pitch)
    phase = np.abs(phase - np.round(phase)) * 2
    column = np.sqrt(np.maximum(1 - np.square(u / half), 0))
    edges = np.exp(-np.square((np.abs(u) - half + 0.12) / np.float32(0.14)))
    bone = np.zeros(film.shape, np.float32)
    bone[column_box] = (np.float32(1.25) * column + np.float32(0.45) * edges) * (np.float32(0.45) + np.float32(0.55) * ramp(0.80 - phase, 0.12))
    rows = np.arange(-8, 11) * pitch
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring_u = np.concatenate([s * 1.15 + 0.30 * np.cos(angle) for s in (-1, 1)])
    ring_v = np.concatenate([0.45 * np.sin(angle)] * 2)
    film.splat(0, scene.x(ring_u[None, :], -7.0) + np.zeros((len(rows), 1)), rows[:, None] + ring_v[None, :] - 0.3, 0.022)
    tip = np.linspace(0, 1, 14)
    film.splat(0, scene.x(np.zeros((len(rows), 14)), -9.5), rows[:, None] + 0.5 + 0.8 * tip[None, :], 0.03)
    return bone


def ribs(scene: Scene) -> None:
    """Ribs as hollow tubes turned out of the image plane; breaks are displaced."""
    offsets = np.linspace(-1, 1, 11)
    profile = 0.55 * np.sqrt(np.maximum(1 - offsets**2, 0)) + 1.5 * np.exp(-(((np.abs(offsets) - 0.9) / 0.15) ** 2))
    profile /= profile.sum()
    f = scene.phantom.findings
    old = 1.0 - 0.004 * max(scene.phantom.anatomy.age - 40, 0)
    theta = np.degrees(RIB_ANGLES)
    half = 0.52 + 0.16 * np.clip((theta - 70) / 60, 0, 1)
    for side in SIDES:
        severity = f.side("fracture", side)
        first = scene.phantom.anatomy.fracture_rib
        paths = rib_paths(scene, side)
        centre, area = paths[..., :2], 1.25 * old * paths[..., 2] * np.clip((150 - theta) / 30, 0.25, 1)
        normal = normals(centre)
        broken = 0 if severity == 0 else 2 + round(2 * severity)
        for rib in range(first, min(first + broken, len(centre))):
            centre[rib], area[rib] = fracture(centre[rib], area[rib], theta, normal[rib], severity, 58.0 if rib % 2 else 44.0)
        points = centre[:, :, None, :] + normal[:, :, None, :] * (half[:, None] * offsets[None, :])[None, :, :, None]
        scene.film.splat(0, points[..., 0], points[..., 1], area[..., None] * profile)


def normals(path: np.ndarray) -> np.ndarray:
    """Unit normals of curves [..., n, 2]."""
    tangent = np.gradient(path, axis=-2)
    normal = np.stack([-tangent[..., 1], tangent[..., 0]], -1)
    return np.asarray(normal / (np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9))


def fracture(
    centre: np.ndarray, area: np.ndarray, theta: np.ndarray, normal: np.ndarray, severity: float, at: float
) -> tuple[np.ndarray, np.ndarray]:
    """A displaced break at angle `at`: the far fragment steps aside, a gap opens, callus is dense on both ends."""
    step = 0.55 + 0.75 * severity
    beyond = theta > at
    moved = centre + normal * (step * beyond * np.exp(-np.maximum(theta - at, 0) / 30))[:, None]
    gap = np.abs(theta - at) < 2.0 + 1.5 * severity
    callus = 1 + (1.7 + 1.3 * severity) * np.exp(-(((np.abs(theta - at) - 5.5) / 2.6) ** 2))
    return moved, np.where(gap, 0.05, 1.0) * area * callus


def shoulder_girdle(scene: Scene) -> None:
    """Clavicles, scapulae and humeral heads."""
    film, c = scene.film, scene.phantom.capture
    lift = -0.9 if c.projection == "AP" else 0.0
    out = 0.0 if c.projection == "AP" else 2.2
    k = 0.6 + 0.4 * scene.width
    for sign in (-1.0, 1.0):
        inner, outer = scene.x(sign * 1.7, 8.0), scene.x(sign * 15.6 * k, 0.0)
        middle = [scene.x(sign * a, d) for a, d in ((5.5, 6.5), (10.5 * k, 3.0))]
        path = curve([(inner, -8.2), (middle[0], -9.6 + lift), (middle[1], -10.2 + lift), (outer, -10.0 + lift)], 0.05)
        tube(film, path, np.linspace(0.72, 0.55, len(path)), 1.7)
        j = scene.x(sign * 17.2 * k, -2.0)
        head = np.linspace(0, 2 * np.pi, 300)
        ring = np.stack([j + 2.3 * np.cos(head), -6.9 + 2.3 * np.sin(head)], 1)
        film.splat(0, ring[:, 0], ring[:, 1], 0.027)
        shaft = curve([(j + sign * 0.9, -5.0), (j + sign * 2.4, 2.0), (j + sign * 4.5 + sign * out, 12.0)], 0.05)
        tube(film, shaft, np.full(len(shaft), 1.15), 2.6)
        blade_top, blade_low = (sign * (9.2 + out) * k, -7.6), (sign * (11.0 + out) * k, 3.6)
        border = curve([blade_top, (sign * (9.0 + out) * k, -2.0), blade_low, (sign * (13.0 + out) * k, -1.0), (sign * 15.6 * k, -5.6)], 0.04)
        border[:, 0] = scene.x(border[:, 0], -7.5)
        film.splat(0, border[:, 0], border[:, 1], 0.02)
        spine_line = curve([blade_top, (sign * 13.0 * k, -8.4), (sign * 16.4 * k, -9.4)], 0.06)
        film.splat(1, spine_line[:, 0], spine_line[:, 1], 0.07)
        where, fill = ellipse_box(film, (scene.x(sign * (12.2 + out) * k, -7.5), -3.6), (2.6, 5.6, 0.2), sign * -14)
        scene.body[where] += fill


def tube(film: Film, path: np.ndarray, half: np.ndarray, bone: float) -> None:
    """A hollow bone along a path: half width in cm, `bone` water-equivalent cross-section in cm^2."""
    offsets = np.linspace(-1, 1, 11)
    profile = 0.5 * np.sqrt(np.maximum(1 - offsets**2, 0)) + 1.4 * np.exp(-(((np.abs(offsets) - 0.9) / 0.13) ** 2))
    profile /= profile.sum()
    normal = normals(path)
    points = path[:, None, :] + normal[:, None, :] * (half[:, None] * offsets[None, :])[:, :, None]
    film.splat(0, points[..., 0], points[..., 1], bone * steps(path)[:, None] * profile[None, :])


def vessels(scene: Scene, keep: np.ndarray) -> None:
    """Pulmonary vessels that branch from the hila; drawn where `keep` (0 to 1 on the grid) lets them."""
    film, f = scene.film, scene.phantom.findings
    middle = scene.shift * 0.8 + 1.0 * scene.yaw
    for side in SIDES:
        rng = np.random.default_rng([scene.phantom.anatomy.seed, 2, 0 if side == "left" else 1])
        sign = SIGN[side]
        n = 13
        heading = np.linspace(-1.45, 1.5, n) + rng.normal(0, 0.08, n)
        place = np.stack([sign * 3.0 + rng.normal(0, 0.35, n) + middle, (0.6 if side == "left" else 1.6) + heading * 1.1 + rng.normal(0, 0.3, n)], 1)
        # Gravity fills the lower vessels; congestion of edema turns that around.
        lower = np.clip(heading, -1, 1)
        radius = 0.30 * (1 + 0.30 * lower * (1 - 1.7 * f.edema)) * (1 + 0.35 * f.edema)
        for generation in range(4):
            length = (3.2, 3.0, 2.6, 2.2)[generation] * rng.uniform(0.75, 1.25, len(heading))
            bend = rng.normal(0, 0.30, len(heading))
            t = np.linspace(0, 1, 40)
            direction = heading[:, None] + bend[:, None] * t[None, :]
            step = length[:, None] / 40
            u = place[:, :1] + sign * np.cumsum(np.cos(direction) * step, 1)
            v = place[:, 1:] + np.cumsum(np.sin(direction) * step, 1)
            r = radius[:, None] * (1 - 0.28 * t[None, :])
            x, y = film.pixels(u, v)
            row = np.clip(y, 0, film.shape[0] - 1).astype(np.int64)
            column = np.clip(x, 0, film.shape[1] - 1).astype(np.int64)
            volume = np.pi * r**2 * step * keep[row, column] * 2.3
            film.splat(0 if generation > 1 else 1, u, v, volume)
            if generation == 0:
                film.splat(2, u, v, volume * 0.9)
            heading = np.concatenate([direction[:, -1] + s * rng.uniform(0.22, 0.6, len(heading)) for s in (-1, 1)])
            place = np.concatenate([np.stack([u[:, -1], v[:, -1]], 1)] * 2)
            radius = np.concatenate([r[:, -1] * rng.uniform(0.70, 0.88, len(r)) for _ in range(2)])
            if generation == 1:
                keep_some = rng.random(len(heading)) < 0.9
                heading, place, radius = heading[keep_some], place[keep_some], radius[keep_some]


def texture(scene: Scene) -> np.ndarray:
    """Unevenness of soft tissue and of lung parenchyma, a factor around 1."""
    rng = np.random.default_rng([scene.phantom.anatomy.seed, 3])
    coarse = noise_field(rng, scene.film.shape, 7)
    fine = noise_field(rng, scene.film.shape, 60)
    return np.asarray(1 + np.float32(0.012) * coarse + np.float32(0.006) * fine)
