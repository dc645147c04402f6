"""The HTML report and its figures. Reads artifacts only."""

from medsae.report.config import ReportConfig
from medsae.report.page import build_report

__all__ = ["ReportConfig", "build_report"]
