"""Configuration of the report."""

from pydantic import Field

from medsae.settings import Section


class ReportConfig(Section):
    """What the report shows."""

    title: str = "MedSAE"
    """Title of the page."""
    cards: int = Field(24, gt=0)
    """Cards of the best neurons an SAE."""
    images: int = Field(6, gt=0)
    """Images a card."""
