"""Which parameters a pattern means: globs on names, layer types, and timm's head, stem and stages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

__all__ = ["Selector", "head_parameters", "layer_decay_factors"]


class Selector:
    """Finds the parameters of a model that patterns match.

    A pattern is one of

    * a glob on the parameter's name, any of them where it is tied: ``"blocks.*.attn.*"``;
    * ``"type:"`` and a glob on the class of its layer, or on one of its base classes: ``"type:Linear"``, ``"type:Conv*"``;
    * ``"timm:head"``, the classifier that ``get_classifier`` names; ``"timm:stem"``; ``"timm:stage1"``, ``"timm:stage2"``,
      ..., the groups that ``group_matcher(coarse=True)`` numbers after the stem.

    Args:
        model: a timm model, or a module that holds one.
        names: the name of every parameter.
        owners: the modules that hold each parameter.
    """

    def __init__(self, model: nn.Module, names: dict[Tensor, str], owners: dict[Tensor, list[nn.Module]]) -> None:
        self._model = model
        self._names = names
        self._all_names = {p: {name} for p, name in names.items()}
        for name, p in model.named_parameters(remove_duplicate=False):  # a tied weight has several
            if p in self._all_names:
                self._all_names[p].add(name.replace("_orig_mod.", ""))
        self._owners = owners
        self._stages: dict[Tensor, int] | None = None

    def find(self, argument: str, patterns: Iterable[str] | None) -> set[Tensor]:
        """The parameters that at least one of ``patterns`` matches.

        Raises:
            ValueError: ``patterns`` is one string, or one of them matches nothing; names ``argument``.
        """
        if isinstance(patterns, str):
            raise ValueError(f"{argument}: {patterns!r} is one string; give a list of patterns, [{patterns!r}]")
        found = set()
        for pattern in patterns or ():
            matched = self._match(argument, pattern)
            if not matched:
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no parameter; {self._help(pattern)}")
            found |= matched
        return found

    def _match(self, argument: str, pattern: str) -> set[Tensor]:
        if pattern.startswith("type:"):
            glob = pattern.removeprefix("type:")
            return {p for p, owners in self._owners.items() if any(_is_type(owner, glob) for owner in owners)}
        if pattern == "timm:head":
            return head_parameters(self._model)
        if pattern.startswith("timm:"):
            part = pattern.removeprefix("timm:")
            number = "0" if part == "stem" else part.removeprefix("stage")
            if not number.isdigit() or (part != "stem" and (part == number or int(number) == 0)):
                raise ValueError(
                    f"{argument}: unknown pattern {pattern!r}; there are timm:head, timm:stem, timm:stage1, ..."
                )
            if self._stages is None:
                self._stages = {}
                for of_one in _groups_by_parameter(self._model, argument, coarse=True):
                    self._stages |= of_one
            return {p for p, stage in self._stages.items() if stage == int(number)}
        return {p for p, names in self._all_names.items() if any(fnmatchcase(name, pattern) for name in names)}

    def _help(self, pattern: str) -> str:
        if pattern.startswith("type:"):
            classes = sorted({type(owner).__name__ for owners in self._owners.values() for owner in owners})
            return f"its layers are of the classes {', '.join(classes)}"
        if pattern.startswith("timm:stage") and self._stages:
            return f"the last stage is timm:stage{max(self._stages.values())}"
        some = ", ".join(repr(name) for name in list(self._names.values())[:3])
        return f"it is a glob on names such as {some}"


def head_parameters(model: nn.Module) -> set[Tensor]:
    """The parameters of the classifier heads of all timm models in ``model``; an ``aux_head`` is one too."""
    heads: list[Any] = []
    for module in model.modules():
        get_classifier: Any = getattr(module, "get_classifier", None)
        if callable(get_classifier) and not _needs_arguments(get_classifier):
            head = get_classifier()
            heads += [*(head if isinstance(head, (tuple, list)) else (head,)), getattr(module, "aux_head", None)]
    return {p for head in heads if isinstance(head, nn.Module) for p in head.parameters()}


def _needs_arguments(method: Callable[..., Any]) -> bool:
    """Whether it cannot be called as timm's is: a user's own of the same name."""
    try:
        inspect.signature(method).bind()
    except TypeError:
        return True
    return False


def layer_decay_factors(model: nn.Module, decay: float) -> dict[Tensor, float]:
    """Factor of each parameter's learning rate, ``decay`` to the power of its layer's distance from the output.

    Layers are those of timm's ``group_matcher``, as in ``timm.optim.param_groups_layer_decay``; parameters outside the timm
    model have the factor 1.
    """
    factors: dict[Tensor, float] = {}
    for layers in _groups_by_parameter(model, "layer_decay", coarse=False):
        last = max(layers.values())
        factors |= {p: decay ** (last - layer) for p, layer in layers.items()}
    return factors


def _groups_by_parameter(model: nn.Module, argument: str, coarse: bool) -> list[dict[Tensor, int]]:
    """Number of timm's group of each parameter, from 0 at the input, for each of the timm models in ``model``."""
    found: list[dict[Tensor, int]] = []
    for module in _outermost(model):
        matcher: Any = module.group_matcher
        numbers: Any = group_parameters(module, matcher(coarse=coarse), reverse=True)
        found.append({p: int(numbers[name]) for name, p in module.named_parameters() if name in numbers})
    if not any(found):
        raise ValueError(
            f"{argument}: {type(model).__name__} has no timm model with a group_matcher, which numbers stages and layers; "
            "choose by globs on names"
        )
    return [of_one for of_one in found if of_one]


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    module = getattr(module, "_orig_mod", module)  # of torch.compile(module)
    if callable(getattr(module, "group_matcher", None)):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _is_type(module: nn.Module, glob: str) -> bool:
    return any(fnmatchcase(base.__name__, glob) for base in type(module).__mro__ if base not in (object, nn.Module))
