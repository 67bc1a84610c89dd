import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_fgsgd.schedules import RobbinsMonroLR, check_step_sizes


def sgd(lr=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_the_schedule_is_its_formula_after_a_linear_warm_up():
    got = rates(RobbinsMonroLR(sgd(), tau=10, kappa=0.75, warmup=4), 60)
    warm = [0.5 * (t + 1) / 5 for t in range(4)]
    decay = [0.5 / (1 + t / 10) ** 0.75 for t in range(56)]
    assert got == pytest.approx(warm + decay)


@pytest.mark.parametrize("kappa", [0.51, 0.75, 1.0])
def test_its_sum_grows_without_bound_and_the_sum_of_its_squares_does_not(kappa):
    factor = RobbinsMonroLR(sgd(), tau=10, kappa=kappa)._factor
    # Cauchy's condensation: Σ 2^k f(2^k) diverges, Σ 2^k f(2^k)² converges, exactly when the series do.
    terms = [(2**k * factor(2**k), 2**k * factor(2**k) ** 2) for k in range(20, 400)]
    assert all(b[0] >= 0.999 * a[0] for a, b in pairwise(terms))
    assert all(b[1] < 0.999 * a[1] for a, b in pairwise(terms))


def test_a_resumed_schedule_goes_on(tmp_path):
    scheduler = RobbinsMonroLR(sgd(), tau=5)
    rates(scheduler, 7)
    torch.save(scheduler.state_dict(), tmp_path / "s.pt")
    other = RobbinsMonroLR(sgd(), tau=5)
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert other.last_epoch == 7
    assert rates(other, 3)[1:] == pytest.approx(rates(scheduler, 3)[1:])


@pytest.mark.parametrize(
    ("make", "satisfied", "reason"),
    [
        (lambda o: RobbinsMonroLR(o, kappa=0.6), True, "Σ r = ∞ and Σ r² < ∞"),
        (lambda o: None, False, "no scheduler"),
        (lambda o: lr_scheduler.ConstantLR(o), False, "constant"),
        (lambda o: lr_scheduler.LinearLR(o), False, "constant"),
        (lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 10), False, "0 after 10 steps"),
        (lambda o: lr_scheduler.MultiStepLR(o, [3], gamma=0), False, "gamma=0 makes it 0: .* Σ r is finite"),
        (lambda o: lr_scheduler.StepLR(o, 10), False, "geometric"),
        (lambda o: lr_scheduler.ExponentialLR(o, 0.9), False, "Σ r is finite"),
        (lambda o: lr_scheduler.ExponentialLR(o, 1.0), False, "Σ r² = ∞"),
        (lambda o: lr_scheduler.MultiStepLR(o, [3]), False, "Σ r² = ∞"),
        (lambda o: lr_scheduler.PolynomialLR(o, 10), False, "0 after 10 steps"),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 10), False, "rises again"),
        (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10), False, "rises again"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10), False, "ends after 10"),
        (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)), None, "cannot tell"),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), None, "cannot tell"),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=0.1), False, "min_lr=0.1"),
        (lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0), None, "CyclicLR is not"),
        (lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), RobbinsMonroLR(o)], [5]), True, "Σ r = ∞"),
    ],
)
def test_the_check_says_whether_and_why(make, satisfied, reason):
    result = check_step_sizes(make(sgd()))
    assert result.satisfied is satisfied
    assert re.search(reason, result.reason)


@pytest.mark.parametrize(
    "options", [{"kappa": 0.5}, {"kappa": 1.1}, {"tau": 0}, {"tau": math.inf}, {"warmup": -1}, {"warmup": 2.5}]
)
def test_wrong_arguments_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: "):
        RobbinsMonroLR(sgd(), **options)


def test_one_group_whose_rate_does_not_fall_to_0_is_enough():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=0.5)
    result = check_step_sizes(lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=[0.0, 0.1]))
    assert result.satisfied is False
    assert "min_lr=0.1" in result.reason


def test_a_resumed_schedule_has_its_own_settings():
    def make(**options):
        return RobbinsMonroLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), **options)

    saved, other = make(tau=5, kappa=0.75, warmup=2), make()
    other.load_state_dict(saved.state_dict())
    assert [other._factor(t) for t in range(9)] == [saved._factor(t) for t in range(9)]
