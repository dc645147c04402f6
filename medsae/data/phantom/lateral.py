"""The lateral radiograph: simpler than the frontal one, with the findings that show from the side."""

from __future__ import annotations

import numpy as np

from medsae.data.phantom.canvas import Film, curve, ellipse_chord, noise_field, ramp, steps
from medsae.data.phantom.frontal import RIB_DROP, RIB_WIDTH, tube
from medsae.data.phantom.model import SIDES, Phantom


def lateral_thickness(film: Film, phantom: Phantom) -> np.ndarray:
    """Water-equivalent thickness in cm of a patient seen from the left; the sternum is on the left of the image."""
    a, f, c = phantom.anatomy, phantom.findings, phantom.capture
    rng = np.random.default_rng([a.seed, 4])
    u, v = film.u, film.v
    fat = 1 + 0.2 * a.habitus
    front = film.along_v([-18, -12, -8, 0, 10, 22], [-3.0, -4.5, -8.0, -10.8 * fat, -11.8 * fat, -12.0 * fat])
    back = film.along_v([-18, -12, -6, 2, 12, 22], [4.0, 6.5, 10.5, 11.8, 11.0, 9.5])
    middle, half = (front + back) / 2, (back - front) / 2
    across = (u - middle) / half
    body = np.float32(2 * 14.5 * (0.55 + 0.45 * fat)) * np.sqrt(np.maximum(1 - np.power(np.abs(across), 2.6), 0))
    body *= film.along_v([-18, -12, -7, 22], [0.42, 0.75, 1.0, 1.0])
    if a.breast > 0:
        body += ellipse_chord(film, (-10.6, 4.6), (3.6, 5.2, 1.0 * a.breast))
    top = -11.5 * a.height
    s = np.clip((v - np.float32(top) - np.float32(0.06) * np.square(u - 1.0)) / 6, 0, 1)
    cap = np.sqrt(s * (2 - s))
    chest = np.abs((u - np.float32(0.3) - np.float32(0.10) * v) / (np.float32(9.6) * (np.float32(0.35) + np.float32(0.65) * cap)))
    air = np.float32(21.0) * a.width * cap * np.sqrt(np.maximum(1 - chest**3, 0))
    domes = [8.4 + 2.4 * c.inspiration, 9.2 + 2.4 * c.inspiration]
    depth = u + np.float32(2.0)
    gates = []
    for dome in domes:
        level = np.float32(dome) + np.where(depth > 0, np.float32(0.045), np.float32(0.02)) * depth * depth
        gates.append(ramp(level - v, 0.25))
    air *= (gates[0] + gates[1]) / 2
    size = a.heart * (1 + 0.35 * f.cardiomegaly)
    heart = ellipse_chord(film, (-3.6, domes[0] - 4.4), (5.6 * size, 4.2 * size, 6.0), -52)
    arch = ellipse_chord(film, (1.0, -2.6), (2.6 * a.aorta, 3.4 * a.aorta, 1.1), 25)
    air = np.maximum(air - np.maximum(heart, arch) * np.float32(1.3), 0) * (1 - np.float32(0.12) * ramp(-np.abs(u - 0.5) + 2.0, 2.0))
    density = np.full(film.shape, np.float32(0.27))
    _plant(film, phantom, density, domes, rng)
    lost = air * (1 - density)
    trachea = np.float32(1.6) * np.sqrt(np.maximum(1 - np.square((u - np.float32(0.4) - np.float32(0.13) * v) / np.float32(0.85)), 0)) * ramp(-v, 0.8)
    lost += trachea + ellipse_chord(film, (-2.0, domes[1] + 2.0), (2.4, 1.3, 2.0)) + ellipse_chord(film, (0.6, 0.2), (0.7, 0.7, 0.7))
    thickness = np.maximum(body - np.minimum(lost, body * np.float32(0.93)), 0)
    return np.asarray(thickness * (1 + np.float32(0.012) * noise_field(rng, film.shape, 7)) + _bones(film, phantom) + _devices(film, phantom, domes))


def _plant(film: Film, phantom: Phantom, density: np.ndarray, domes: list[float], rng: np.random.Generator) -> None:
    """Fluid behind, haze, patches and balls, at half strength: the other lung lies over them."""
    f, a = phantom.findings, phantom.anatomy
    u, v = film.u, film.v

    def fill(share: np.ndarray) -> None:
        density[...] += share * (1 - density)

    for side in SIDES:
        if f.side("effusion", side) > 0:
            e = f.side("effusion", side)
            surface = np.float32(domes[0] + 5.0 - 10.5 * e) - np.float32(0.25) * np.maximum(u, 0)
            fill(ramp(v - surface, 1.2) * np.float32(0.5))
        if f.side("consolidation", side) > 0:
            s = f.side("consolidation", side)
            cv = -5.5 if a.consolidation_zone == "upper" else 5.5
            distance = np.sqrt(np.square((u - 3.5) / (2.3 + 2 * s)) + np.square((v - np.float32(cv)) / (2.2 + 2 * s)))
            fill(ramp(1 - distance - np.float32(0.2) * noise_field(rng, film.shape, 14), 0.6) * np.float32(0.2 + 0.3 * s))
        if f.side("nodule", side) > 0:
            radius = 0.5 + 1.2 * f.side("nodule", side)
            fill(np.minimum(ellipse_chord(film, (3.0, -7 + 14 * a.nodule_zone), (radius, radius, radius)) / 11, 0.5))
        if f.side("atelectasis", side) > 0:
            line = curve([(-4.0, domes[0] - 1.8), (1.0, domes[0] - 2.4), (6.0, domes[0] - 1.0)])
            film.splat(1, line[:, 0], line[:, 1], 0.05 * f.side("atelectasis", side))
    if f.edema > 0:
        haze = np.exp(-np.square((u - 0.5) / 5) - np.square((v - 2.0) / 6)) + np.float32(0.2)
        fill(np.clip(np.float32(0.5 * f.edema) * haze * (1 + np.float32(0.2) * noise_field(rng, film.shape, 40)), 0, 0.7))


def _bones(film: Film, phantom: Phantom) -> np.ndarray:
    """Spine with end plates, sternum and ribs of both sides."""
    pitch = 2.32 * phantom.anatomy.height
    axis = film.along_v([-18, -8, 2, 10, 22], [3.4, 6.0, 7.6, 7.0, 5.0])
    du = np.abs(film.u - axis)
    phase = film.v / np.float32(pitch)
    phase = np.abs(phase - np.round(phase)) * 2
    column = ramp(np.float32(1.65) - du, 0.2)
    bone = column * (np.float32(0.9) + np.float32(1.2) * np.exp(-np.square((phase - 0.78) / 0.09))) * ramp(0.88 - phase, 0.08)
    bone += np.float32(0.7) * ramp(np.float32(1.4) - np.abs(film.u - axis - 3.0), 0.8) * ramp(0.6 - phase, 0.3)
    sternum = curve([(-6.4, -8.5), (-8.6, -3.0), (-9.6, 3.5)], 0.06)
    tube(film, sternum, np.full(len(sternum), 0.55), 1.5)
    theta = np.radians(np.linspace(12, 140, 120))
    for rib in range(1, 10):
        for near in (0.0, 0.7):
            x = 0.3 + 8.6 * np.cos(theta) * RIB_WIDTH[rib] / 13.5
            y = -11.9 + 2.28 * rib + RIB_DROP[rib] * (1 - np.cos(theta)) / 2 + near
            path = np.stack([x, y], 1)
            for offset, share in ((-0.5, 1.0), (0.0, 0.4), (0.5, 1.0)):
                film.splat(0, path[:, 0], path[:, 1] + offset, 0.09 * share * steps(path))
    return np.asarray(bone)


def _devices(film: Film, phantom: Phantom, domes: list[float]) -> np.ndarray:
    """What of the devices shows from the side."""
    f = phantom.findings
    solid = np.zeros(film.shape, np.float32)
    if f.pacemaker > 0:
        solid += np.float32(7.0) * ((np.abs(film.u + 8.3) < 0.5) & (np.abs(film.v + 5.5) < 2.0))
        lead = curve([(-8.0, -7.5), (-4.0, -9.0), (-2.0, -3.0), (-1.5, 3.0), (-5.0, domes[0] - 1.5)], 0.05)
        film.splat(0, lead[:, 0], lead[:, 1], 0.42 * steps(lead))
    if f.central_line > 0:
        line = curve([(-2.0, -17.0), (-2.6, -9.0), (-2.0, -4.0), (-1.6, 1.5)], 0.05)
        film.splat(0, line[:, 0], line[:, 1], 0.34 * steps(line))
    if f.endotracheal_tube > 0:
        for offset, metal in ((-0.4, 0.1), (0.4, 0.1), (0.2, 0.28)):
            wall = curve([(-1.6 + offset, -18.0), (-1.0 + offset, -10.0), (-0.1 + offset, -4.0)], 0.05)
            film.splat(0, wall[:, 0], wall[:, 1], metal * steps(wall))
    if f.ecg_leads > 0:
        rng = np.random.default_rng([phantom.capture.seed, 31])
        for _ in range(3):
            spot = rng.uniform(-9, -4), rng.uniform(-6, 8)
            solid += np.float32(2.6) * (np.square(film.u - np.float32(spot[0])) + np.square(film.v - np.float32(spot[1])) < 0.35)
            cable = curve([spot, (spot[0] - 3 + rng.normal(0, 2), spot[1] + 4), (-18.0, rng.uniform(5, 20))], 0.05)
            film.splat(0, cable[:, 0], cable[:, 1], 0.24 * steps(cable))
    return solid
