"""What all jobs share: arguments, one stage or all, exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from medsae.config import load_config
from medsae.errors import MedSAEError
from medsae.pipeline.stage import STAGES, run_stages


def main(stages: str | Sequence[str], argv: Sequence[str] | None = None) -> int:
    """Runs stages as a job; 0 when they are done, 2 with one line on a user's error. Anything else keeps its traceback.

    Inside `ray job submit` the stages use the job's own cluster; started by hand they start one.
    """
    names = [stages] if isinstance(stages, str) else list(stages)
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{names[0] if len(names) == 1 else 'run'}", description=f"Runs {', '.join(names)} of a run."
    )
    parser.add_argument("config", help="a YAML configuration, relative to the job's working directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    parser.add_argument("--force", action="store_true", help="run again what is done already")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("medsae").setLevel(logging.INFO)
    try:
        run_stages(names, load_config(arguments.config, arguments.overrides), force=arguments.force)
    except MedSAEError as error:
        sys.stderr.write(f"medsae: {' '.join(str(error).split())}\n")
        return 2
    return 0


ALL = tuple(STAGES)
