"""The stage `report`: what the run achieved, as one HTML page that opens offline."""

from typing import Any

from pydantic import Field

from pipeline.runner import Context, Stage, Work
from pipeline.settings import Section

_NEEDS = ("sample", "judge", "prefer", "reward", "finetune", "evaluate")
_VERSION = 1


class ReportConfig(Section):
    """What the report shows.

    Attributes:
        examples_per_skill: prompts of each skill whose pictures are shown before and after.
        disagreements: at most so many pictures each of reward against judge and of judge against gold.
        largest_side: pixels; larger images are shrunk, so that the page stays small.
    """

    examples_per_skill: int = Field(4, ge=1, le=32)
    disagreements: int = Field(8, ge=0, le=64)
    largest_side: int = Field(384, ge=32, le=2048)


def _depends(config: Any) -> dict[str, Any]:
    return {"version": _VERSION, "name": config.name, "report": config.report.model_dump(mode="json")}


def _run(context: Context) -> None:
    # matplotlib and jinja take a second to import; settings and finished runs do not wait for them.
    from pipeline.report.view import render, view

    if context.accelerator.is_main_process and not context.artifact.has("index.html"):
        config: ReportConfig = context.config.report
        shown = view(
            context.config.name,
            context.inputs,
            config.examples_per_skill,
            config.disagreements,
            config.largest_side,
        )
        context.artifact.write_text("index.html", render(shown))


REPORT = Stage(
    name="report",
    needs=_NEEDS,
    depends=_depends,
    work=lambda config: Work(seconds=5.0),
    run=_run,
)
