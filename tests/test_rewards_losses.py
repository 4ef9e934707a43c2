import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rewards.losses import bradley_terry


@pytest.fixture
def rewards() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double() * 3)


def test_is_binary_cross_entropy_of_the_margin(rewards):
    a, b = rewards
    label, weight = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)).double()
    expected = binary_cross_entropy_with_logits(a - b, label, reduction="none")
    torch.testing.assert_close(bradley_terry(a, b, label), expected.mean())
    torch.testing.assert_close(bradley_terry(a, b, label, weight), (weight * expected).sum() / weight.sum())


def test_hard_labels_give_the_loss_of_imagereward(rewards):
    a, b = rewards
    torch.testing.assert_close(bradley_terry(a, b, torch.ones(64)), -logsigmoid(a - b).mean())


def test_does_not_depend_on_which_image_comes_first(rewards):
    a, b = rewards
    label = torch.rand(64, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(bradley_terry(a, b, label), bradley_terry(b, a, 1 - label))


def test_is_least_where_the_margin_is_the_logit_of_the_label():
    label = torch.tensor([0.2, 0.5, 0.9])
    margin = label.logit().requires_grad_()
    loss = bradley_terry(margin, torch.zeros(3), label)
    loss.backward()
    entropy = -(label * label.log() + (1 - label) * (1 - label).log()).mean()
    torch.testing.assert_close(loss.detach(), entropy)
    torch.testing.assert_close(margin.grad, torch.zeros(3), atol=1e-7, rtol=0)


def test_is_finite_with_a_gradient_for_huge_margins():
    a = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry(a, torch.zeros(2), torch.tensor([1.0, 1.0]))
    loss.backward()
    assert loss.item() == 5e3
    assert a.grad.tolist() == [0.0, -0.5]


def test_equal_rewards_cost_a_bit_whatever_the_label():
    loss = bradley_terry(torch.ones(3), torch.ones(3), torch.tensor([0.0, 0.3, 1.0]))
    assert loss.item() == pytest.approx(math.log(2))
