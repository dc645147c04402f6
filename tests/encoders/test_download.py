"""The download of a checkpoint, from a real HTTP server on the loopback."""

from __future__ import annotations

import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from medsae.encoders import weights
from medsae.errors import WeightsError


def archive() -> bytes:
    state, sink = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.arange(3.0)}, state)
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr(weights.WEIGHTS_NAME, state.getvalue())
    return sink.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Address, and the paths that were asked for. `/pointer` leads to `/file.zip`, `/bad` to what is not there, `/short` to an answer cut off."""
    asked: list[str] = []
    content = archive()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            base = f"http://127.0.0.1:{self.server.server_address[1]}"
            body = {"/pointer": f"{base}/file.zip\n", "/bad": f"{base}/nothing", "/short": f"{base}/cut.zip", "/page": f"{base}/html"}.get(self.path)
            answers = {"/file.zip": content, "/cut.zip": content, "/html": b"<html>quota exceeded</html>"}
            data = body.encode() if body is not None else answers.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write((data or b"")[: len(content) // 2 if self.path == "/cut.zip" else None])

        def log_message(self, format: str, *args: object) -> None:
            pass

    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()
        thread.join(5)


def test_the_archive_is_fetched_once_and_read(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    paths = [weights.download(f"{address}/pointer", tmp_path / "cache", "model") for _ in range(2)]
    assert paths == [tmp_path / "cache" / "download.zip"] * 2
    assert asked == ["/pointer", "/file.zip"]
    assert weights.read_state_dict(paths[0])["a"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("path", ["bad", "short", "page", "missing"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(path: str, server: tuple[str, list[str]], tmp_path: Path) -> None:
    pointer = f"{server[0]}/{path}"
    with pytest.raises(WeightsError, match="cannot be downloaded") as caught:
        weights.download(pointer, tmp_path / "cache", "model")
    message = str(caught.value)
    assert "\n" not in message
    assert pointer in message
    assert str(tmp_path / "cache" / "download.zip") in message
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
