import pytest
import torch
from torch import nn

from ease import optim
from ease.optim import make_optimizer, optimizer_step
from ease.records import UserError
from tests.checks import verify


def test_learning_rate():
    verify(optim, "learning_rate")


def test_optimizer_step_clips_and_reports_the_norm_before():
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=9.0)
    p.grad = torch.full((4,), 3.0)
    assert optimizer_step(optimizer, 0.5, 1.0, 1.0, "step 0") == pytest.approx(6.0)
    assert torch.allclose(p.data, torch.full((4,), -0.25), atol=1e-5)  # 0.5 * 3 / 6
    assert p.grad is None
    p.grad = torch.full((4,), 3.0)
    assert optimizer_step(optimizer, 0.5, 0.0, 1.0, "step 1") == pytest.approx(6.0)  # not clipped
    assert torch.allclose(p.data, torch.full((4,), -1.75), atol=1e-5)


@pytest.mark.parametrize("loss, gradient", [
    (float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_what_is_not_finite_stops_the_run_before_the_step(loss, gradient):
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.tensor([1.0, gradient, 1.0])
    with pytest.raises(UserError, match="(nan|inf).* at step 7, rows row-a; lower --lr"):
        optimizer_step(optimizer, 0.1, 1.0, loss, "step 7, rows row-a")
    assert torch.equal(p.data, torch.ones(3))


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    model.extra = nn.Parameter(torch.ones(2, 2))
    groups = make_optimizer(model, 0.1).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    # two norm vectors and a bias; the frozen weight not
    assert groups[0]["params"] == [model.extra] and len(groups[1]["params"]) == 3
