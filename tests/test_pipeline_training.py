"""The training loop: what it optimises with, and that a killed run ends where an unbroken one does."""

import copy
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.training import Average, Muon, hybrid_optimizers, load_state, orthogonalised, save_state, train, trapezoid
from tests.processes import python


def learned(folder: Path, kill_at: int) -> None:
    """Train twenty steps, or be killed at one of them."""

    def loss_at(step):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        return (net["blocks"][0](x) - x[:, :4]).square().mean()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(6, 4)])})
    modules = {"net": net}
    average = Average(modules, 0.9)
    optimizers = hybrid_optimizers(modules, 1e-2, 1e-2)
    train(loss_at, modules, optimizers, 20, lambda s: 1.0, folder, average, save_every=3)


def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    learned(tmp_path / "whole", -1)
    assert python(__file__, tmp_path / "cut", "10").returncode == -signal.SIGKILL
    learned(tmp_path / "cut", -1)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) >= 3
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0))
    for found in (orthogonalised(matrices), orthogonalised(matrices.mT).mT):
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5
        assert values.max() < 1.3
    assert torch.allclose(orthogonalised(matrices)[0], orthogonalised(matrices[:1])[0], atol=1e-6)


def test_muon_walks_with_that_of_torch():
    mine = torch.nn.Parameter(torch.randn(8, 24, generator=torch.Generator().manual_seed(0)))
    theirs = torch.nn.Parameter(mine.detach().clone())
    optimizers = (
        Muon([mine], lr=1e-2, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    start = mine.detach().clone()
    for step in range(5):
        gradient = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
        mine.grad, theirs.grad = gradient, gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (mine - theirs).norm() < 0.02 * (mine - start).norm()


def test_matrices_and_the_rest_are_shared_out_once():
    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)]), "embed": torch.nn.Linear(4, 4)})
    muon, adam = hybrid_optimizers({"net": net}, 1e-2, 1e-3)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert len(adam.param_groups[0]["params"]) == 3


def test_the_rate_rises_holds_and_falls_to_nothing():
    assert [trapezoid(s, 10, 2, 5) for s in (0, 1, 5, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.2])


def test_the_average_follows_and_swaps_back():
    net = torch.nn.Linear(2, 2)
    average = Average({"net": net}, 0.5)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.weight += 1.0
    average.update(100)
    average.swap()
    assert torch.allclose(net.weight, before["weight"] + 0.5)
    average.swap()
    assert torch.allclose(net.weight, before["weight"] + 1.0)


def test_tied_weights_are_saved_once_and_frozen_ones_not_at_all(tmp_path):
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    net["c"] = torch.nn.Linear(2, 2).requires_grad_(False)
    save_state(tmp_path / "state", {"net": net}, [], {"step": 3})
    assert set(load_file(tmp_path / "state" / "net.safetensors")) == {"a.weight"}
    saved = net["b"].weight.detach().clone()
    with torch.no_grad():
        net["a"].weight.zero_()
    assert load_state(tmp_path / "state", {"net": net}, []) == {"step": 3}
    assert torch.equal(net["b"].weight, saved)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    net = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(lambda step: net.weight.sum() * float("nan"), {"net": net}, [], 3, lambda s: 1.0, tmp_path / "state")


if __name__ == "__main__":
    learned(Path(sys.argv[1]), int(sys.argv[2]))
