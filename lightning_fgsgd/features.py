"""Reading what enters the layers of a model: the features whose standard deviation is λ."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_fgsgd.components import CONVOLUTIONS
from lightning_fgsgd.pom import POM

__all__ = ["FeatureReader", "keeps_statistics"]

_CALLED = (nn.Linear, CondConv2d, *CONVOLUTIONS)
_FUNCTIONS = {
    F.linear,
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


class FeatureReader:
    """Shows the input of every constrained layer, however the model uses the layer's weight.

    Forward hooks see the input of Linear layers, convolutions and recurrent layers that are called. Weights that are used
    without a call of their layer (``F.linear(x, self.qkv.weight)``, ``nn.MultiheadAttention``, bare parameters) are watched
    for in torch's own functions; that costs a little for each function called, so it stops where every weight's layer was
    seen to be called. Not seen: weights that reach a function changed (cast, sliced, normalised), the hidden states between
    the layers of a recurrent stack, the output projection of ``nn.MultiheadAttention``, and what is called in a
    ``torch.func.vmap``.

    Code of ``torch.compile`` runs uncompiled from :meth:`start` to :meth:`close`, and there are hooks only then: hooks in
    compiled code would split it at every layer, and be compiled anew whenever they change.

    Args:
        model: holds the weights.
        poms: the constrained weights.
        update: is given the weight, its features and their channel axis.
        pixels: is given the weight and the number of pixels, or tokens, of what it puts out for one image or sequence.
        behind: is given each norm with running statistics whose input has a gradient: something trained comes before it.
    """

    def __init__(
        self,
        model: nn.Module,
        poms: Mapping[Tensor, POM],
        update: Callable[[Tensor, Tensor, int], None],
        pixels: Callable[[Tensor, int], None],
        behind: Callable[[nn.Module], None],
    ) -> None:
        self._poms = poms
        self._update = update
        self._pixels = pixels
        self._behind = behind
        self._called: set[Tensor] = set()
        self._reading = False
        self._functions: _Functions | None = None
        self._handles: list[Any] = []
        self._uncompiled: Any = None
        self._model = model

    def start(self) -> None:
        """Read from now on."""
        self._reading = True
        if self._uncompiled is None:
            self._uncompiled = torch.compiler.set_stance("force_eager")
            self._hook()
        if self._functions is None and len(self._called) < len(self._poms):
            self._functions = _Functions(self)
            self._functions.__enter__()

    def stop(self) -> None:
        """Read no more until :meth:`start`."""
        self._reading = False
        if self._functions is not None:
            functions, self._functions = self._functions, None
            functions.__exit__(None, None, None)

    def close(self) -> None:
        """Read no more, leave no hook behind, and let compiled code run again."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._uncompiled is not None:
            self._uncompiled.__exit__(None, None, None)
            self._uncompiled = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has copies of the hooks, which read nothing and tell nobody.
        return {"_reading": False, "_behind": _nobody}

    def _hook(self) -> None:
        for module in self._model.modules():
            if keeps_statistics(module):
                self._handles.append(module.register_forward_pre_hook(self._norm, with_kwargs=True))
            weights = {attr: p for attr, p in module._parameters.items() if p is not None and p in self._poms}
            if not weights:
                continue
            if isinstance(module, _CALLED):
                # Called weight_orig where torch.nn.utils.prune has been at it. Another is a layer's that this one uses, too.
                weight = next((weights[attr] for attr in ("weight", "weight_orig") if attr in weights), None)
                if weight is None:
                    continue
                before = partial(self._before, weight)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(partial(self._after, weight)))
            elif isinstance(module, nn.RNNBase):
                self._handles.append(module.register_forward_hook(partial(self._recurrent, weights), with_kwargs=True))
            elif isinstance(module, nn.RNNCellBase):
                self._handles.append(module.register_forward_hook(partial(self._cell, weights), with_kwargs=True))

    def _norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Not only while reading: what is checkpointed has gradients when it runs again, in the backward pass.
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
        ):
            self._behind(module)

    # What is seen ---------------------------------------------------------------------------------------------------

    def _show(self, weight: Tensor, features: Any, dim: int = -1) -> None:
        channels = self._poms[weight].layer.in_channels
        if not isinstance(features, Tensor) or torch._C._functorch.is_batchedtensor(features):
            return
        features = _plain(features.detach())
        if features.ndim >= abs(dim) and features.shape[dim] == channels:
            self._update(weight, features, dim)

    def _put_out(self, weight: Tensor, output: Any) -> None:
        """Tell the number of pixels of what a Linear layer or a convolution puts out."""
        if isinstance(output, Tensor):
            if output.is_nested:  # of the longest sequence
                output = max(output.unbind(), key=len)[None]
            spatial = len(self._poms[weight].layer.kernel)
            self._pixels(weight, output.shape[-spatial:].numel() if spatial else output.shape[1:-1].numel())

    def _axis(self, weight: Tensor) -> int:
        """The channel axis of a layer's input."""
        return -1 - len(self._poms[weight].layer.kernel)

    def _before(self, weight: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._reading:
            self._called.add(weight)
            self._show(weight, args[0] if args else kwargs.get("input", kwargs.get("x")), self._axis(weight))

    def _after(self, weight: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._reading:
            self._put_out(weight, output)

    def _recurrent(
        self, weights: Mapping[str, Tensor], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """The input of the first layer, and the hidden states of the last, one step late."""
        if not self._reading:
            return
        self._called.update(weights.values())
        features, start = _given(args, kwargs)
        hidden, states = output[0], start[0] if isinstance(start, tuple) else start
        time = 1 if module.batch_first and isinstance(hidden, Tensor) and hidden.ndim == 3 else 0
        steps = hidden.shape[time] if isinstance(hidden, Tensor) else len(hidden.batch_sizes)
        for attr, weight in weights.items():
            kind, layer, reverse = re.fullmatch(r"weight_(ih|hh|hr)_l(\d+)(_reverse)?", attr).groups()  # type: ignore[union-attr]
            self._pixels(weight, steps)
            if kind == "ih" and int(layer) == 0:
                self._show(weight, getattr(features, "data", features))
            elif kind == "hh" and int(layer) == module.num_layers - 1 and isinstance(hidden, Tensor):
                size = self._poms[weight].layer.in_channels
                own = hidden[..., size:] if reverse else hidden[..., :size]
                own = own.flip(time) if reverse else own
                first = torch.zeros_like(own.narrow(time, 0, 1))
                if states is not None:  # of the last layer; those of the two directions come last
                    first = states[-1 if reverse or not module.bidirectional else -2].unsqueeze(time).to(own)
                self._show(weight, torch.cat([first, own.narrow(time, 0, steps - 1)], time))

    def _cell(
        self,
        weights: Mapping[str, Tensor],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not self._reading:
            return
        self._called.update(weights.values())
        features, state = _given(args, kwargs)
        for attr, weight in weights.items():
            self._pixels(weight, 1)
            self._show(weight, features if attr == "weight_ih" else state[0] if isinstance(state, tuple) else state)

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A function of torch was called; show what it applied to a constrained weight that is not read otherwise."""
        if func in _FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if type(weight) is nn.Parameter and weight in self._poms and weight not in self._called:
                self._show(weight, args[0] if args else kwargs.get("input"), self._axis(weight))
                self._put_out(weight, output)
        elif func is F.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            inputs = [given[name] for name in ("query", "key", "value")]
            separate = [given.get(f"{name}_proj_weight") for name in ("q", "k", "v")]
            weights = separate if given.get("use_separate_proj_weight") else [given["in_proj_weight"]] * 3
            for weight, features in zip(weights, inputs, strict=True):
                if weight is not None and weight in self._poms:
                    self._show(weight, features)
                    self._pixels(weight, len(features))  # torch has the sequence first here


def _nobody(norm: nn.Module) -> None:
    pass


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a norm with running statistics: a batch norm, or one that is frozen by its class."""
    frozen = "FrozenBatchNorm" in type(module).__name__
    return frozen or (isinstance(module, _BatchNorm) and module.running_mean is not None)


class _Functions(TorchFunctionMode):
    """Tells a reader of every function of torch that is called."""

    def __init__(self, reader: FeatureReader) -> None:
        super().__init__()
        self._reader = reader

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self._reader.function(func, args, kwargs, output)
        return output


def _plain(features: Tensor) -> Tensor:
    """Features without what a subclass of Tensor carries beside its numbers; sequences of a nested one in a row."""
    if features.is_nested:
        return torch.cat(features.unbind())
    own_storage = type(features).__torch_dispatch__ is Tensor.__torch_dispatch__  # not so a DTensor
    return features.as_subclass(Tensor) if own_storage else features


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The input of a recurrent layer and its states at the start, however they were given."""
    return args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs.get("hx")
