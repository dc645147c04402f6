"""Small pictures of exemplars as data URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image

from medsae.artifacts import resolve
from medsae.data import radiograph
from medsae.errors import MedSAEError

SIDE = 176
"""Longer side of a thumbnail in pixels: twice what a card shows, for dense screens."""

QUALITY = 74


class Thumbnails:
    """Reads images of `data.root`, each at most once; what cannot be read is counted with its reason."""

    def __init__(self, root: str) -> None:
        self.failures: dict[str, str] = {}
        self._made: dict[str, str | None] = {}
        self._root = root
        self._store = resolve(root) if root else None

    def uri(self, path: str) -> str | None:
        """A `data:` URI of the image at `path` (relative to the root), None where it cannot be read."""
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path]

    def _make(self, path: str) -> str | None:
        if self._store is None:
            self.failures[path] = "data.root is not set"
            return None
        try:
            image = radiograph.load(self._store[0], f"{self._store[1]}/{path}")
        except (MedSAEError, OSError) as error:
            self.failures[path] = str(error) if isinstance(error, MedSAEError) else "file cannot be read"
            return None
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=QUALITY, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
