"""Checks of the policy before it learns: its ratio, its KL, its adapter, and what bfloat16 makes of it."""

import warnings

import torch

from pipeline.doctoring.check import Check
from pipeline.doctoring.subject import Subject, flat, gradients, nudged

RATIO, KL, OFF, TWIN, LOW = (
    "importance ratio",
    "KL to the base model",
    "adapter off is base",
    "merged twin is adapter",
    "ratio in low precision",
)

_NONE = 1e-9
"""Nats, and less is rounding."""


def importance_ratio(subject: Subject) -> Check:
    """Before the first update policy and old policy are one, so every importance ratio is 1."""
    if (error := subject.first.ratio_error) is None:
        return Check.skipped(RATIO, f"{subject.algorithm.type} has none")
    return Check.at_most(
        RATIO,
        error,
        1e-6,
        "rollout and learning see different policies or steps: compare the step, its times and its noise level in "
        "both, and switch off dropout",
        "largest |ratio - 1| before the first update",
    )


def kl_to_base(subject: Subject) -> Check:
    """The KL is 0 where the adapter adds nothing, and pulls back once it does.

    Of a KL that is quadratic near 0 the slope along the nudge is twice the KL. The gradient of the KL is what the
    gradient of the loss gains when its weight goes from 0 to 1.
    """
    if not getattr(subject.algorithm, "kl", 0):
        return Check.skipped(KL, "finetune.algorithm.kl is not above 0")
    if not subject.first.kl <= _NONE:
        return Check.at_most(
            KL,
            subject.first.kl,
            _NONE,
            "the reference is not the policy that training starts from",
            "nats at the start",
        )
    with_kl, without = (subject.trainer(algorithm=subject.made(kl=weight)) for weight in (1.0, 0.0))
    step, _ = nudged(with_kl), nudged(without)
    pulled, after = gradients(with_kl, subject.prompts)
    free, _ = gradients(without, subject.prompts)
    if after.kl <= _NONE and not adapter_off(subject).ok:
        return Check.skipped(KL, "the reference is the policy itself, as the adapter cannot be switched off")
    slope = float((flat(pulled) - flat(free)) @ flat(step))
    return Check.at_least(
        KL,
        slope / (2 * after.kl) if after.kl > _NONE else 0.0,
        0.5,
        "no gradient flows from the KL: compute it outside of no_grad and without detach",
        "0 at the start; after a nudge its slope, over that of a quadratic",
    )


@torch.no_grad()
def adapter_off(subject: Subject) -> Check:
    """With its adapter off, or the frozen copy in its place, the policy is the model that training started from."""
    if subject.settings.lora is None and not subject.settings.keep_base:
        return Check.skipped(OFF, "finetune.keep_base is false, and there is no adapter")
    trainer, asked = subject.trainer(), subject.asked()
    nudged(trainer)
    base, tuned = subject.generator.predict(*asked), trainer.predict(trainer.tuned)(*asked)
    with trainer.reference():
        off = trainer.predict(trainer.tuned)(*asked)
    return Check.at_most(
        OFF,
        float((off - base).abs().max() / (tuned - base).abs().max()),
        0.0,
        "switching the adapter off leaves some of it on: the KL has the wrong reference",
        "share of what the adapter adds that stays when it is off",
    )


@torch.no_grad()
def merged_twin(subject: Subject) -> Check:
    """The twin that rolls out, into which the adapter is merged, predicts what base and adapter predict."""
    if not subject.settings.twin:
        return Check.skipped(TWIN, "there is none: the transformer that learns rolls out itself")
    trainer, asked = subject.trainer(), subject.asked()
    nudged(trainer)
    base, tuned = subject.generator.predict(*asked), trainer.predict(trainer.tuned)(*asked)
    trainer.policy.merge_into(trainer.plain)
    twin = trainer.predict(trainer.plain)(*asked)
    return Check.at_most(
        TWIN,
        float((twin - tuned).norm() / (tuned - base).norm()),
        1e-3,
        "what rolls out is not what learns: see the adapter's scale and the layers that it is merged into",
        "difference over what the adapter adds",
    )


def low_precision(subject: Subject) -> Check:
    """In half precision the adapter beside the base rounds otherwise than merged into it, and a batch otherwise than
    another, so that the ratio of a policy that has learned something is not quite 1 before its update. Less than the
    clip range does no harm."""
    weights, computes = subject.config.generator.dtype, subject.config.finetune.dtype
    coarser = max(weights, computes, key=lambda name: torch.finfo(getattr(torch, name)).eps)
    exact = coarser == "float32"
    trainer = subject.trainer(own=True, dtype="bfloat16" if exact else computes)
    nudged(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a norm that leaves its fused path
        error = trainer.iterate(subject.prompts).ratio_error
    if error is None:
        return Check.skipped(LOW, f"{subject.algorithm.type} has no importance ratio")
    about = f"error of a ratio in {'bfloat16' if exact else coarser}"
    if exact:
        return Check(LOW, True, error, None, "", f"{about}, which the run does not use")
    return Check.at_most(
        LOW,
        error,
        subject.algorithm.clip,
        "rounding decides what is clipped: widen finetune.algorithm.clip, or take float32 for generator.dtype and "
        "finetune.dtype",
        f"{about}, against finetune.algorithm.clip",
    )
