"""The verb `export`: what a run tuned, in a form that other programs read.

    README.md       a model card: base, data, judge, reward, figures with their intervals, limits
    samples.png     held-out prompts side by side, the base model's pictures above the tuned one's
    summary.json    the run's numbers

and beside them, by the format,

    diffusers       pytorch_lora_weights.safetensors, which `load_lora_weights` of the pipeline reads
    comfyui         the same layers under the names that ComfyUI and kohya's scripts know, in a file of that name
    merged          the whole pipeline, or generator of ours, with what was learned in its weights

Equal runs give equal files.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file

from models import kohya
from models.adapters.base import DiffusersGenerator
from models.geometry import Geometry, Unknown, geometry
from models.lora import WEIGHTS
from pipeline.config import Config
from pipeline.progress import Progress, quiet_libraries
from pipeline.report.model import Card, card
from pipeline.rl.grids import COLUMNS, sheet
from pipeline.settings import UserError, load
from pipeline.stages.evaluate import MODELS
from pipeline.stages.finetune import ADAPTER
from pipeline.store import Artifact, fingerprint, read_rows
from pipeline.summary import summary

Format = Literal["diffusers", "comfyui", "merged"]
_SAMPLES = "samples.png"
_REFUSED = (401, 403, 404)
"""What the hub answers to who may not write."""
_TOLD = ["model", "prompt_id", "sample", "gold"]


def export(run: Path, format: Format, to: Path | None = None, push: str | None = None) -> None:
    """Write what the run in the folder `run` tuned into `to`, or into `export/FORMAT` of the run.

    Args:
        push: the hub repository, `owner/name`, that it goes to besides; a new one is private.

    Raises:
        UserError: the run has no tuned generator, or not one of this form; the folder holds something else; the hub
            does not take it.
    """
    if format not in get_args(Format):
        raise UserError(f"--format: unknown {format}; known here: {', '.join(get_args(Format))}")
    if push:
        _check_repo(push)
    config = load(Config, run / "config.yaml")
    tuned = Artifact(run / "finetune")
    if not tuned.manifest or tuned.damaged():
        raise UserError(f"{tuned.folder} is not complete; `python -m pipeline run CONFIG` goes on with it")
    if format != "merged" and config.finetune.kept_folder != ADAPTER:
        raise UserError(f"--format: {format} is for an adapter, and finetune.lora was null; take merged")
    quiet_libraries()
    job = Job(config, run, format, tuned, Artifact(run / "evaluate"), Artifact(to or run / "export" / format))
    progress = Progress()
    if job.target.complete(job.fingerprint):
        progress.say(f"{job.target.folder}: nothing left to do")
    else:
        job.target.check_free()
        job.write()
        progress.say(f"{job.target.folder}: {format}, with a model card")
    if push:
        progress.say(_pushed(job.target.folder, push, f"{config.name}: {format}"))


@dataclass(frozen=True)
class Job:
    """One export. Where nothing was measured, its card has no figures."""

    config: Config
    run: Path
    format: Format
    tuned: Artifact
    evaluate: Artifact
    target: Artifact

    @property
    def fingerprint(self) -> str:
        return fingerprint({"verb": "export", "version": 1, "format": self.format, "inputs": self._inputs})

    @property
    def _inputs(self) -> dict[str, str]:
        """The fingerprints of what it is made from."""
        found = {"finetune": self.tuned.manifest.fingerprint}
        return found | ({"evaluate": self.evaluate.manifest.fingerprint} if self.measured else {})

    @property
    def measured(self) -> bool:
        """Whether `evaluate` stands, and is of what was tuned."""
        manifest = self.evaluate.manifest
        return manifest is not None and manifest.inputs["finetune"] == self.tuned.fingerprint

    @property
    def kept(self) -> Path:
        """The folder of what was learned."""
        return self.tuned.folder / self.config.finetune.kept_folder

    def write(self) -> None:
        self.target.begin(self.fingerprint)
        _WRITERS[self.format](self)
        measured = summary(self.run) if self.measured else None
        if measured:
            self.target.write_text("summary.json", json.dumps(measured, indent=2) + "\n")
        signals = self.tuned.folder / "signals.json"
        looks = self.geometry
        found = Card(
            config=self.config,
            format=self.format,
            pipeline=looks.pipeline,
            comfyui=looks.network.kind in kohya.DOTTED or looks.network_name == "unet",
            summary=measured,
            rows=read_rows(self.evaluate, columns=_TOLD).to_list() if measured else [],
            prompts=tuple(self._hang_samples()) if measured else (),
            signals=json.loads(signals.read_text(encoding="utf-8")) if signals.is_file() else None,
            versions=self.tuned.manifest.versions,
        )
        self.target.write_text("README.md", card(found))
        self.target.finish(self._inputs, extra={"verb": "export", "format": self.format})

    @property
    def geometry(self) -> Geometry:
        try:
            return geometry(self.config.generator.checkpoint, self.config.generator.revision)
        except Unknown as error:
            raise UserError(f"generator.checkpoint: {error}") from None

    def _hang_samples(self) -> list[str]:
        """Hang the first evaluated picture of each of the first prompts; these, in the order of the columns."""
        hung: dict[str, dict[str, np.ndarray]] = {}
        first = self.evaluate.names("shard-*.parquet")[0]
        for row in read_rows(self.evaluate, first, ["model", "prompt", "image"]):
            hung.setdefault(row["prompt"], {}).setdefault(row["model"], np.asarray(row["image"]))
        prompts = list(hung)[:COLUMNS]
        found = sheet([[hung[prompt][model] for prompt in prompts] for model in MODELS])
        self.target.write(_SAMPLES, found.save)
        return prompts


def _diffusers(job: Job) -> None:
    job.target.write(WEIGHTS, lambda path: shutil.copyfile(job.kept / WEIGHTS, path))


def _comfyui(job: Job) -> None:
    network = job.geometry.network_name if job.geometry.pipeline else None
    named = kohya.named(kohya.folded(job.kept / WEIGHTS, network), job.geometry.network.kind)
    job.target.write(WEIGHTS, lambda path: save_file(named, path))


def _merged(job: Job) -> None:
    generator = job.config.generator.build("cpu", job.kept)
    with TemporaryDirectory(dir=job.target.folder) as folder:
        if isinstance(generator, DiffusersGenerator):
            network = generator.transformer
            # An adapter's file may have made its network one of a class of ours, which no pipeline can load.
            network.__class__ = next(one for one in type(network).__mro__ if one.__module__.startswith("diffusers."))
            generator.pipe.register_modules(**{generator.network: network})
            generator.pipe.save_pretrained(folder)
        else:
            generator.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*.json")):
            _forget_place(path)
        for made in sorted(Path(folder).iterdir()):
            if made.is_dir():
                job.target.write_folder(made.name, lambda place, made=made: made.rename(place))
            else:
                job.target.write(made.name, lambda place, made=made: made.rename(place))


_WRITERS: dict[str, Callable[[Job], None]] = {"diffusers": _diffusers, "comfyui": _comfyui, "merged": _merged}


def _forget_place(path: Path) -> None:
    """Drop from a config where on this machine its model was loaded from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    places = [name for name in ("_name_or_path", "name_or_path") if name in config]
    if places:
        kept = {name: value for name, value in config.items() if name not in places}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push: {error}; write owner/name") from None
    if "/" not in repo:
        raise UserError(f"--push: {repo} names no owner; write owner/name")


def _pushed(folder: Path, repo: str, message: str) -> str:
    hub = HfApi()
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
    except (HTTPError, OSError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "`hf auth login` with a token that may write, and try again" if _refuses(error) else "try again"
        raise UserError(f"--push: {repo}: {told}; {remedy}") from None


def _refuses(error: Exception) -> bool:
    """Whether it is about who may write, rather than a network or a disk."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _REFUSED
    return isinstance(error, LocalTokenNotFoundError)
