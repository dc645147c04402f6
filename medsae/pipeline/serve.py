"""`medsae serve`: the feature service on this machine, until interrupted."""

from __future__ import annotations

import logging
import signal
import threading

from medsae.config import RunConfig
from medsae.errors import ServiceError
from medsae.pipeline.cluster import cluster_gpus, ray_session

log = logging.getLogger("medsae")


def serve(config: RunConfig, host: str, port: int, sae: str | None = None) -> None:
    """Starts the feature service and blocks until SIGINT or SIGTERM.

    Raises:
        ArtifactError: the run has no SAE yet.
        ServiceError: the port is taken, or the application does not come up.
    """
    import socket

    from ray import serve as ray_serve

    from medsae.pipeline.features_service import build

    with socket.socket() as probe:
        if probe.connect_ex((host, port)) == 0:
            raise ServiceError(f"{host}:{port} is taken by another server: give another --port")
    with ray_session(config.ray):
        gpus = cluster_gpus(config.ray)
        app = build({"run": config.run, "sae": sae, "num_gpus": 1 if gpus else 0})
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(app, name="features", route_prefix="/")
        log.info("features: http://%s:%d (POST /v1/features, /v1/embeddings; GET /v1/neurons, /docs); Ctrl-C ends it", host, port)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        ray_serve.shutdown()
