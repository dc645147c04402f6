"""Checkpoint files: found, downloaded, checked and read without running code from them."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from medsae.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "pytorch_model.bin"


def cache_folder() -> Path:
    """Where downloads are kept: `$MEDSAE_CACHE`, or `~/.cache/medsae`."""
    return Path(os.environ.get("MEDSAE_CACHE") or Path.home() / ".cache" / "medsae")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16` or `float16`; `auto` is float32 on CPU and bfloat16 on GPU.

    Raises:
        ConfigError: another word.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known["auto"] = known["bfloat16" if device.type == "cuda" else "float32"]
    if dtype not in known:
        raise ConfigError(f"encoder.dtype {dtype!r} is not known; there are auto, float32, bfloat16 and float16")
    return known[dtype]


def find(weights: str) -> Path:
    """The file that `weights` means: a `pytorch_model.bin`, an archive that holds one, or a directory with either.

    Raises:
        WeightsError: nothing there.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        candidates = [path / WEIGHTS_NAME, *sorted(path.glob("*.zip"))]
        found = [c for c in candidates if c.is_file()]
        if not found:
            raise WeightsError(f"{path.name}/ holds no {WEIGHTS_NAME} and no .zip archive (encoder.weights)")
        return found[0]
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist (encoder.weights)")
    return path


def check_sha256(path: Path, expected: str | None) -> str:
    """The file's SHA-256; where one is expected, they must agree."""
    actual = file_sha256(path)
    if expected is not None and actual != expected:
        raise WeightsError(f"{path.name} has SHA-256 {actual}, expected {expected} (encoder.sha256)")
    return actual


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a `pytorch_model.bin` or the official archive. Pickled code is refused, never run.

    Raises:
        WeightsError: not a checkpoint, truncated, or it holds something other than tensors.
    """
    import torch

    try:
        source: io.BytesIO | Path = path
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == WEIGHTS_NAME]
                if inside:
                    source = io.BytesIO(archive.read(inside[0]))
        state = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = "Unsupported" in str(error) or "GLOBAL" in str(error) or "not an allowed global" in str(error)
        reason = "holds pickled code, which is never run; save it as a plain state_dict" if unsafe else "is damaged or no checkpoint"
        raise WeightsError(f"weights file {path.name} {reason}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise WeightsError(f"weights file {path.name} is truncated, damaged or no checkpoint") from error
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise WeightsError(f"weights file {path.name} is not a state_dict: names to tensors were expected")
    return {str(k): v for k, v in state.items()}


def load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], ignorable: tuple[str, ...], what: str) -> None:
    """Loads every parameter of `module` from `state`; only names that end in one of `ignorable` (recomputed buffers) may be on one side alone.

    Raises:
        WeightsError: names that are missing, left over or of another shape.
    """
    own = module.state_dict()
    missing = [n for n in own if n not in state and not n.endswith(ignorable)]
    extra = [n for n in state if n not in own and not n.endswith(ignorable)]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise WeightsError(f"{what}: the checkpoint does not fit: {'; '.join(problems)}")
    module.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)


def download(pointer_url: str, folder: Path, what: str) -> Path:
    """The official archive: `pointer_url` is a text file that holds the archive's address. Kept in `folder`.

    Raises:
        WeightsError: the hub is out of reach; says what to fetch and where to put it.
    """
    import httpx

    target = folder / "download.zip"
    if target.is_file():
        return target
    partial = target.with_suffix(f".{os.getpid()}.part")
    try:
        with httpx.Client(follow_redirects=True, timeout=60) as client:
            address = client.get(pointer_url).raise_for_status().text.strip()
            folder.mkdir(parents=True, exist_ok=True)
            with client.stream("GET", address) as answer, partial.open("wb") as sink:
                answer.raise_for_status()
                for chunk in answer.iter_bytes(1 << 20):
                    sink.write(chunk)
        if not zipfile.is_zipfile(partial):  # such as a page that says the quota is used up
            raise OSError(f"{address} is no archive")
        partial.rename(target)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise WeightsError(
            f"the official {what} checkpoint cannot be downloaded ({type(error).__name__}): fetch the archive that {pointer_url} points to, "
            f"put it at {target}, or set encoder.weights to its path (or to 'untrained' for random weights)"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target
