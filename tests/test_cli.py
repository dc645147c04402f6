"""The command: help of every part, exit statuses, one line for a user's error."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from medsae.cli import STAGE_HELP, main
from medsae.pipeline.stage import STAGES

COMMANDS = ["run", *STAGE_HELP, "serve", "submit", "phantom"]


def test_every_stage_has_a_command() -> None:
    assert list(STAGES) == list(STAGE_HELP)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert command in shown
    assert len(shown.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such-file.yaml"], "no-such-file.yaml"),
        (["extract", "CONFIG", "nonsense=1"], "nonsense"),
        (["extract", "CONFIG", "encoder.name=nothing"], "not known"),
        (["extract", "CONFIG"], "data.root"),
        (["fit", "CONFIG"], "extract"),
        (["serve", "CONFIG", "--port", "1"], "run"),
        (["phantom", "DIR", "--images", "0"], "images"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # loggers of other packages may hold a stream that pytest has closed
    if arguments[0] in ("fit", "serve"):
        request.getfixturevalue("ray_cluster")
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {tmp_path / 'run'}\n")
    filled = [str(config) if a == "CONFIG" else str(tmp_path / "d") if a == "DIR" else a for a in arguments]
    assert main(filled) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert [line for line in shown if line.startswith("medsae: ")][-1] == shown[-1]
    assert message in shown[-1]
    assert "Traceback" not in "\n".join(shown)


def test_overrides_may_stand_around_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{}\n")
    assert main(["extract", str(config), "run=x", "--force", "data.root=/nonexistent-folder"]) == 2
    assert "nonexistent-folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["extract", str(config), "--nonsense"])


def test_importing_the_command_is_light() -> None:
    """`medsae --help` must not wait for torch or Ray."""
    code = "import sys, medsae.cli; medsae.cli.parser(); print([m for m in ('torch', 'ray', 'transformers', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
