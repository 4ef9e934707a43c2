"""The settings of a run. Each section is declared beside the code it turns; this file only composes them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.assessing.settings import EvaluateRewardConfig
from pipeline.generating import GeneratorConfig
from pipeline.inverting import InvertConfig
from pipeline.judging import AuditConfig, JudgeConfig, TuneConfig
from pipeline.prompts import PromptSource
from pipeline.settings import Section
from pipeline.stages.evaluate import EvaluateConfig
from pipeline.stages.finetune import FinetuneConfig
from pipeline.stages.prefer import PreferConfig
from pipeline.stages.report import ReportConfig
from pipeline.stages.reward import RewardConfig
from pipeline.stages.sample import SampleConfig


class Config(Section):
    """The root of a run's file. The run lives in `out`/`name`."""

    name: str = Field(min_length=1)
    out: str = "runs"
    seed: int = 0
    prompts: Annotated[PromptSource, Field(discriminator="type")]
    generator: GeneratorConfig
    sample: SampleConfig = SampleConfig()
    judge: JudgeConfig
    audit: AuditConfig = AuditConfig()
    tune: TuneConfig = TuneConfig()
    prefer: PreferConfig = PreferConfig()
    reward: RewardConfig
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    evaluate_reward: EvaluateRewardConfig = EvaluateRewardConfig()
    report: ReportConfig = ReportConfig()
    invert: InvertConfig = InvertConfig()

    @model_validator(mode="after")
    def _generator_can_be_trained(self) -> Self:
        self.finetune.check_generator(self.generator.dtype)
        return self
