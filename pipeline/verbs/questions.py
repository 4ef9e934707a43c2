"""The verb `questions`: a language model writes what will be asked about the run's prompts, for people to correct."""

from typing import Any

from pipeline.judging import FileQuestions
from pipeline.launch import Servers
from pipeline.loop import run_dir
from pipeline.progress import Progress, quiet_libraries
from pipeline.prompts import draw_key
from pipeline.runner import process_state
from pipeline.settings import UserError


def write_questions(config: Any) -> None:
    """Fill `judge.questions.path` with the questions of the prompts that `sample` and `evaluate` draw.

    Raises:
        UserError: the judge asks no questions from a file, or no model is set that could write them.
    """
    asked = getattr(config.judge, "questions", None)
    if not isinstance(asked, FileQuestions):
        raise UserError("judge.questions.type: must be file, for its questions to be written by a language model")
    quiet_libraries()
    progress = Progress()
    drawn = config.prompts.draw(draw_key(config.seed, "sample"), config.sample.prompts)
    measured = config.prompts.held_out(draw_key(config.seed, "evaluate"), config.evaluate.images)
    prompts = list(dict.fromkeys(row.text for row in (*drawn, *measured)))
    with Servers(run_dir(config), "questions", progress.say):
        refused = asked.write(prompts, str(process_state().device))
    for prompt, reason in refused.items():
        progress.say(f"{prompt!r}: {reason}")
    progress.say(f"{asked.path}: has the questions of {len(prompts) - len(refused)} of {len(prompts)} prompts")
