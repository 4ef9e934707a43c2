"""The command line: `python -m pipeline VERB CONFIG [key.sub=value …]`.

Exit codes: 0 done, 1 our bug, 2 bad input, 75 interrupted and resumable.

Stages import torch and transformers, so they are imported inside the verbs that need them: `--help` and a
misspelt setting answer at once.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from judges.base import Unavailable
from pipeline.processes import LAUNCHED, part, spread
from pipeline.settings import Section, SettingsError, UserError, load

app = typer.Typer(
    help="Salon: align a text-to-image generator with AI feedback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings laid over the file.")]
Processes = Annotated[int, typer.Option(min=1, help="Of this machine, that share the work.")]

_STAGES = {
    "sample": "Sample images from the generator.",
    "judge": "Let the judge score the images against their prompts.",
    "prefer": "Turn verdicts into preference pairs.",
    "reward": "Train the reward model and report on it.",
    "finetune": "Move a LoRA on the generator towards the reward.",
    "evaluate": "Sample from the tuned generator and measure it.",
    "report": "Write the report.",
}


def main() -> None:
    """Run the command line of this process; bad input becomes one line and exit code 2, no judge to ask 75."""
    try:
        _answer()
    except SystemExit:
        part()
        raise


def _answer() -> None:
    try:
        app()
    except Unavailable as error:
        print(f"{error}; the same command goes on once somebody answers", file=sys.stderr)
        sys.exit(75)
    except UserError as error:
        # Every process of a launch reads the same settings; the first one tells what is wrong with them.
        if not isinstance(error, SettingsError) or os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(2)


@app.command("run")
def run_all(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(help="Just this stage; may be repeated.")] = None,
    processes: Processes = 1,
) -> None:
    """Run all stages whose results do not stand already."""
    _run(config, overrides, only or [], processes)


def _stage_verb(name: str) -> Callable[[Path, list[str] | None, int], None]:
    def verb(config: ConfigFile, overrides: Overrides = None, processes: Processes = 1) -> None:
        _run(config, overrides, [name], processes)

    return verb


for _name, _help in _STAGES.items():
    app.command(_name, help=_help)(_stage_verb(_name))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a device's, to plan for that one.")] = None,
    rate: Annotated[float | None, typer.Option(help="Its matmul rate in 1e12 operations a second.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Of a launch on several devices, to plan for.")] = None,
) -> None:
    """Show what a run would do, about how long it takes and how much memory; exit code 2 where it does not fit."""
    settings, run_dir = _settings(config, overrides)
    from pipeline.verbs.plan import plan as show

    show(settings, run_dir, memory, rate, processes)


@app.command()
def status(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show what stands, what it took, and who is at work."""
    settings, run_dir = _settings(config, overrides)
    from pipeline import runner
    from pipeline.stages import STAGES

    runner.print_status(runner.states(settings, STAGES, run_dir), run_dir, Console())


@app.command()
def pretrain(config: ConfigFile, overrides: Overrides = None) -> None:
    """Pretrain a native generator or judge on the embedded world."""
    from pipeline.stages import pretrain as stage

    stage.pretrain(load(stage.PretrainConfig, config, overrides or ()))


@app.command()
def audit(
    config: ConfigFile,
    overrides: Overrides = None,
    labels: Annotated[
        Path | None, typer.Option(help="Parquet or JSONL of human labels: image, prompt, verdict.")
    ] = None,
) -> None:
    """Find out how far the run's judge can be believed."""
    settings, _ = _settings(config, overrides)
    from pipeline.verbs.audit import audit as examine

    examine(settings, labels)


@app.command("evaluate-reward")
def evaluate_reward(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the run.")] = None,
    overrides: Overrides = None,
    table: Annotated[str | None, typer.Option(help="People's pairs: file, folder or hub id.")] = None,
    reader: Annotated[str, typer.Option(help="How the table is read: pairs, pickapic, hpdv2, hpdv3, …")] = "pairs",
    split: Annotated[str, typer.Option(help="Of a table in several parts.")] = "test",
    to: Annotated[Path | None, typer.Option(help="Folder of the result; one in the run's without it.")] = None,
) -> None:
    """Find out how far a reward can be believed: a run's model, or the scores of a table."""
    settings = _settings(config, overrides)[0] if config else None
    from pipeline.verbs.evaluate_reward import evaluate_reward as evaluate

    evaluate(settings, table, reader, split, to)


@app.command()
def tune(
    config: ConfigFile,
    labels: Annotated[Path, typer.Option(help="Parquet or JSONL of human labels: image, prompt, verdict.")],
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the tuned judge; tune/ in the run's without it.")] = None,
) -> None:
    """Tune the run's judge to a person's labels."""
    settings, _ = _settings(config, overrides)
    from pipeline.verbs.tune import tune as teach

    teach(settings, labels, to)


@app.command()
def invert(
    config: ConfigFile,
    image: Annotated[Path, typer.Option(help="PNG, JPEG or WebP.")],
    prompt: Annotated[str, typer.Option(help="What it shows.")],
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the result; one in the run's without it.")] = None,
) -> None:
    """Find the noise that a picture is painted from, and what the tuned generator makes of it."""
    settings, _ = _settings(config, overrides)
    from pipeline.verbs.invert import invert as find

    find(settings, image, prompt, to)


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Look for the silent bugs of a fine-tuning run before it starts; exit code 2 where one is found."""
    settings, _ = _settings(config, overrides)
    from pipeline.verbs.doctor import doctor as examine

    if not examine(settings, as_json=as_json):
        raise typer.Exit(2)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="Of a finished run: runs/NAME.")],
    format: Annotated[str, typer.Option(help="diffusers, comfyui or merged.")] = "diffusers",
    to: Annotated[Path | None, typer.Option(help="Folder of the result; one in the run's without it.")] = None,
    push: Annotated[str | None, typer.Option(help="Hub repository, owner/name, that it goes to besides.")] = None,
) -> None:
    """Write what a run tuned in a form that other programs read, with a model card."""
    from pipeline.verbs.export import export as write

    write(run, format, to, push)


@app.command()
def questions(config: ConfigFile, overrides: Overrides = None) -> None:
    """Let a language model write what the judge will ask about the run's prompts, for you to correct."""
    settings, _ = _settings(config, overrides)
    from pipeline.verbs.questions import write_questions

    write_questions(settings)


@app.command()
def schema(
    folder: Annotated[Path | None, typer.Argument(help="Write the schemas there instead.")] = None,
) -> None:
    """Print the JSON schema of a run's settings, for editors; or write it and that of `pretrain` as files."""
    from pipeline.config import Config

    if folder is None:
        typer.echo(_schema(Config), nl=False)
        return
    from pipeline.stages.pretrain import PretrainConfig
    from pipeline.store import atomic_write_text

    atomic_write_text(folder / "run.schema.json", _schema(Config))
    atomic_write_text(folder / "pretrain.schema.json", _schema(PretrainConfig))


def _settings(config: Path, overrides: list[str] | None) -> tuple[Section, Path]:
    """The resolved settings and the run directory they name."""
    from pipeline.config import Config

    settings = load(Config, config, overrides or ())
    from pipeline.loop import run_dir

    return settings, run_dir(settings)


def _run(config: Path, overrides: list[str] | None, only: list[str], processes: int) -> None:
    from pipeline.config import Config

    settings = load(Config, config, overrides or ())
    if processes > 1 and LAUNCHED not in os.environ:
        raise typer.Exit(spread(processes, [sys.executable, "-m", "pipeline", *sys.argv[1:]]))
    from pipeline.loop import run_loop

    run_loop(settings, only=only)


def _schema(root: type[Section]) -> str:
    return json.dumps(root.model_json_schema(), indent=2) + "\n"
