"""Configuration of the input data."""

from typing import Literal

from pydantic import Field

from medsae.settings import Section


class DataConfig(Section):
    """Which images, which labels, and how labels are read."""

    format: Literal["chexpert", "csv"] = "chexpert"
    """`chexpert`: the CSV and folder layout of CheXpert. `csv`: any CSV with a path column and label columns."""
    root: str = ""
    """Folder or URI (`s3://`, `gs://`) that image paths are relative to and that holds the CSV files."""
    csv: list[str] | None = None
    """CSV files, relative to `root`. Default: whichever of `train.csv` and `valid.csv` there are."""
    path_column: str = "Path"
    """Column of the image path (`csv` format)."""
    label_columns: list[str] | None = None
    """Label columns (`csv` format: required; `chexpert`: the 14 of CheXpert)."""
    patient_column: str | None = None
    """Column of the patient (`csv` format). Without one every image is its own patient."""
    study_column: str | None = None
    """Column of the study (`csv` format)."""
    view_column: str | None = None
    """Column with `frontal` or `lateral` (`csv` format)."""
    sex_column: str | None = None
    """Column of the sex (`csv` format)."""
    age_column: str | None = None
    """Column of the age in years (`csv` format)."""
    views: Literal["frontal", "lateral", "all"] = "frontal"
    """Which views to use."""
    confound_columns: list[str] = []
    """Further columns of the CSV that neurons are held against beside sex, age, view and projection: the institution, the scanner."""
    uncertain: Literal["zeros", "ones", "ignore", "keep"] = "zeros"
    """What an uncertain label (-1) counts as in the metrics; `keep`: the number -1 in correlations, not positive elsewhere (the paper's way)."""
    blank: Literal["negative", "ignore"] = "negative"
    """What a blank label (not mentioned) counts as in the metrics."""
    eval_fraction: float = Field(0.3, gt=0, lt=1)
    """Share of patients (by a hash of the patient id) held out of SAE training for measuring."""
    limit: int | None = Field(None, gt=0)
    """Use only the first rows, for a trial."""
    max_pixels: int = Field(100_000_000, gt=0)
    """Images with more pixels are rejected before they are decoded (decompression bombs)."""
