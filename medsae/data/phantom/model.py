"""What one phantom radiograph is made of: the patient's anatomy, the planted findings and how the picture was taken."""

from __future__ import annotations

from dataclasses import dataclass, fields

SIDES = ("left", "right")
"""The patient's sides; the left one lies on the right of a frontal image."""


@dataclass(frozen=True)
class Anatomy:
    """The body of one patient, the same in all studies. Lengths are in cm, or factors of the average."""

    seed: int
    """Seed of the vessel trees and of all small individual differences."""
    sex: str = "Male"
    """`Male` or `Female`."""
    age: int = 60
    """Years; the aorta unfolds and its knob calcifies with age."""
    habitus: float = 0.0
    """-1 slim to 1 obese: soft tissue around the rib cage."""
    width: float = 1.0
    """Width of the rib cage."""
    height: float = 1.0
    """Length of the rib cage."""
    heart: float = 1.0
    """Size of the healthy heart."""
    aorta: float = 1.0
    """Size of the aortic arch."""
    breast: float = 0.0
    """Thickness of the breasts in cm (0 for men)."""
    pacemaker_side: str = "left"
    line_side: str = "right"
    nodule_zone: float = 0.5
    """Height of the nodule, 0 apex to 1 base."""
    nodule_lateral: float = 0.5
    """Position of the nodule, 0 medial to 1 lateral."""
    consolidation_zone: str = "lower"
    """`upper` or `lower`: where pneumonia-like consolidation sits."""
    fracture_rib: int = 6
    """First broken rib (3 to 8)."""


@dataclass(frozen=True)
class Findings:
    """Severity in [0, 1] of every planted finding; 0 is absent."""

    cardiomegaly: float = 0.0
    mediastinum: float = 0.0
    """Widened mediastinum (Enlarged Cardiomediastinum)."""
    edema: float = 0.0
    effusion_left: float = 0.0
    effusion_right: float = 0.0
    pneumothorax_left: float = 0.0
    pneumothorax_right: float = 0.0
    consolidation_left: float = 0.0
    consolidation_right: float = 0.0
    atelectasis_left: float = 0.0
    atelectasis_right: float = 0.0
    nodule_left: float = 0.0
    nodule_right: float = 0.0
    fracture_left: float = 0.0
    fracture_right: float = 0.0
    central_line: float = 0.0
    """Devices are there (1) or not (0)."""
    endotracheal_tube: float = 0.0
    ecg_leads: float = 0.0
    pacemaker: float = 0.0

    def side(self, name: str, side: str) -> float:
        """Severity of a lateralised finding on one side."""
        return float(getattr(self, f"{name}_{side}"))

    def worst(self, name: str) -> float:
        """Severity of a finding, the higher of both sides where it has sides."""
        if hasattr(self, name):
            return float(getattr(self, name))
        return max(self.side(name, s) for s in SIDES)


FINDINGS = tuple(f.name for f in fields(Findings))
"""Columns of `truth.csv` that hold severities."""


@dataclass(frozen=True)
class Capture:
    """How the radiograph was taken: nuisances that a reader should look through."""

    seed: int
    """Seed of the noise and of loose objects (wires, marker)."""
    view: str = "frontal"
    """`frontal` or `lateral`."""
    projection: str = "PA"
    """`AP` or `PA`; empty for lateral views."""
    exposure: float = 0.0
    """-1 underexposed (bright film) to 1 overexposed (dark film)."""
    rotation: float = 0.0
    """Turn of the patient about the long axis, degrees; positive brings the sternum to the right of the image."""
    tilt: float = 0.0
    """In-plane rotation, degrees."""
    inspiration: float = 0.7
    """0 poor to 1 deep."""
    zoom: float = 1.0
    """Magnification of the film."""
    shift_x: float = 0.0
    """Horizontal decentring in cm."""
    shift_y: float = 0.0
    noise: float = 0.5
    """Quantum noise, 0 none to 1 strong."""
    marker: str = "L"
    """Lead letter on the film: `L`, `R` or empty."""
    aspect: float = 1.22
    """Width over height of the film."""


NUISANCES = ("view", "projection", "exposure", "rotation", "tilt", "inspiration", "zoom", "shift_x", "shift_y", "noise", "marker", "aspect")
"""Columns of `truth.csv` from the capture."""

ANATOMY = ("sex", "age", "habitus", "consolidation_zone", "pacemaker_side", "line_side")
"""Columns of `truth.csv` from the anatomy."""


@dataclass(frozen=True)
class Phantom:
    """All that one image depends on: the same object always renders to the same pixels."""

    anatomy: Anatomy
    findings: Findings
    capture: Capture
