"""What is measured of neurons: mergeable float64 states with `update`, `merge` and `compute`. `docs/metrics.md` has every formula."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
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

# Loaded on first use: configuration sections are read in processes that need nothing else of this package.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "activity": ["Activity", "Reconstruction"],
        "correlation": ["PaperTable", "alive", "best_neuron", "entropy", "paper_table", "top_label"],
        "detection": ["auroc", "auroc_columns"],
        "labels": ["apply_policy", "label_counts"],
        "moments": ["Moments"],
        "monosemanticity": ["Monosemanticity"],
        "state": ["MeasureState"],
        "top": ["TopImages"],
    },
)
