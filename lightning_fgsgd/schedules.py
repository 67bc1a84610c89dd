"""Step sizes that satisfy Eq. 4, Σ r(t) = ∞ and Σ r(t)² < ∞, and a check of those that may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import Optimizer, lr_scheduler

__all__ = ["RobbinsMonroLR", "StepSizeCheck", "check_step_sizes"]


class RobbinsMonroLR(lr_scheduler.LambdaLR):
    r"""The learning rate :math:`r(t) = r_0 / (1 + t/τ)^κ`, after a linear warm-up if asked for.

    With 1/2 < κ <= 1 its sum diverges and the sum of its squares converges: Eq. 4, under which FG-SGD converges.

    Args:
        optimizer: its learning rates are the r0.
        tau: τ, the number of steps after which the decay sets in. Of the scheduler's: in Lightning return
            ``{"scheduler": RobbinsMonroLR(optimizer), "interval": "step"}``, or it takes one an epoch.
        kappa: κ, in (1/2, 1].
        warmup: steps of linear warm-up; t counts from their end.
        last_epoch: as in every torch scheduler.

    Raises:
        ValueError: κ outside (1/2, 1], τ not above 0, or a warm-up that is not a whole number of at least 0.
    """

    def __init__(
        self, optimizer: Optimizer, tau: float = 1000.0, kappa: float = 1.0, warmup: int = 0, last_epoch: int = -1
    ) -> None:
        if not 0.5 < kappa <= 1:
            raise ValueError(f"kappa: {kappa!r} is not in (1/2, 1]: Σ r must diverge and Σ r² converge (Eq. 4)")
        if not 0 < tau < float("inf"):
            raise ValueError(f"tau: {tau!r} is not a finite number above 0")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup: {warmup!r} is not a whole number of at least 0")
        self.tau, self.kappa, self.warmup = tau, kappa, warmup
        super().__init__(optimizer, self._factor, last_epoch)

    def _factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return (1 + (step - self.warmup) / self.tau) ** -self.kappa

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {key: value for key, value in self.__dict__.items() if key not in ("optimizer", "lr_lambdas")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.__dict__.update(state_dict)


class StepSizeCheck(NamedTuple):
    """Whether Eq. 4 holds (None: cannot tell), and why."""

    satisfied: bool | None
    reason: str


_SUM_OF_SQUARES = "the learning rate does not fall to 0, so Σ r² = ∞"
_SUM = "the learning rate falls so fast that Σ r is finite"


def check_step_sizes(scheduler: Any) -> StepSizeCheck:
    """Whether a scheduler of torch satisfies Eq. 4, if it went on for ever.

    Args:
        scheduler: a scheduler of ``torch.optim.lr_scheduler``, a :class:`RobbinsMonroLR`, or None: constant.

    A learning rate given by the user's own function, or by the progress of training, cannot be judged for all t.
    """
    if scheduler is None:
        return StepSizeCheck(False, f"there is no scheduler: {_SUM_OF_SQUARES}")
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        return check_step_sizes(scheduler._schedulers[-1])  # the ones before it are finitely many steps
    for kind, check in _CHECKS:
        if isinstance(scheduler, kind):
            return check(scheduler)
    return StepSizeCheck(None, f"cannot tell: {type(scheduler).__name__} is not a scheduler whose limit is known")


def _geometric(scheduler: Any) -> StepSizeCheck:
    if scheduler.gamma < 1:
        return StepSizeCheck(False, f"a geometric decay (gamma={scheduler.gamma}): {_SUM}")
    return StepSizeCheck(False, f"gamma={scheduler.gamma}: {_SUM_OF_SQUARES}")


def _polynomial(scheduler: Any) -> StepSizeCheck:
    return StepSizeCheck(False, f"it is 0 after {scheduler.total_iters} steps: {_SUM}")


def _finally(scheduler: Any) -> StepSizeCheck:
    if isinstance(scheduler, lr_scheduler.LinearLR) and scheduler.end_factor == 0:
        return _polynomial(scheduler)
    if isinstance(scheduler, lr_scheduler.MultiStepLR) and scheduler.gamma == 0:
        return StepSizeCheck(False, f"gamma=0 makes it 0: {_SUM}")
    return StepSizeCheck(False, f"in the end it is constant: {_SUM_OF_SQUARES}")


def _periodic(scheduler: Any) -> StepSizeCheck:
    return StepSizeCheck(False, f"it rises again and again: {_SUM_OF_SQUARES}")


def _one_cycle(scheduler: Any) -> StepSizeCheck:
    return StepSizeCheck(False, f"it ends after {scheduler.total_steps} steps: Σ r is finite")


def _own_function(scheduler: Any) -> StepSizeCheck:
    return StepSizeCheck(None, "cannot tell: it is a function of the user's; RobbinsMonroLR is known to satisfy Eq. 4")


def _plateau(scheduler: Any) -> StepSizeCheck:
    if max(scheduler.min_lrs) > 0:
        return StepSizeCheck(False, f"min_lr={max(scheduler.min_lrs)}: {_SUM_OF_SQUARES}")
    return StepSizeCheck(None, "cannot tell: the learning rate depends on the progress of training")


def _robbins_monro(scheduler: Any) -> StepSizeCheck:
    return StepSizeCheck(True, f"r0 / (1 + t/τ)^{scheduler.kappa}: with 1/2 < κ <= 1, Σ r = ∞ and Σ r² < ∞")


# The first that fits decides: subclasses before their bases.
_CHECKS: tuple[tuple[type, Callable[[Any], StepSizeCheck]], ...] = (
    (RobbinsMonroLR, _robbins_monro),
    (lr_scheduler.LambdaLR, _own_function),
    (lr_scheduler.MultiplicativeLR, _own_function),
    (lr_scheduler.StepLR, _geometric),
    (lr_scheduler.ExponentialLR, _geometric),
    (lr_scheduler.PolynomialLR, _polynomial),
    (lr_scheduler.MultiStepLR, _finally),
    (lr_scheduler.ConstantLR, _finally),
    (lr_scheduler.LinearLR, _finally),
    (lr_scheduler.CosineAnnealingLR, _periodic),
    (lr_scheduler.CosineAnnealingWarmRestarts, _periodic),
    (lr_scheduler.OneCycleLR, _one_cycle),
    (lr_scheduler.ReduceLROnPlateau, _plateau),
)
