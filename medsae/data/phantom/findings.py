"""The planted findings of frontal radiographs: how each changes the lungs."""

from __future__ import annotations

import numpy as np

from medsae.data.phantom.canvas import curve, noise_field, ramp
from medsae.data.phantom.frontal import SIGN, Scene, rib_paths
from medsae.data.phantom.model import SIDES


def _stream(scene: Scene, kind: int, side: str = "left") -> np.random.Generator:
    """Random numbers of one finding of one patient: independent of every other finding."""
    return np.random.default_rng([scene.phantom.anatomy.seed, 10 + kind, SIDES.index(side)])


def _fill(scene: Scene, share: np.ndarray, side: str | None = None) -> None:
    """Replaces a share (0 to 1 on the grid) of what air is left in the lung by tissue or fluid."""
    scene.density += (share if side is None else share * scene.half[side]) * (1 - scene.density)


def plant(scene: Scene) -> np.ndarray:
    """Changes the lungs' air and density in place; returns where vessels show (0 to 1 on the grid)."""
    keep = np.minimum(scene.air / np.float32(1.5), 1)
    edema(scene)
    for side in SIDES:
        consolidation(scene, side)
        atelectasis(scene, side)
        nodule(scene, side)
        effusion(scene, side)
        pneumothorax(scene, side, keep)
    return keep


def edema(scene: Scene) -> None:
    """Perihilar haze (bat wings), more below than above; septal lines at the lower ribs. Vessels are congested in `frontal.vessels`."""
    severity = scene.phantom.findings.edema
    if severity == 0:
        return
    film, rng = scene.film, _stream(scene, 0)
    cloud = noise_field(rng, film.shape, 16)
    fine = noise_field(rng, film.shape, 70)
    du, dv = (np.abs(film.u) - 4.4) / 4.6, (film.v - 2.6) / 6.2
    wings = np.exp(-(du * du + dv * dv)) + np.float32(0.22)
    haze = np.float32(0.62 * severity) * wings * (1 + 0.22 * cloud + 0.13 * fine)
    _fill(scene, np.clip(haze, 0, 0.7))
    for side in SIDES:
        lines = rng.uniform(0, 1, (round(4 + 12 * severity), 3))
        for a, b, c in lines:
            v = 2.5 + a * (scene.dome[side] - 1.5)
            edge = np.interp(v, [0, 4, 8, 12], [12.2, 13.2, 13.4, 13.0]) * scene.width - 0.35 - 0.2 * b
            u = SIGN[side] * np.linspace(edge - 1.0 - 0.9 * c, edge, 30)
            film.splat(0, u, v + 0.1 * np.linspace(-1, 1, 30) * (b - 0.5), 0.010 * (0.5 + severity))


def consolidation(scene: Scene, side: str) -> None:
    """A lobar patch with cloudy edges and air bronchograms."""
    severity = scene.phantom.findings.side("consolidation", side)
    if severity == 0:
        return
    film, rng = scene.film, _stream(scene, 1, side)
    upper = scene.phantom.anatomy.consolidation_zone == "upper"
    cu = SIGN[side] * rng.uniform(6.2, 8.2) * scene.width
    cv = (rng.uniform(-6.5, -4.5) if upper else rng.uniform(5.0, 6.6)) * scene.height
    ru, rv = 2.5 + 2.4 * severity, 2.3 + 2.0 * severity
    distance = np.sqrt(np.square((film.u - cu) / ru) + np.square((film.v - cv) / rv))
    distance += np.float32(0.22) * noise_field(rng, film.shape, 14) + np.float32(0.10) * noise_field(rng, film.shape, 36)
    patch = ramp(1 - distance, 0.55) * np.float32(0.42 + 0.48 * severity)
    _fill(scene, patch, side)
    # Bronchi stay filled with air: dark branches inside the patch.
    for _ in range(5):
        angle = rng.normal(0, 0.55)
        start = np.array([cu - SIGN[side] * ru * 0.8, cv + rng.normal(0, 0.6)])
        t = np.linspace(0, 1.5 * ru, 60)
        u = start[0] + SIGN[side] * t * np.cos(angle)
        v = start[1] + t * np.sin(angle) + 0.12 * np.sin(2 * t + angle)
        film.splat(0, u, v, -0.014 * (0.4 + severity))


def atelectasis(scene: Scene, side: str) -> None:
    """Plate-like bands above a raised diaphragm, and crowded, denser lung at the base."""
    severity = scene.phantom.findings.side("atelectasis", side)
    if severity == 0:
        return
    film, rng = scene.film, _stream(scene, 2, side)
    # Fluid squeezes the lung above it: the lowest band lies clear of the diaphragm and of the level.
    floor = min(scene.dome[side] - 1.2, fluid_level(scene, side) - 1.6)
    for k in range(1 + round(2.4 * severity)):
        v = floor - 1.5 * k - rng.uniform(0, 0.6)
        u = SIGN[side] * np.linspace(rng.uniform(4.2, 6.0), rng.uniform(9.5, 11.3) * scene.width, 160)
        slope = rng.uniform(-0.16, 0.22)
        line = v + slope * np.abs(u - u[0]) + 0.25 * np.sin(np.linspace(0, np.pi, 160))
        taper = np.sin(np.linspace(0.25, np.pi - 0.25, 160))
        film.splat(1, u, line, 0.060 * (0.6 + 0.6 * severity) * taper)
        film.splat(0, u, line, 0.020 * (0.6 + 0.6 * severity) * taper)
    base = np.exp(-np.square((film.v - np.float32(scene.dome[side] + 0.5)) / np.float32(2.6)))
    base *= np.exp(-np.square((film.u * np.float32(SIGN[side]) - 6) / np.float32(5)))
    _fill(scene, np.float32(0.34 * severity) * base, side)


def nodule(scene: Scene, side: str) -> None:
    """A round, dense ball of 1.6 to 3.4 cm in the lung."""
    severity = scene.phantom.findings.side("nodule", side)
    if severity == 0:
        return
    a, rng = scene.phantom.anatomy, _stream(scene, 3, side)
    radius = 0.65 + 1.05 * severity
    v = (-8.0 + a.nodule_zone * (scene.dome[side] + 5.0)) * scene.height
    edge = np.interp(v, [-10, -7, -4, 0, 4, 14], [7.0, 8.7, 10.5, 12.0, 13.2, 13.0]) * scene.width
    u = SIGN[side] * (5.0 + a.nodule_lateral * (edge - 6.2 - radius))
    film = scene.film
    du, dv = film.u - np.float32(u), film.v - np.float32(v)
    wobble = 1 + 0.07 * np.sin(3 * np.arctan2(dv, du) + rng.uniform(0, 6))
    depth = 2 * np.sqrt(np.maximum(np.float32(radius) ** 2 - (du * du + dv * dv) * wobble, 0))
    share = np.minimum(2.4 * depth / np.maximum(scene.air, 2.0), 0.95)
    _fill(scene, share, side)


def fluid_level(scene: Scene, side: str) -> float:
    """Where the fluid of an effusion stands at the middle of the lung, cm; far below the film where there is none."""
    severity = scene.phantom.findings.side("effusion", side)
    return float(scene.dome[side] + 3.4 - 11.5 * severity**0.9) if severity else 99.0


def effusion(scene: Scene, side: str) -> None:
    """Fluid with a meniscus that climbs the chest wall; small ones blunt the costophrenic angle."""
    severity = scene.phantom.findings.side("effusion", side)
    if severity == 0:
        return
    film = scene.film
    across = film.u * np.float32(SIGN[side]) / np.maximum(scene.lateral, 1)
    rim = np.clip(across, 0, 1)
    rim2 = rim * rim
    # Level at the middle of the lung, and how much higher it stands at the wall.
    level = fluid_level(scene, side)
    climb = 2.2 + 2.4 * severity
    surface = np.float32(level) - np.float32(climb) * (rim2 * rim2) + np.float32(1.0) * (1 - rim2)
    depth = film.v - surface
    share = ramp(depth, 1.3) * np.float32(0.93)
    # Fluid behind the lung veils what lies above the level.
    share = np.maximum(share, np.float32(0.22 * severity) * np.exp(np.minimum(depth / np.float32(5.0), 0)))
    _fill(scene, share, side)


def pneumothorax(scene: Scene, side: str, keep: np.ndarray) -> None:
    """Air between lung and chest wall: a thin pleural line, beyond it no vessels and a darker field."""
    severity = scene.phantom.findings.side("pneumothorax", side)
    if severity == 0:
        return
    film = scene.film
    top = -11.9 * scene.height
    apex = top + 0.9 + 6.5 * severity
    base = scene.dome[side] + 4.0
    v = np.linspace(apex, base - 0.3, 300)
    outside = np.interp(
        v, [top, -10.7, -7.2, -4.2, -1.5, 1.1, 3.5, 5.8, 8.1, 10.4, 14], [4.8, 6.4, 9.5, 11.2, 12.3, 12.9, 13.3, 13.5, 13.5, 13.3, 13.0]
    )
    outside = outside * scene.width
    fall = (v - apex) / (base - apex)
    gap = (0.5 + 4.6 * severity) * (1 - 0.75 * fall)
    edge = 4.4 + (np.maximum(outside - gap, 4.6) - 4.4) * np.sqrt(np.clip(fall * 6, 0, 1) * (2 - np.clip(fall * 6, 0, 1)))
    inner = film.along_v(v, edge)
    across = film.u * np.float32(SIGN[side])
    free = np.maximum(ramp(across - inner, 0.18), ramp(np.float32(apex) + np.float32(0.30) * np.maximum(np.float32(4.4) - across, 0) - film.v, 0.18))
    collapsed = 0.27 + 0.22 * severity
    free *= scene.half[side]
    _fill(scene, np.float32(collapsed - 0.27) * (1 - free), side)
    scene.density += (np.float32(0.02) - scene.density) * free
    keep *= 1 - free
    start = np.stack([np.linspace(2.6, 4.4, 40), apex + 0.30 * np.linspace(1.8, 0.0, 40)], 1)
    path = np.vstack([start, np.stack([edge, v], 1)])
    line = curve([tuple(p) for p in path[::12]], 0.05)
    film.splat(0, SIGN[side] * line[:, 0], line[:, 1], 0.0085)


def region(scene: Scene, finding: str) -> np.ndarray:
    """Where a finding may change the image, bool [H, W]: half-planes and zones, for tests and for checking heat maps."""
    film = scene.film
    name, _, side = finding.partition("_")
    mask = np.ones(film.shape, bool)
    if side in SIDES:
        mask &= film.u * SIGN[side] > 1.0
    if name in ("effusion", "atelectasis"):
        mask &= film.v > scene.dome[side] - 11
    if name == "consolidation":
        mask &= (film.v < 0) if scene.phantom.anatomy.consolidation_zone == "upper" else (film.v > 0)
    if name == "cardiomegaly":
        mask &= (film.v > -3) & (np.abs(film.u) < 13)
    if name == "mediastinum":
        mask &= (film.v < 4) & (np.abs(film.u) < 6)
    if name == "fracture":
        path = rib_paths(scene, side)[scene.phantom.anatomy.fracture_rib :].reshape(-1, 3)
        mask &= (film.v > path[:, 1].min() - 1) & (film.u * SIGN[side] > 5)
    return mask
