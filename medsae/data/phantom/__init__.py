"""Synthetic chest radiographs with planted findings: `write_phantoms` makes a collection, `render` draws one."""

from medsae.data.phantom.model import Anatomy, Capture, Findings, Phantom
from medsae.data.phantom.render import render
from medsae.data.phantom.sampling import LABELS, rows
from medsae.data.phantom.writer import write_phantoms

__all__ = ["LABELS", "Anatomy", "Capture", "Findings", "Phantom", "render", "rows", "write_phantoms"]
