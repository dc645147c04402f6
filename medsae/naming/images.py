"""Images as they are sent to a vision-language model."""

from __future__ import annotations

import base64
import binascii
import io
import threading
from collections import OrderedDict
from typing import Protocol

import pyarrow.fs as pafs
from PIL import Image

from medsae.artifacts import resolve
from medsae.data import radiograph
from medsae.errors import DataError


def data_url(image: Image.Image, size: int) -> str:
    """A greyscale image, shrunk so that its longest side is at most `size` pixels, as a JPEG data URL."""
    image = image.convert("L")
    if max(image.size) > size:
        scale = size / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


class ImageSource(Protocol):
    """Where images come from. `size`: longest side in pixels of what is sent."""

    size: int

    def get(self, path: str) -> str:
        """The image as a data URL; raises DataError where it cannot be read."""


class RequestImages:
    """Images of a request: data URLs as they came, or references to files under a root. Each is decoded, checked and encoded anew.

    Args:
        size: longest side in pixels.
        store: reads references; None where the service has no data.
    """

    def __init__(self, size: int, store: ImageStore | None) -> None:
        self.size, self.store = size, store

    def get(self, path: str) -> str:
        """A data URL or a reference as a data URL.

        Raises:
            DataError: it is neither, no image, or points out of the root.
        """
        if path.startswith("data:"):
            head, comma, body = path.partition(",")
            if not comma or not head.endswith(";base64"):
                raise DataError("data URL without base64")
            try:
                return data_url(radiograph.decode(base64.b64decode(body, validate=True)), self.size)
            except binascii.Error as error:
                raise DataError("data URL is not base64") from error
        if self.store is None:
            raise DataError("the service has no data root: send the image as a data URL")
        if "://" in path or path.startswith("/") or "\\" in path or ".." in path.split("/"):
            raise DataError("not a path under the data root")
        return self.store.get(path)


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
