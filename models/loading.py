"""From a checkpoint to the generator it holds: a folder of ours, or a diffusers pipeline in a folder or on the hub."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from models import adapters
from models.adapters.options import Options
from models.generator import Generator, NativeGenerator
from models.guidance import NO_GUIDANCE
from models.lora import merge

_INDEX = "model_index.json"
_WHOLE = "config.json"
_SENTENCEPIECE = "a tokenizer in it has no tokenizer.json; to read its SentencePiece model `pip install sentencepiece`"
"""What to do where transformers, without that package, takes the model for one of tiktoken's."""
_OWN = Options()
_OF_ALL = ("resolution", "guidance", "negative")


def load_generator(
    checkpoint: str | Path,
    lora: str | Path | None = None,
    device: str = "cpu",
    options: Options = _OWN,
    waits: bool = False,
) -> Generator:
    """A generator ready to sample from, with the LoRA in the folder `lora` merged into its weights if given.

    Where `lora` holds a whole network, it takes the place of the generator's. `options` are those of a diffusers
    pipeline; a generator of ours takes the resolution and the guidance alone. One that `waits` for `device` stays in
    main memory, for whoever brings it there in parts.

    Raises:
        ValueError: the family is not known, or an option or the adapter does not suit it; the message begins with the
            field's name.
        OSError: a part of the generator is missing, or the hub does not give it.
    """
    generator = _loaded(str(checkpoint), device, options)
    if lora is not None:
        _learn(generator, Path(lora))
    return generator if waits else generator.to(device)


def tuned(generator: Generator, lora: str | Path) -> Generator:
    """`generator` with what the folder `lora` holds, as in `load_generator`, beside the untouched one.

    Text encoders and codec are shared; the transformer is its own, where the other's is.

    Raises:
        ValueError: the adapter is one of another network; the message begins with the field's name.
    """
    other = generator.copied()
    _learn(other, Path(lora))
    return other


def _learn(generator: Generator, lora: Path) -> None:
    """Merge the adapter in `lora` into the transformer, or put the whole network that is there in its place."""
    if (lora / _WHOLE).is_file():
        generator.transformer = _whole(lora, generator.transformer)
    else:
        merge(generator.transformer, lora, generator.lora_prefix)


def _loaded(checkpoint: str, device: str, options: Options) -> Generator:
    index = _index(checkpoint, options.revision)
    if index is None:
        for field in fields(options):
            if field.name not in _OF_ALL and getattr(options, field.name) != field.default:
                raise ValueError(f"{field.name}: {checkpoint} is no pipeline of diffusers; leave it out")
        own = NativeGenerator.from_pretrained(checkpoint, options.guidance or NO_GUIDANCE, options.negative)
        return own if options.resolution is None else own.at(options.resolution)
    if (name := index["_class_name"]) not in adapters.FAMILIES:
        raise ValueError(f"checkpoint: {checkpoint} is a {name}; supported are {', '.join(adapters.FAMILIES)}")
    family = getattr(adapters, adapters.FAMILIES[name])
    for part, kind in index.items():
        wanted = isinstance(kind, list) and kind[0] is not None and part not in family.loading
        if wanted and Path(checkpoint).is_dir() and not (Path(checkpoint) / part).is_dir():
            raise FileNotFoundError(f"{checkpoint}: holds no whole pipeline (no {part}/ in it)")
    dtypes = {
        "default": _dtype("text_dtype", options, device),
        family.network: _dtype("dtype", options, device),
        "vae": _dtype("codec_dtype", options, device),
    }
    try:
        pipe = family.pipeline.from_pretrained(
            checkpoint, dtype=dtypes, revision=options.revision, variant=options.variant, **family.loading
        )
    except ValueError as error:
        raise OSError(f"{checkpoint}: {_SENTENCEPIECE if 'tiktoken' in str(error) else error}") from None
    return family(pipe, options)


def _index(checkpoint: str, revision: str | None) -> dict[str, Any] | None:
    """What a diffusers pipeline in a folder or on the hub consists of; None for what can only be a folder of ours."""
    index = Path(checkpoint) / _INDEX
    if not index.is_file():
        if Path(checkpoint).is_dir() or "/" not in checkpoint:
            return None
        try:
            index = Path(hf_hub_download(checkpoint, _INDEX, revision=revision))
        except HFValidationError:
            return None
        except GatedRepoError:
            remedy = f"accept its licence at https://huggingface.co/{checkpoint}, then run `hf auth login`"
            raise PermissionError(f"{checkpoint} is gated; {remedy}") from None
        except RepositoryNotFoundError:
            remedy = "run `hf auth login` if it is a private one"
            raise FileNotFoundError(f"{checkpoint} is neither a folder nor on the hub; {remedy}") from None
        except RevisionNotFoundError:
            raise ValueError(f"revision: {checkpoint} has no {revision}") from None
        except LocalEntryNotFoundError:
            raise FileNotFoundError(f"{checkpoint} is no folder here, and the hub cannot be asked") from None
        except EntryNotFoundError:
            raise ValueError(f"checkpoint: {checkpoint} is no pipeline of diffusers (it has no {_INDEX})") from None
    return json.loads(index.read_text())


def _dtype(field: str, options: Options, device: str) -> torch.dtype:
    """Raises ValueError where `device` does not compute in it."""
    dtype = getattr(torch, getattr(options, field))
    try:
        ones = torch.ones(2, 2, dtype=dtype, device=device)
        emulated = ones.is_cuda and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False)
        if not emulated and torch.equal(ones @ ones, ones + ones):
            return dtype
    except (RuntimeError, TypeError):
        pass
    raise ValueError(f"{field}: {device} does not compute in {getattr(options, field)}; take float32")


def _whole(folder: Path, transformer: nn.Module) -> nn.Module:
    """The network in `folder`, in place of `transformer`."""
    kind = json.loads((folder / _WHOLE).read_text())["_class_name"]
    if kind != type(transformer).__name__:
        raise ValueError(f"lora: {folder} holds a {kind}, and the generator's is a {type(transformer).__name__}")
    found = type(transformer).from_pretrained(folder, dtype=next(transformer.parameters()).dtype)
    return found.eval().requires_grad_(False)
