"""Synthetic chest radiographs with planted findings: `write_phantoms` makes a collection, `render` draws one."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from medsae.data.phantom.model import Anatomy, Capture, Findings, Phantom
    from medsae.data.phantom.render import render
    from medsae.data.phantom.sampling import LABELS, rows
    from medsae.data.phantom.writer import write_phantoms

__all__ = [
    "LABELS",
    "Anatomy",
    "Capture",
    "Findings",
    "Phantom",
    "render",
    "rows",
    "write_phantoms",
]

# Loaded on first use: who needs the names of the findings need not import what draws them.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "model": ["Anatomy", "Capture", "Findings", "Phantom"],
        "render": ["render"],
        "sampling": ["LABELS", "rows"],
        "writer": ["write_phantoms"],
    },
)
