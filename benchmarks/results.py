"""Measurements that take hours, a line each in `benchmarks/results/`, so that they can be spread over days.

The files are committed: the tables in the documentation are made of them, and a command measures only what they lack.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.store import fingerprint

FOLDER = Path(__file__).parent / "results"


class Results:
    """The lines of a benchmark. Each has a `key`, of what was measured, and what was `found`."""

    def __init__(self, benchmark: str):
        self.path = FOLDER / f"{benchmark}.jsonl"

    def find(self, **key: Any) -> Any:
        """What was found for a key, the last time; None where it was never measured."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines]
        return next((row["found"] for row in reversed(rows) if row["key"] == key), None)

    def add(self, found: Any, **key: Any) -> None:
        """Append a line: benchmarks that run side by side may share a file."""
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "found": found}) + "\n")


def digest(config: Config) -> str:
    """Of all settings that are not a name or a place."""
    return fingerprint(config.model_dump(mode="json", exclude={"name", "out"}))[:12]
