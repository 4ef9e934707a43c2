"""Settings of the verb `evaluate-reward`."""

from pydantic import Field

from pipeline.settings import Section


class EvaluateRewardConfig(Section):
    """How closely a reward model is looked at.

    Attributes:
        baseline: a CLIP or SigLIP, such as PickScore, to stand beside it: a local folder or a hub id.
        judge: ask the run's judge about the pictures of a table, and of what is optimised where there is no gold.
        pairs: at most so many of a table are read.
        most_refused: the share of a table's rows that may be unusable.
        probed: so many pictures are changed in each way that must, or must not, matter.
        prompts, images: held-out prompts, and new pictures of each, of which the best is chosen; 0 prompts choose none.
        shown: at most so many pairs of each kind are shown.
        largest_side: pixels; larger pictures are shrunk on the page.
    """

    baseline: str | None = None
    judge: bool = True
    pairs: int = Field(5000, ge=1)
    most_refused: float = Field(0.1, ge=0, lt=1)
    probed: int = Field(256, ge=2)
    prompts: int = Field(60, ge=0)
    images: int = Field(16, ge=4)
    shown: int = Field(6, ge=0, le=64)
    largest_side: int = Field(384, ge=32, le=2048)
