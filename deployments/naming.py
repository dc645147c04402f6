"""The naming service as a Serve application: `serve run deployments.naming:build model=google/medgemma-4b-it`, or by `deployments/naming-gpu.yaml`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medsae.pipeline.naming_service import build as _build

if TYPE_CHECKING:
    from ray.serve.deployment import Application


def build(args: dict[str, Any]) -> Application:
    """The application; arguments as in `medsae.pipeline.naming_service.ServiceConfig`."""
    return _build(args)
