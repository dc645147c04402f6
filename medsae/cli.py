"""The `medsae` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from medsae import __version__
from medsae.errors import MedSAEError

STAGE_HELP = {
    "extract": "embed every image: Ray Data, decode on CPUs, encode on an actor pool",
    "fit": "train the sparse autoencoders on the embeddings: Ray Train, DDP",
    "measure": "correlation, entropy and the rest, for each SAE and for the raw features",
    "name": "name the neurons",
    "score": "score the names against controls",
    "report": "write report/index.html",
}

_OVERRIDES = "Overrides of the configuration, for example: run=runs/trial data.root=/data/CheXpert-v1.0-small sae.0.dict_size=4096"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="medsae", description="Open up a medical vision model: from radiographs to named, measured neurons.")
    top.add_argument("--version", action="version", version=f"medsae {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="more of what Ray and the stages say")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def configured(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=_OVERRIDES)
        sub.add_argument("config", help="a YAML configuration, see configs/")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
        return sub

    run = configured("run", "all stages, one after the other; what is done already is not done again")
    run.add_argument("--force", action="store_true", help="run every stage again")
    for stage, text in STAGE_HELP.items():
        sub = configured(stage, text)
        sub.add_argument("--force", action="store_true", help="run it again")
    serve = configured("serve", "start the feature-extraction service on this machine")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    serve.add_argument("--sae", default=None, help="which SAE of the run (default: the first of the configuration)")
    submit = configured("submit", "submit the run as Ray jobs, a stage a job")
    submit.add_argument("--address", required=True, help="the cluster's job server, for example http://127.0.0.1:8265")
    submit.add_argument("--stages", nargs="+", choices=list(STAGE_HELP), default=list(STAGE_HELP), help="which stages (default: all)")

    text = "write synthetic chest radiographs with planted findings, in CheXpert's layout"
    phantom = commands.add_parser("phantom", help=text, description=text[0].upper() + text[1:] + ".")
    phantom.add_argument("directory", help="folder to write to")
    phantom.add_argument("--images", type=int, default=1000, help="how many (default 1000)")
    phantom.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    phantom.add_argument("--workers", type=int, default=None, help="processes (default: the machine's cores)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when it did what was asked, 2 on a user's error, 130 when interrupted."""
    arguments = _parse(argv)
    _quiet(arguments.verbose)
    try:
        return _dispatch(arguments)
    except MedSAEError as error:
        sys.stderr.write(f"medsae: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("medsae: interrupted; run the same command again to go on\n")
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand before, between and after the overrides."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(r.startswith("-") for r in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _quiet(verbose: bool) -> None:
    """One log line a stage; Ray and the hub speak only with --verbose."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("medsae").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        os.environ.setdefault("RAY_DEDUP_LOGS", "1")
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "phantom":
        from medsae.data.phantom import write_phantoms

        counts = write_phantoms(arguments.directory, arguments.images, seed=arguments.seed, workers=arguments.workers)
        logging.getLogger("medsae").info("phantom: %s", ", ".join(f"{k} {v}" for k, v in counts.items() if isinstance(v, int | float | str)))
        return 0
    from medsae.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.command == "submit":
        from medsae.pipeline.submit import submit

        submit(arguments.config, arguments.overrides, arguments.address, arguments.stages)
        return 0
    if arguments.command == "serve":
        from medsae.pipeline.serve import serve

        serve(config, arguments.host, arguments.port, arguments.sae)
        return 0
    from medsae.pipeline.stage import run_stages

    run_stages(list(STAGE_HELP) if arguments.command == "run" else [arguments.command], config, force=arguments.force)
    return 0


if __name__ == "__main__":
    sys.exit(main())
