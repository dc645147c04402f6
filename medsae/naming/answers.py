"""Answers on disk as they come, so that a job that was killed asks nothing twice."""

from __future__ import annotations

import json
import posixpath
import uuid
from types import TracebackType
from typing import IO, Any

from medsae.artifacts import RunDir


class AnswerLog:
    """JSON lines under a folder of the run, one an answer, each with its key.

    On a local disk each record is a line that is appended and flushed at once. An object store cannot append, so there records go out in files of
    `per_file` records. A last line that was cut off by a kill is ignored.

    Args:
        run: the run directory.
        folder: relative path, for example `names/.answers/standard`.
    """

    def __init__(self, run: RunDir, folder: str, per_file: int = 32) -> None:
        self.run, self.folder, self.per_file = run, folder, per_file
        self._pending: list[str] = []
        self._file: IO[str] | None = None

    def read(self) -> dict[str, dict[str, Any]]:
        """All whole records by key; of records with the same key, the last written."""
        records: list[tuple[int, dict[str, Any]]] = []
        for path in self.run.list(self.folder, ".jsonl"):
            for line in self.run.read_bytes(path).decode("utf-8", "replace").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and "key" in record:
                    records.append((int(record.get("order", 0)), record))
        return {record["key"]: record for _, record in sorted(records, key=lambda r: r[0])}

    def __enter__(self) -> AnswerLog:
        self._order = max((int(r.get("order", 0)) for r in self.read().values()), default=0)
        if self.run.is_local:
            self.run.fs.create_dir(self.run.path(self.folder), recursive=True)
            # A file of this process's own: two jobs on one run must not write into each other's lines.
            self._file = open(self.run.path(posixpath.join(self.folder, f"{uuid.uuid4().hex}.jsonl")), "a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._flush()

    def append(self, key: str, record: dict[str, Any]) -> None:
        """Writes one answer."""
        self._order += 1
        line = json.dumps({**record, "key": key, "order": self._order}) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._pending.append(line)
        if len(self._pending) >= self.per_file:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self.run.write_bytes(posixpath.join(self.folder, f"{uuid.uuid4().hex}.jsonl"), "".join(self._pending).encode())
            self._pending = []
