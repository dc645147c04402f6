"""What is measured of neurons: mergeable float64 states with `update`, `merge` and `compute`. `docs/metrics.md` has every formula."""

from medsae.metrics.activity import Activity, Reconstruction
from medsae.metrics.correlation import PaperTable, alive, best_neuron, entropy, paper_table, top_label
from medsae.metrics.detection import auroc, auroc_columns
from medsae.metrics.labels import apply_policy, label_counts
from medsae.metrics.moments import Moments
from medsae.metrics.monosemanticity import Monosemanticity
from medsae.metrics.state import MeasureState
from medsae.metrics.top import TopImages

__all__ = [
    "Activity",
    "MeasureState",
    "Moments",
    "Monosemanticity",
    "PaperTable",
    "Reconstruction",
    "TopImages",
    "alive",
    "apply_policy",
    "auroc",
    "auroc_columns",
    "best_neuron",
    "entropy",
    "label_counts",
    "paper_table",
    "top_label",
]
