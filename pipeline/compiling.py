"""torch.compile where this machine can do it: on a CPU that takes a C++ compiler and Python's headers."""

import functools
import warnings

import torch
from torch import nn


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


def compile_module(module: nn.Module, device: torch.device) -> None:
    """Compile `module` in place, its parameters and their names left alone; with one warning, leave it eager."""
    if why := _works(device.type):
        warnings.warn(f"torch.compile does not work here, so it runs eager, which is slower ({why})", stacklevel=2)
    else:
        module.compile(dynamic=False)
