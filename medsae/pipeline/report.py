"""report: artifacts to `report/index.html` and figures."""

from __future__ import annotations

from medsae.artifacts import RunDir
from medsae.config import RunConfig
from medsae.pipeline.stage import StageResult
from medsae.report import build_report


def run(config: RunConfig, run: RunDir) -> StageResult:
    """Writes the report; files of an earlier one that this one does not have are removed.

    Raises:
        ArtifactError: nothing was measured yet, or an artifact does not fit the contract.
    """
    files = build_report(run, config.report, config.data.root)
    # The page comes last: where it is, its figures are.
    outputs = {path: run.write_bytes(path, content) for path, content in sorted(files.items(), key=lambda item: item[0].endswith(".html"))}
    for path in run.list("report"):
        if path not in outputs:
            run.delete(path)
    return StageResult(counts={"figures": len(files) - 1, "bytes": len(files["report/index.html"])}, outputs=outputs)
