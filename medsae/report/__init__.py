"""The HTML report and its figures. Reads artifacts only."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from medsae.report.config import ReportConfig
    from medsae.report.page import build_report

__all__ = [
    "ReportConfig",
    "build_report",
]

# Loaded on first use: configuration sections are read in processes that need nothing else of this package.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["ReportConfig"],
        "page": ["build_report"],
    },
)
