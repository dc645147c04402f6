"""The feature service: a real Serve app over HTTP, with the real MedCLIP architecture (untrained) and a small SAE."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medsae.artifacts import RunDir
from medsae.config import RunConfig
from medsae.encoders import load_encoder
from medsae.errors import ArtifactError, ConfigError
from medsae.pipeline.features_service import FeatureServiceConfig, build
from medsae.sae import SAE, load, save
from tests.support.synthetic_run import make_run

PORT = 18741
KEY = "a-key-of-the-tests"
NEURONS = 48
IN_WORK = 4


def write_run(root: Path, encoder_name: str, weights: str | None, **more: object) -> RunDir:
    """A measured run of an encoder, with an SAE that fits it."""
    encoder = load_encoder(encoder_name, weights)
    run, _ = make_run(root, saes=("standard",), n=80, d=encoder.dim, m=NEURONS)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(encoder.dim, NEURONS, generator=generator) / encoder.dim**0.5
    tensors = {"W_enc": w, "b_enc": torch.zeros(NEURONS), "W_dec": w.T.contiguous(), "b_dec": torch.zeros(encoder.dim)}
    save(SAE("standard", tensors), run, "sae/standard")
    manifest = run.read_manifest()
    manifest["encoder"] = vars(encoder.info)
    manifest["config"] = RunConfig.model_validate({"run": run.uri, "encoder": {"name": encoder_name, "weights": weights}}).model_dump(mode="json")
    run.write_manifest(manifest)
    return run


def picture(seed: int = 0, size: tuple[int, int] = (96, 80), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("served"), "medclip-resnet50", "untrained")


@pytest.fixture(scope="module")
def service(ray_cluster: None, run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The open service at /open, one with a key and small limits at /closed; both on loopback."""
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(build({"run": run.uri, "batch": 8, "max_in_work": 64}), name="open", route_prefix="/open")
    toy = write_run(tmp_path_factory.mktemp("toy"), "toy_encoders:Projection", None)
    limits = {"max_body_mb": 0.25, "max_pixels": 20_000, "max_in_work": IN_WORK, "batch_wait_s": 1.0, "batch": 32, "num_cpus": 0.5}
    key = {"api_key_env": "MEDSAE_TEST_KEY", "environment": {"MEDSAE_TEST_KEY": KEY}}
    serve.run(build({"run": toy.uri, **limits, **key}), name="closed", route_prefix="/closed")
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
        yield client
    serve.delete("open")
    serve.delete("closed")


def post(client: httpx.Client, path: str, data: bytes, **options: object) -> httpx.Response:
    return client.post(path, files={"image": ("patient-name-12345.png", data)}, **options)  # type: ignore[arg-type]


pytestmark = [pytest.mark.ray]


def test_features_are_the_models_own(service: httpx.Client, run: RunDir) -> None:
    data = picture(1)
    answer = post(service, "/open/v1/features?top=5", data).json()
    encoder = load_encoder("medclip-resnet50", "untrained")
    x = encoder.encode(encoder.preprocess(Image.open(io.BytesIO(data)))[None])
    z = load((run, "standard")).encode(x)[0]
    order = [int(i) for i in np.argsort(-z, kind="stable") if z[i] > 0]
    assert answer["n_active"] == len(order) > 5
    assert [n["neuron"] for n in answer["neurons"]] == order[:5]
    np.testing.assert_allclose([n["activation"] for n in answer["neurons"]], z[order[:5]], rtol=1e-4)
    names = {r["neuron"]: r["concept"] for r in run.read_table("names/standard.parquet").to_pylist()}
    assert all(n["name"] == names[n["neuron"]] for n in answer["neurons"])
    assert answer["sae"] == "standard"
    assert answer["encoder"]["trained"] is False
    assert "UNTRAINED" in answer["encoder"]["notice"]
    embedding = post(service, "/open/v1/embeddings", data).json()
    assert embedding["dim"] == 512
    np.testing.assert_allclose(embedding["embedding"], x[0], rtol=1e-4, atol=1e-6)
    assert "UNTRAINED" in embedding["encoder"]["notice"]


def test_many_at_once_answer_as_one_at_a_time(service: httpx.Client) -> None:
    images = [picture(i, kind="JPEG") for i in range(12)]
    alone = [post(service, "/open/v1/features", data).json() for data in images]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda data: post(service, "/open/v1/features", data).json(), images))
    for a, b in zip(alone, together, strict=True):
        assert a["n_active"] == b["n_active"]
        np.testing.assert_allclose([n["activation"] for n in a["neurons"]], [n["activation"] for n in b["neurons"]], rtol=1e-3)


def test_neurons(service: httpx.Client, run: RunDir) -> None:
    table = run.read_table("measure/standard/neurons.parquet").to_pydict()
    listed = service.get("/open/v1/neurons?limit=7").json()
    assert listed["total"] == NEURONS
    by_r = sorted(range(NEURONS), key=lambda i: -np.nan_to_num(table["top_r"][i], nan=-9))
    assert [n["neuron"] for n in listed["neurons"]] == by_r[:7]
    one = service.get(f"/open/v1/neurons/{by_r[0]}").json()
    assert one["top_r"] == pytest.approx(table["top_r"][by_r[0]])
    assert one["correlations"]["Edema"] == pytest.approx(table["r_Edema"][by_r[0]])
    assert one["exemplars"]
    assert "patient" not in json.dumps(one), "a path of the data must not be shown"
    edema = service.get("/open/v1/neurons?limit=1&label=Edema").json()["neurons"][0]["neuron"]
    assert table["r_Edema"][edema] == pytest.approx(np.nanmax(table["r_Edema"]))
    for path, status in (
        (f"/open/v1/neurons/{NEURONS}", 404),
        ("/open/v1/neurons/-1", 422),
        ("/open/v1/neurons?label=Gout", 404),
        ("/open/v1/nothing", 404),
    ):
        answer = service.get(path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"code", "message"}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"PatientName=DOE^JANE", "not an image"),
        (picture()[:200], "damaged"),
        (b"\0" * 128 + b"DICM" + b"DOE^JANE", "DICOM"),
    ],
)
def test_bad_images_are_refused_in_one_line(service: httpx.Client, data: bytes, word: str) -> None:
    answer = post(service, "/open/v1/features", data)
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert word in message
    assert "\n" not in message
    assert "DOE" not in answer.text
    assert "patient-name" not in answer.text


def test_a_request_without_an_image_is_refused(service: httpx.Client) -> None:
    answer = service.post("/open/v1/features", json={"image": "x"})
    assert answer.status_code == 422
    assert "image" in answer.json()["error"]["message"]
    assert service.post("/open/v1/features?top=0", files={"image": ("a", picture())}).status_code == 422


def test_key(service: httpx.Client) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": ""}):
        answer = post(service, "/closed/v1/features", picture(size=(32, 32)), headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert service.get("/closed/v1/neurons", headers=headers).status_code == 401
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
        assert post(service, "/closed/v1/features", picture(size=(32, 32)), headers=headers).status_code == 200
    assert service.get("/closed/healthz").json() == {"status": "ok"}
    assert service.get("/closed/readyz").json()["status"] == "ready"


def test_limits(service: httpx.Client) -> None:
    headers = {"X-API-Key": KEY}
    assert post(service, "/closed/v1/features", b"\0" * 300_000, headers=headers).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"\0" * 10_000

    # No length announced: counted while it comes.
    answer = service.post("/closed/v1/features", content=pieces(), headers={**headers, "Content-Type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413
    bomb = io.BytesIO()
    Image.new("1", (6000, 6000)).save(bomb, "PNG", optimize=True)
    answer = post(service, "/closed/v1/features", bomb.getvalue(), headers=headers)
    assert answer.status_code == 413
    assert "too many pixels" in answer.json()["error"]["message"]


def test_a_full_service_says_when_to_come_back(service: httpx.Client) -> None:
    # A batch waits a second for more images, so that the requests surely overlap.
    data, headers = picture(size=(32, 32)), {"X-API-Key": KEY}
    with ThreadPoolExecutor(4 * IN_WORK) as pool:
        answers = list(pool.map(lambda _: post(service, "/closed/v1/features", data, headers=headers), range(4 * IN_WORK)))
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= IN_WORK
    assert all(int(a.headers["Retry-After"]) > 0 for a in answers if a.status_code == 429)
    assert post(service, "/closed/v1/features", data, headers=headers).status_code == 200, "it goes on afterwards"


def test_wrong_arguments_are_told_before_anything_starts(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run: Field required"):
        build({})
    with pytest.raises(ConfigError, match="topp"):
        build({"run": run.uri, "topp": 3})
    with pytest.raises(ArtifactError, match="no SAE 'other'; there is standard"):
        build({"run": run.uri, "sae": "other"})
    with pytest.raises(ArtifactError, match="medsae fit"):
        build({"run": str(tmp_path)})


@pytest.mark.parametrize("name", ["local.yaml", "gpu.yaml"])
def test_deployment_files(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    tree = yaml.safe_load((Path(__file__).parents[2] / "deployments" / name).read_text())
    schema = ServeDeploySchema.model_validate(tree)
    for application in schema.applications:
        assert application.import_path == "deployments.features:build"
        FeatureServiceConfig.model_validate(application.args)
