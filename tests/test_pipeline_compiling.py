"""Compiling changes nothing but speed, and where it cannot be done one warning says so."""

import pytest
import torch
from torch import nn

from pipeline import compiling


@pytest.fixture(autouse=True)
def _asked_anew():
    compiling._works.cache_clear()
    yield
    compiling._works.cache_clear()


def test_a_compiled_module_computes_the_same_and_keeps_its_parameters():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    expected, names = module(x), list(module.state_dict())
    compiling.compile_module(module, torch.device("cpu"))
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
