"""Writes base.lock and dev.lock: one resolution of everything, so that both agree.

.venv/bin/python requirements/lock.py
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
HEADER = "# Written by requirements/lock.py from pyproject.toml; do not edit.\n"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(*requirements: str) -> dict[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report.name, *requirements]
        subprocess.run(command, check=True)
        found = json.loads(pathlib.Path(report.name).read_text())["install"]
    return {canonical(i["metadata"]["name"]): i["metadata"]["version"].split("+")[0] for i in found}


def main() -> None:
    root = str(HERE.parent)
    excluded = {canonical(line.split()[0]) for line in (HERE / "excluded.txt").read_text().splitlines() if line and line[0] != "#"}
    everything = resolve(f"{root}[cpu,dev]")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(f"{n}=={v}" for n, v in everything.items() if n != "medsae"))
        constraints.flush()
        base = resolve(root, "-c", constraints.name)
    drop = excluded | {"medsae"}
    for name, pins in (("base.lock", base), ("dev.lock", {n: v for n, v in everything.items() if n not in base})):
        (HERE / name).write_text(HEADER + "".join(f"{n}=={v}\n" for n, v in sorted(pins.items()) if n not in drop))


if __name__ == "__main__":
    main()
