"""The verb `audit`: how far a run's judge can be believed, found out before anything is learned from it.

    audit/audit.json    the numbers, field by field those of `pipeline.findings.Findings`, and the conclusion
    audit/index.html    what they mean, with the pictures, as one page that opens offline

Equal settings and judges give equal files.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from judges.base import Judge
from pipeline.auditing.cases import shapes_cases, shapes_clips
from pipeline.auditing.examining import examine
from pipeline.auditing.findings import Findings, findings
from pipeline.auditing.labels import read_labels
from pipeline.launch import Servers
from pipeline.loop import run_dir
from pipeline.progress import Progress, quiet_libraries
from pipeline.runner import process_state
from pipeline.store import atomic_write_text


def audit(config: Any, labels: str | Path | None = None, judge: Judge | None = None) -> Findings:
    """Audit a judge and write what was found into the run's folder.

    Args:
        config: of the run.
        labels: a table of human labels (see `pipeline.auditing.labels`) to audit on; None for the embedded world.
        judge: instead of the run's.

    Raises:
        UserError: the labels cannot be used, or there are none and the run's prompts are not of the embedded world.
        judges.base.Unavailable: nobody answers.
    """
    # matplotlib and jinja take a second to import.
    from pipeline.report.audit import render, view

    quiet_libraries()
    settings, progress, device = config.audit, Progress(), str(process_state().device)
    cases = read_labels(labels) if labels else shapes_cases(config, settings.prompts, device)
    clips = () if labels else shapes_clips(config, settings.clips, settings.frames)
    with Servers(run_dir(config), "audit", progress.say):
        heard = examine(judge or config.judge.build(device), cases, settings.probed, config.seed, progress, clips)
    found = findings(heard)
    shown = view(config.name, heard, found, settings.mistakes, settings.largest_side)
    page, folder = render(shown), run_dir(config) / "audit"
    numbers = {"conclusion": asdict(shown.conclusion), **asdict(found)}
    atomic_write_text(folder / "audit.json", json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write_text(folder / "index.html", page)
    progress.say(shown.conclusion.claim)
    for name in ("audit.json", "index.html"):
        progress.say(str(folder / name))
    return found
