"""Who looks: judges that score pictures against their prompts.

Names are imported when they are first used: settings and finished runs do not wait for torch and transformers.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["tuning"],
    submod_attrs={
        "base": ["Answer", "Comparer", "Judge", "Question", "Sample", "Unavailable", "VQA", "Verdict"],
        "blip2": ["Blip2VQA", "InstructBlipVQA", "load_blip2"],
        "cache": ["CachedVQA"],
        "chat": ["ChatVQA"],
        "constitution": ["Constitution", "Principle"],
        "decompose": ["QuestionFile", "fill_questions"],
        "ensemble": ["Ensemble"],
        "frames": ["PerFrame", "WholeClip", "for_clips"],
        "loading": ["load_judge"],
        "matching": ["MatchingJudge"],
        "pairwise": ["GroupJudge", "PairwiseJudge", "ScoreComparer"],
        "questions": ["AGGREGATES", "QuestionJudge", "Rating", "Whole"],
        "scorers": ["ClipJudge"],
        "server": ["ServerVQA"],
        "serving": ["served"],
        "vllm_engine": ["load_vllm"],
    },
)
