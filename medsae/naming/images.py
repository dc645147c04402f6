"""Images as they are sent to a vision-language model."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict

import pyarrow.fs as pafs
from PIL import Image

from medsae.artifacts import resolve
from medsae.data import radiograph


def data_url(image: Image.Image, size: int) -> str:
    """A greyscale image, shrunk so that its longest side is at most `size` pixels, as a JPEG data URL."""
    image = image.convert("L")
    if max(image.size) > size:
        scale = size / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


class ImageStore:
    """Reads images under a root (folder or URI) as data URLs; keeps the last ones, because neurons share images. Thread-safe.

    Args:
        root: folder or URI that paths are relative to.
        size: longest side in pixels of what is sent.
        keep: images kept in memory (about 30 kB each).
    """

    def __init__(self, root: str, size: int, keep: int = 4096) -> None:
        self.fs: pafs.FileSystem
        self.fs, self.base = resolve(root)
        self.size, self.keep = size, keep
        self._urls: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> str:
        """The image as a data URL.

        Raises:
            DataError: the file is missing or is no readable image.
        """
        with self._lock:
            if path in self._urls:
                self._urls.move_to_end(path)
                return self._urls[path]
        url = data_url(radiograph.load(self.fs, f"{self.base}/{path}"), self.size)
        with self._lock:
            self._urls[path] = url
            while len(self._urls) > self.keep:
                self._urls.popitem(last=False)
        return url
