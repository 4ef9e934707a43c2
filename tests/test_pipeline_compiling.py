"""Compiling changes nothing but speed, and where it cannot be done one warning says so."""

import shutil
import sysconfig
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import compiling
from tests.tiny_pipelines import FAMILIES


@pytest.fixture(autouse=True)
def _asked_anew():
    compiling._works.cache_clear()
    yield
    compiling._works.cache_clear()


def _can_compile() -> bool:
    """Whether there is what torch.compile takes on a CPU: a C++ compiler, and Python's headers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def test_a_compiled_module_computes_the_same_and_keeps_its_parameters():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    expected, names = module(x), list(module.state_dict())
    compiled = compiling.compile_module(module, torch.device("cpu"))
    assert compiled == _can_compile()
    assert (module._compiled_call_impl is not None) == compiled
    assert torch.allclose(module(x), expected, atol=1e-6)
    assert list(module.state_dict()) == names


def test_without_a_compiler_the_module_runs_eager_after_one_warning(monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler was found\nwith a long story")

    monkeypatch.setattr(torch, "compile", broken)
    module, x = nn.Linear(4, 2), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"runs eager, which is slower \(no C\+\+ compiler was found\)$"):
        compiling.compile_module(module, torch.device("cpu"))
    assert module._compiled_call_impl is None
    assert module(x).shape == (3, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return self.mix(x).relu()


class Deep(nn.Module):
    """Repeats a block many times, and says nothing of it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(8)])
        self.few = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x):
        for block in (*self.blocks, *self.few):
            x = block(x)
        return x


@torch.no_grad()
def test_equal_blocks_share_what_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "_works", lambda device: None)
    torch.manual_seed(0)
    module, compiled = Deep(), []
    x = torch.randn(3, 4)
    expected = module(x)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    assert compiling.compile_module(module, torch.device("cpu"))
    assert torch.allclose(module(x), expected, atol=1e-6)
    assert len(compiled) == 1
    assert module._compiled_call_impl is None
    module(x[:2])
    assert len(compiled) == 2


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_a_network_that_names_its_blocks_is_compiled_by_them(family, monkeypatch):
    monkeypatch.setattr(compiling, "_works", lambda device: None)
    pipe = FAMILIES[family].build()
    network = pipe.unet if family == "sd15" else pipe.transformer
    compiling.compile_module(network, torch.device("cpu"))
    compiled = {type(part).__name__ for part in network.modules() if part._compiled_call_impl is not None}
    assert compiled == set(network._repeated_blocks)


def test_calls_are_filled_up_to_few_sizes():
    for batch in (1, 3, 8, 192):
        sizes = {compiling.filled_to(rows, batch) for rows in range(1, batch + 1)}
        assert len(sizes) <= 4
        for rows in range(1, batch + 1):
            assert rows <= compiling.filled_to(rows, batch) <= max(2 * rows, batch / 8 + 1)
        assert compiling.filled_to(batch, batch) == batch
