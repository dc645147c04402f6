"""A film in patient coordinates: fine structures are splatted, then blurred to their width; attenuation becomes grey values.

Coordinates are in cm: u to the right of the image (the patient's left), v downward, the origin at the carina.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

BLURS = (0.75, 1.5, 3.0)
"""Widths (sigma in pixels at 320 pixels) of the layers that fine structures are drawn on."""

MU = 0.19
"""Linear attenuation of soft tissue, 1/cm: about 70 keV effective energy (NIST XCOM, water 0.193)."""


def noise_field(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth Gaussian noise, float32 [H, W]: `cells` random values along the height, interpolated."""
    rows = cells + 1
    cols = max(2, round(cells * shape[1] / shape[0])) + 1
    small = Image.fromarray(rng.standard_normal((rows, cols), dtype=np.float32))
    return np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


FLATTEN = 0.38
"""Share of the broad differences in density that the film processing takes away."""


def _flat(values: np.ndarray | float, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(values, np.float32).ravel() if np.shape(values) == shape else np.broadcast_to(np.asarray(values, np.float32), shape).ravel()


Box = tuple[slice, slice]
"""Rows and columns of a grid."""
EVERYWHERE: Box = (slice(None), slice(None))


class Film:
    """Pixel grid of `height` x `width` pixels, `scale` cm a pixel, centred at (`u0`, `v0`), tilted by `tilt` degrees."""

    def __init__(self, height: int, width: int, scale: float, u0: float, v0: float, tilt: float) -> None:
        self.shape = (height, width)
        self.scale = scale
        self.u0, self.v0 = u0, v0
        self.blur = min(height, width) / 320
        self.cos, self.sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
        x = ((np.arange(width, dtype=np.float32) - (width - 1) / 2) * scale)[None, :]
        y = ((np.arange(height, dtype=np.float32) - (height - 1) / 2) * scale)[:, None]
        self.u = (x * self.cos + y * self.sin + u0).astype(np.float32)
        self.v = (-x * self.sin + y * self.cos + v0).astype(np.float32)
        self._points: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in BLURS]
        # Functions of v alone are tables: one gather costs a tenth of an interpolation.
        self._grid = np.arange(-40.0, 40.0, 0.02)
        self._iv = np.clip((self.v + 40.0) / 0.02, 0, len(self._grid) - 1).astype(np.int32)
        self._iu = np.clip((self.u + 40.0) / 0.02, 0, len(self._grid) - 1).astype(np.int32)

    def along_v(self, knots: list[float] | np.ndarray, values: list[float] | np.ndarray, where: Box = EVERYWHERE) -> np.ndarray:
        """A piecewise function of v on the grid or a box of it, smoothed a little so that no knot shows."""
        return np.asarray(self._table(knots, values)[self._iv[where]])

    def along_u(self, knots: list[float] | np.ndarray, values: list[float] | np.ndarray) -> np.ndarray:
        """A piecewise function of u on the grid."""
        return np.asarray(self._table(knots, values)[self._iu])

    def _table(self, knots: list[float] | np.ndarray, values: list[float] | np.ndarray) -> np.ndarray:
        table = np.interp(self._grid, knots, values)
        return ndimage.uniform_filter1d(ndimage.uniform_filter1d(table, 41, mode="nearest"), 41, mode="nearest").astype(np.float32)

    def pixels(self, u: Any, v: Any) -> tuple[Any, Any]:
        """Patient coordinates to (column, row), fractional."""
        du, dv = u - self.u0, v - self.v0
        x = (du * self.cos - dv * self.sin) / self.scale + (self.shape[1] - 1) / 2
        y = (du * self.sin + dv * self.cos) / self.scale + (self.shape[0] - 1) / 2
        return x, y

    def box(self, u0: float, u1: float, v0: float, v1: float) -> Box:
        """The part of the grid that holds all of u0 <= u <= u1, v0 <= v <= v1; larger where the film is tilted."""
        x, y = self.pixels(np.array([u0, u0, u1, u1]), np.array([v0, v1, v0, v1]))
        h, w = self.shape
        rows = slice(min(max(int(y.min()) - 1, 0), h), min(max(int(y.max()) + 2, 0), h))
        return rows, slice(min(max(int(x.min()) - 1, 0), w), min(max(int(x.max()) + 2, 0), w))

    def splat(self, layer: int, u: np.ndarray, v: np.ndarray, volume: np.ndarray | float) -> None:
        """Puts point masses on a layer.

        Args:
            layer: index in `BLURS`.
            u, v: positions in cm, of shapes that broadcast.
            volume: water-equivalent volume of each point, cm^3 (cross-section area times step of a tube).
        """
        shape = np.broadcast_shapes(np.shape(u), np.shape(v))
        points = self._points[layer]
        points.append((_flat(u, shape), _flat(v, shape), _flat(volume, shape)))

    def _image(self, layer: int) -> np.ndarray:
        u, v, mass = (np.concatenate(parts) for parts in zip(*self._points[layer], strict=True))
        x, y = self.pixels(u, v)
        h, w = self.shape
        # The sharpest layer is collected on a grid twice as fine: a quarter of a pixel is below its blur.
        fine = 2 if layer == 0 else 1
        column, row = ((x + np.float32(0.5)) * fine).astype(np.int32), ((y + np.float32(0.5)) * fine).astype(np.int32)
        # As unsigned numbers, what lies left of or above the grid is large: one comparison serves both sides.
        keep = (column.view(np.uint32) < fine * w) & (row.view(np.uint32) < fine * h)
        index = row[keep] * np.int32(fine * w) + column[keep]
        flat = np.bincount(index, weights=mass[keep], minlength=h * w * fine * fine)
        if fine == 2:
            rows = flat.reshape(h, 2, 2 * w)
            summed = rows[:, 0] + rows[:, 1]
            flat = summed[:, 0::2] + summed[:, 1::2]
        return (flat.reshape(h, w) / self.scale**2).astype(np.float32)

    def fine(self) -> np.ndarray:
        """The splatted structures as water-equivalent thickness in cm, float32 [H, W]."""
        total = np.zeros(self.shape, np.float32)
        for layer, sigma in enumerate(BLURS):
            if self._points[layer]:
                total += ndimage.gaussian_filter(self._image(layer), sigma * self.blur, truncate=2.5)
        return total


def curve(points: list[tuple[float, float]], step: float = 0.06) -> np.ndarray:
    """A smooth curve (Catmull-Rom) through points, sampled about every `step` cm: float64 [n, 2]."""
    p = np.asarray(points, float)
    p = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    counts = np.maximum(2, (np.hypot(*(c - b).T) / step).astype(int))
    which = np.repeat(np.arange(len(counts)), counts)
    t = ((np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) / counts[which])[:, None]
    first, second, third = c - a, 2 * a - 5 * b + 4 * c - d, 3 * b - a - 3 * c + d
    return np.asarray(0.5 * ((2 * b)[which] + first[which] * t + second[which] * t**2 + third[which] * t**3))


def steps(points: np.ndarray) -> np.ndarray:
    """Length of curve that each sample stands for, cm, [n]."""
    return np.hypot(*np.gradient(points, axis=0).T)


def ellipse_box(film: Film, centre: tuple[float, float], axes: tuple[float, float, float], angle: float = 0.0) -> tuple[Box, np.ndarray]:
    """Thickness in cm of an ellipsoid seen along its third axis: the box of the grid that holds it, and float32 [h, w] there.

    Args:
        film: the grid.
        centre: in cm.
        axes: semi-axes along u, v (before turning) and depth.
        angle: turn in degrees, clockwise on the image.
    """
    x, y = film.pixels(np.float64(centre[0]), np.float64(centre[1]))
    reach = max(axes[0], axes[1]) / film.scale + 2
    box = (slice(max(int(y - reach), 0), max(int(y + reach), 0)), slice(max(int(x - reach), 0), max(int(x + reach), 0)))
    c, s = np.float32(np.cos(np.radians(angle))), np.float32(np.sin(np.radians(angle)))
    du, dv = film.u[box] - np.float32(centre[0]), film.v[box] - np.float32(centre[1])
    a = (du * c + dv * s) / np.float32(axes[0])
    b = (dv * c - du * s) / np.float32(axes[1])
    return box, np.float32(2 * axes[2]) * np.sqrt(np.maximum(1 - a * a - b * b, 0))


def ellipse_chord(film: Film, centre: tuple[float, float], axes: tuple[float, float, float], angle: float = 0.0) -> np.ndarray:
    """`ellipse_box` on the whole grid, float32 [H, W]."""
    chord = np.zeros(film.shape, np.float32)
    where, thickness = ellipse_box(film, centre, axes, angle)
    chord[where] = thickness
    return chord


def ramp(x: np.ndarray, width: float) -> np.ndarray:
    """A smooth step from 0 to 1 around x = 0, float32; `width` is the distance from 12 % to 88 %, about."""
    t = np.clip(x * np.float32(0.72 / width) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def develop(thickness: np.ndarray, rng: np.random.Generator, noise: float, centre: float, latitude: float) -> np.ndarray:
    """Water-equivalent thickness to grey values: Beer-Lambert, scatter, quantum noise, a film curve.

    Args:
        thickness: cm of water, float32 [H, W].
        rng: of the noise.
        noise: 0 to 1.
        centre: thickness that becomes middle grey, cm.
        latitude: thickness range of the curve's straight part, cm; wide is low contrast.

    Returns:
        uint8 [H, W], bone white.
    """
    primary = np.exp(np.float32(-MU) * thickness)
    h, w = primary.shape
    small = Image.fromarray(primary).resize((max(2, w // 10), max(2, h // 10)), Image.Resampling.BOX)
    blurred = ndimage.gaussian_filter(np.asarray(small), 2.0)
    scatter = np.asarray(Image.fromarray(blurred).resize((w, h), Image.Resampling.BICUBIC))
    # An anti-scatter grid leaves scatter of about a third of the primary signal.
    signal = np.maximum(scatter, 0)
    signal *= np.float32(0.25)
    signal += primary
    if noise > 0:
        grain = rng.standard_normal(thickness.shape, dtype=np.float32)
        # Quanta a pixel grow with its area.
        grain *= np.float32(0.0028 * noise * min(h, w) / 320) / np.sqrt(signal + np.float32(1e-3))
        grain += 1
        signal *= grain
    density = np.log(np.maximum(signal, np.float32(1e-5), out=signal), out=signal)
    density /= np.float32(-MU)
    reference = np.float32(centre - np.log(1.25) / MU)
    # Digital systems flatten the broad differences so that lungs and mediastinum fit on one film.
    broad = Image.fromarray(density).resize((max(2, w // 10), max(2, h // 10)), Image.Resampling.BOX)
    broad = Image.fromarray(ndimage.gaussian_filter(np.asarray(broad), 2.2)).resize((w, h), Image.Resampling.BICUBIC)
    t = np.asarray(broad) - reference
    t *= np.float32(-FLATTEN)
    t += density
    t -= reference
    t *= np.float32(-3.6 / latitude)
    grey = np.exp(t, out=t)
    grey += 1
    np.divide(np.float32(255), grey, out=grey)
    grey += np.float32(0.5)
    return np.clip(grey, 0, 255, out=grey).astype(np.uint8)
