"""A loss attached to an activation adds its own gradient and changes no other."""

import torch

from ssa_pretrain.model.alignment import attach_loss


def test_attached_loss_adds_scale_times_its_gradient():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    total = (x * 2).sum() + 0.3 * (x**3).sum()
    (wanted,) = torch.autograd.grad(total, x)
    out = attach_loss(x * 2, (x**3).sum(), 0.3)
    assert torch.equal(out, x * 2)
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, wanted)


def test_gradient_does_not_depend_on_what_follows():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    out = attach_loss(x * 2, (x**3).sum(), 0.3)
    (found,) = torch.autograd.grad(out.sum() * 0.0, x)
    torch.testing.assert_close(found, 0.3 * 3 * x.detach() ** 2)


def test_recomputation_counts_the_loss_once():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def layer(x):
        return attach_loss(x * 2, (x**3).sum(), 0.3)

    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.equal(plain, again)
