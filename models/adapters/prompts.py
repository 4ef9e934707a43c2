"""What prompts were encoded to, so that a text encoder is asked once for each: in main memory, and in a folder."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import load_file, save

from models.adapters.options import Options
from models.generator import Conditioning

_TOKENS = "tokens"


class PromptCache:
    """Conditionings by prompt, of one row each: the last `options.cached_prompts`, and all in the folder if one is set.

    It knows no generator, so that those which share their text encoders share it too.

    Args:
        manner: all that a conditioning depends on besides its prompt, as JSON takes it.
    """

    def __init__(self, manner: Sequence[Any], options: Options):
        self._manner, self._room = manner, options.cached_prompts
        self._folder = Path(options.cache) if options.cache else None
        self._known: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Iterable[Conditioning]]
    ) -> list[Conditioning]:
        """On the CPU, in order; `encode` gives what prompts become, one after another, on any device."""
        rows = {prompt: self._found(prompt) for prompt in dict.fromkeys(prompts)}
        if missing := [prompt for prompt, row in rows.items() if row is None]:
            for prompt, row in zip(missing, encode(missing), strict=True):
                rows[prompt] = row.map(lambda values: values.cpu().contiguous())
                self._write(prompt, rows[prompt])
        self._known.update(rows)
        while len(self._known) > self._room:
            self._known.popitem(last=False)
        return [rows[prompt] for prompt in prompts]

    def _found(self, prompt: str) -> Conditioning | None:
        if prompt in self._known:
            return self._known.pop(prompt)
        if self._folder is None or not (path := self._path(prompt)).is_file():
            return None
        tensors = load_file(path)
        return Conditioning(tensors.pop(_TOKENS), tensors)

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(json.dumps([*self._manner, prompt]).encode()).hexdigest()
        return self._folder / f"{name}.safetensors"

    def _write(self, prompt: str, cond: Conditioning) -> None:
        """Whole or not at all, for other processes may write the same."""
        if self._folder is None:
            return
        path = self._path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{uuid4().hex}.tmp")
        part.write_bytes(save({_TOKENS: cond.tokens, **cond.more}))
        part.rename(path)
