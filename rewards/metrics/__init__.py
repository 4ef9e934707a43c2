"""How well a reward predicts preferences: pure functions of numpy arrays.

`accuracy`: by every tie rule; `correlation`: with other scores; `probabilities`: whether they can be believed;
`slices`: parts of a table; `intervals`: what is known of a number.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "accuracy": [
            "Agreement",
            "agreement",
            "balanced_accuracy",
            "best_of",
            "concordance",
            "correctness",
            "cross_fitted_threshold",
            "half_credit",
            "label_ceiling",
            "pairwise_accuracy",
            "three_way_credit",
            "tuned_threshold",
            "win_rate",
        ],
        "correlation": ["auc", "kendall", "partial_correlation", "pooled_kendall", "pooled_spearman", "spearman"],
        "intervals": [
            "LEAST_PROMPTS",
            "Estimate",
            "clustered_interval",
            "estimate",
            "mean",
            "prompt_share",
            "share",
            "standard_error",
            "wilson_interval",
        ],
        "probabilities": [
            "Bin",
            "Calibration",
            "Fit",
            "Uncertainty",
            "accuracy_by_margin",
            "brier",
            "calibration",
            "ece",
            "nll",
            "reliability",
            "uncertainty",
        ],
        "slices": ["Slice", "generator_pair", "length", "negation", "same_model", "sliced", "truncated"],
    },
)
