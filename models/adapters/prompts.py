"""What prompts were encoded to, so that a text encoder is asked once for each: in main memory, and in a folder."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from safetensors.torch import load_file, save_file

from models.adapters.options import Options
from models.generator import Conditioning

_TOKENS = "tokens"


class PromptCache:
    """Conditionings by prompt, of one row each: the last `options.cached_prompts`, and all in the folder if one is set.

    Args:
        encode: what prompts become, one after another, on any device.
        max_tokens: to which prompts are cut and padded.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Iterable[Conditioning]], max_tokens: int | None, options: Options
    ):
        self._encode, self._room = encode, options.cached_prompts
        self._folder = Path(options.cache) if options.cache else None
        self._manner = [max_tokens, options.text_dtype, options.negative]  # which some families encode in another way
        self._known: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> list[Conditioning]:
        """On the CPU, in order."""
        rows = {prompt: self._found(prompt) for prompt in dict.fromkeys(prompts)}
        if missing := [prompt for prompt, row in rows.items() if row is None]:
            for prompt, row in zip(missing, self._encode(missing), strict=True):
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
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            save_file({_TOKENS: cond.tokens, **cond.more}, file.name)
        Path(file.name).rename(path)
