"""What a step does to all constrained weights at once, by what is found out about them once and kept from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_fgsgd import checks
from lightning_fgsgd.job import Job
from lightning_fgsgd.manifolds import working_dtype
from lightning_fgsgd.sharding import add_up, anywhere, local
from lightning_fgsgd.stepsize import step_normalizer
from lightning_fgsgd.update import Update

__all__ = ["Prepared", "refuse", "together"]


class Prepared:
    """What a step has to know of its weights: which code steps them and what that is told, and how 𝔤 is had for many.

    Mostly nothing of it changes between two steps, and to find it out takes as long as a step of small weights. Neither
    weights nor gradients are held here.

    Args:
        updates: the weights of a step, in whose order those of later steps come.
    """

    def __init__(self, updates: Sequence[Update] = ()) -> None:
        self._forms = [update.form for update in updates]
        # Forms name these by their ids, which nothing else has for as long as these are.
        self._named = [update.pom for update in updates]
        codes = [update.code(update.job) for update in updates]
        self._with_norm = [i for i, update in enumerate(updates) if update.group["rho"] is not None]
        self._constrained = [i for i, update in enumerate(updates) if update.pom.constrains]
        self._free = [i for i, update in enumerate(updates) if not update.pom.constrains]
        self._squares = list(_launches(updates, codes, self._with_norm, "squares"))
        self._moves = list(_launches(updates, codes, self._constrained, None))
        self._waits = all(update.can_wait for update in updates)
        self._alike: dict[tuple[Any, ...], list[int]] = {}
        for i in self._with_norm:
            rho, weight = updates[i].group["rho"], updates[i].weight
            if not isinstance(rho, str):
                self._alike.setdefault((rho, working_dtype(weight), weight.device), []).append(i)
        self._curvatures: dict[tuple[Any, ...], Tensor] = {}

    def suits(self, updates: Sequence[Update]) -> bool:
        """Whether these are the weights that it was made for, and all is as it was then."""
        return self._forms == [update.form for update in updates]

    def sums(self, updates: Sequence[Update]) -> list[Tensor | None]:
        """R_g² of the groups of each weight in this process, see :meth:`Update.sums`; None without 𝔤."""
        found: dict[int, Tensor] = {}
        for members, launches in self._squares:
            found |= zip(members, launches.squares(_jobs(updates, members)), strict=True)
        found |= {i: updates[i].sums() for i in self._with_norm if i not in found}
        return [found.get(i) for i in range(len(updates))]

    def finite_sums(self, updates: Sequence[Update]) -> tuple[list[Tensor | None], Tensor | None]:
        """R_g² as of :meth:`sums`, over all processes, when gradients are known to be finite.

        Or before that, with one bool that will say it, so that the host does not wait for the backward pass: where it turns
        out not to hold, :meth:`shares` lets nothing move, and :func:`refuse` is to follow.

        Raises:
            FloatingPointError: gradients are not finite, or too large.
        """
        shards = [update.pom.shard for update in updates]
        sums = self.sums(updates)
        spread = {
            i: (s, x) for i, (s, x) in enumerate(zip(shards, sums, strict=True)) if s and s.spread and x is not None
        }
        for i, found in add_up(spread).items():
            sums[i] = found
        known = [x for x in sums if x is not None]
        if not known:
            return sums, None
        # By device: a model may be spread over several.
        devices = dict.fromkeys(x.device for x in known)
        worst = together(torch.cat([x for x in known if x.device == device]).max() for device in devices)
        finite = worst.max() <= checks.LARGEST_GRADIENT**2
        if self._waits:
            return sums, finite
        bad = not bool(finite)
        if any(shards):
            bad = any(anywhere([bad] * len(shards), shards, updates[0].grad.device))
        if bad:
            refuse(updates, sums)
        return sums, None

    def shares(
        self, updates: Sequence[Update], sums: Sequence[Tensor | None], finite: Tensor | None = None
    ) -> list[Tensor]:
        """1/𝔤 of the groups of each weight, see :meth:`Update.shares`: at once for all whose ρ is the same.

        NaN, with which no component moves, where ``finite`` (one bool) is given and does not hold.
        """
        shares: dict[int, Tensor] = {}
        for key, members in self._alike.items():
            rho, dtype, _ = key
            of_weights = [updates[i] for i in members]
            if key not in self._curvatures:
                self._curvatures[key] = torch.cat([u.pom.curvatures(u.group["metric"]) for u in of_weights])
            norms = torch.cat([x for i in members if (x := sums[i]) is not None]).sqrt().to(dtype)
            of_all = 1 / step_normalizer(norms, rho, self._curvatures[key])
            of_all = of_all if finite is None else torch.where(finite.to(of_all.device), of_all, torch.nan)
            shares |= zip(members, of_all.split([u.pom.num_groups for u in of_weights]), strict=True)
        return [
            shares[i] if i in shares else update.shares(found)
            for i, (update, found) in enumerate(zip(updates, sums, strict=True))
        ]

    def move(self, updates: Sequence[Update], shares: Sequence[Tensor]) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Move all weights and their momenta.

        Returns:
            Which components of each constrained weight were moved, see :meth:`Update.move`, by its number; and whether all
            of them were, a few answers for all.
        """
        moved: dict[int, Tensor] = {}
        whole: list[Tensor] = []
        for members, launches in self._moves:
            masks, answers = launches.advance(_jobs(updates, members), [shares[i] for i in members])
            moved |= zip(members, masks, strict=True)
            whole += answers
        for i in self._constrained:
            if i not in moved:
                moved[i] = updates[i].move(shares[i])
                whole.append(moved[i].all())
        for i in self._free:
            updates[i].move_freely(shares[i])
        return {i: moved[i] for i in self._constrained}, whole


def _launches(
    updates: Sequence[Update], codes: Sequence[ModuleType | None], wanted: Iterable[int], kind: str | None
) -> Iterator[tuple[list[int], Any]]:
    """The numbers of the weights that each compiled code does together, and its launches for them."""
    by_code: dict[ModuleType, list[int]] = {}
    for i in wanted:
        if (code := codes[i]) is not None:
            by_code.setdefault(code, []).append(i)
    for code, members in by_code.items():
        yield members, code.Launches(_jobs(updates, members), kind)


def _jobs(updates: Sequence[Update], members: Iterable[int]) -> list[Job]:
    return [job for i in members if (job := updates[i].job) is not None]


def together(answers: Iterable[Tensor]) -> Tensor:
    """One number each of weights that may be on several devices, as one tensor on the first's."""
    first, *others = answers
    return torch.stack([first, *(x.to(first.device) for x in others)])


def refuse(updates: Sequence[Update], sums: Sequence[Tensor | None]) -> None:
    """Refuse weights or gradients that are not finite or too large, before a step, or after one that moved nothing for that.

    Raises:
        FloatingPointError: always.
    """
    for update in updates:
        update.undo()
    checks.gradients([(u.pom.name, local(u.grad)) for u in updates], [u.pom.shard for u in updates])
    checks.weights([(u.pom.name, local(u.weight)) for u in updates])
    # They are large in their metric alone, as where weights had stood at next to 0 when they were placed.
    raise checks.too_large([(u.pom.name, x) for u, x in zip(updates, sums, strict=True) if x is not None])
