"""The stages of a run, in order."""

from pipeline.stages.evaluate import EVALUATE
from pipeline.stages.finetune import FINETUNE
from pipeline.stages.judge import JUDGE
from pipeline.stages.prefer import PREFER
from pipeline.stages.report import REPORT
from pipeline.stages.reward import REWARD
from pipeline.stages.sample import SAMPLE

STAGES = (SAMPLE, JUDGE, PREFER, REWARD, FINETUNE, EVALUATE, REPORT)

__all__ = ["STAGES"]
