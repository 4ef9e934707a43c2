"""`python -m pipeline`: the one door. Run it from the clone."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("models", "judges", "rewards", "pipeline")

# Read by OpenMP, huggingface_hub, tokenizers and datasets when they are first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def check_packages() -> None:
    """A stray `models` in site-packages must not stand in for ours: all packages share one parent folder."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        place = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if place != home / name:
            print(f"{name}: found {place}, expected {home / name}; run from {home}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    check_packages()
    from pipeline.cli import main

    main()
