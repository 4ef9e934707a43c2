"""Two processes make what one makes: the same bytes when sampling, the same numbers to rounding when training.

They are started by `accelerate launch` itself, as no other test's are.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import pipeline
from pipeline.store import Artifact, read_rows
from tests.processes import HOME

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(HOME / "configs" / "accelerate" / "cpu2.yaml")]
STAGES = ("sample", "finetune")


@pytest.fixture(scope="module")
def runs(config_at, folder):
    pipeline.run(config_at("one"))
    one, two = folder / "one", folder / "two"
    shutil.copytree(one, two)
    (two / "events.jsonl").unlink()
    for stage in STAGES:
        shutil.rmtree(two / stage)
    command = ["-m", "pipeline", "run", str(config_at("two")), *(f"--only={stage}" for stage in STAGES)]
    done = subprocess.run(
        [sys.executable, *LAUNCH, *command],
        cwd=HOME,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


def test_two_processes_took_part(runs):
    events = [json.loads(line) for line in (runs[1] / "events.jsonl").read_text().splitlines()]
    processes = {event["stage"]: event["processes"] for event in events if event["kind"] == "stage_start"}
    assert processes == dict.fromkeys(STAGES, 2)


def test_sampled_shards_are_the_same_bytes(runs):
    one, two = (Artifact(run / "sample").files for run in runs)
    assert one == two


def test_fine_tuning_agrees_to_rounding(runs):
    one, two = (read_rows(Artifact(run / "finetune"), "curves-*.parquet") for run in runs)
    assert np.allclose(one["reward_mean"], two["reward_mean"], atol=1e-3)
    assert np.allclose(one["grad_norm"], two["grad_norm"], rtol=1e-2)
    assert one["groups"] == two["groups"]
