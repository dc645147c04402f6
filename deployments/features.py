"""The feature service as a Serve application: `serve run deployments.features:build run=runs/demo`, or by `deployments/local.yaml` and `gpu.yaml`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medsae.pipeline.features_service import build as _build

if TYPE_CHECKING:
    from ray.serve.deployment import Application


def build(args: dict[str, Any]) -> Application:
    """The application; arguments as in `medsae.pipeline.features_service.FeatureServiceConfig`."""
    return _build(args)
