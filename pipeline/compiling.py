"""torch.compile where this machine can do it: on a CPU that takes a C++ compiler and Python's headers.

A network that repeats a block many times is compiled block by block, so that one block's code serves all of them and a
network of 24 blocks does not take 24 times as long to compile (regional compilation). What is compiled is compiled once
more for every other number of rows; `filled_to` leaves few.
"""

import functools
import math
import warnings

import torch
from torch import nn

_MANY = 8
"""Blocks in a list; a network of fewer is compiled as a whole, which is faster to run."""

_VARIANTS = 64
"""Of a block, which differ in rows, in what they leave out, and in where autocast is on."""


@functools.cache
def _works(device: str) -> str | None:
    """None where a tiny function compiles and runs on `device`, otherwise why it does not, in one line."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        torch._dynamo.reset()
    return None


def compile_module(module: nn.Module, device: torch.device) -> bool:
    """Compile `module` in place, its parameters and their names left alone; with one warning, leave it eager.

    Returns:
        Whether it is compiled.
    """
    if why := _works(device.type):
        warnings.warn(f"torch.compile does not work here, so it runs eager, which is slower ({why})", stacklevel=2)
        return False
    # Equal blocks share their code, and beyond this limit it would run eager without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks(dynamic=False)
        return True
    for part in repeated_blocks(module) or [module]:
        part.compile(dynamic=False)
    return True


def repeated_blocks(module: nn.Module, least: int = _MANY) -> list[nn.Module]:
    """Those in lists of its own, of `least` or more, for networks of diffusers that do not name theirs (SD3, Sana,
    PixArt, DiT)."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [block for each in lists if len(each) >= least for block in each]


def filled_to(rows: int, batch: int) -> int:
    """The rows of a compiled call that has so many: `batch`, or a half, a quarter or an eighth of it.

    The prefix that siblings share is so many times smaller than a batch that filling it up would cost what it saves.
    """
    sizes = (math.ceil(batch / share) for share in (8, 4, 2, 1))
    return next((size for size in sizes if size >= rows), rows)
