"""FG-SGD in double precision by plain loops over components, in NumPy and SciPy: slow, and written from the paper alone."""

from __future__ import annotations

import numpy as np
import scipy.linalg


def cut(weight: np.ndarray, kind: str, p: int, conv_groups: int = 1, transposed: bool = False) -> list[np.ndarray]:
    """The components of a weight, in the order in which the package numbers them, as n x p views on it."""
    parts = []
    if kind == "kernel":
        for first in range(weight.shape[0]):
            for second in range(weight.shape[1]):
                kernel = weight[first, second]
                kernel = kernel[:, None] if kernel.ndim == 1 else kernel
                parts.append(kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T)
        return parts
    assert not transposed
    rows = weight.reshape(weight.shape[0], -1)
    return [rows[start : start + p].T for start in range(0, rows.shape[0], p)]


def scale_of(manifold: str, omega: np.ndarray) -> np.ndarray:
    """S, p x p, with ω on {q S}."""
    gram = omega.T @ omega
    if manifold == "sphere":
        return np.sqrt(np.trace(gram)) * np.eye(len(gram))
    if manifold == "oblique":
        return np.diag(np.sqrt(np.diag(gram)))
    if manifold == "stiefel":
        return scipy.linalg.sqrtm(gram).real
    return np.eye(len(gram))


def nearest(manifold: str, v: np.ndarray) -> np.ndarray:
    """Nearest unit point."""
    if manifold == "sphere":
        return v / np.linalg.norm(v)
    if manifold == "oblique":
        return np.stack([column / np.linalg.norm(column) for column in v.T], axis=1)
    if manifold == "stiefel":
        return scipy.linalg.polar(v)[0]
    return v


def tangent(manifold: str, q: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Tangent projection at the unit point q."""
    if manifold == "sphere":
        return g - q * np.sum(q * g)
    if manifold == "oblique":
        return np.stack([b - a * (a @ b) for a, b in zip(q.T, g.T, strict=True)], axis=1)
    if manifold == "stiefel":
        return g - q @ (q.T @ g + g.T @ q) / 2
    return g


def normalizer(norm: float, rho: float, c: float) -> float:
    """Eq. 5."""
    return max(1.0, norm**2 * max((2 * rho + norm) ** 2, 1 + c * (rho + norm))) ** 0.5


class Reference:
    """One weight on its products of manifolds, stepped component by component.

    Args:
        components: the weight's components, views that are written to.
        names: the manifold of each.
        group: the group of each.
        start: "preserve", or anything else for a unit scale.
        radius: R of each.
        metric: "start", "unit" or "embedded".
        before: the components before they were placed; as they are by default.
    """

    def __init__(self, components, names, group, start, radius, metric="start", before=None):
        self.components, self.names, self.group, self.radius, self.metric = components, names, group, radius, metric
        self.scales = [
            scale_of(name, omega / r) if start == "preserve" else np.eye(omega.shape[1])
            for name, omega, r in zip(names, components, radius, strict=True)
        ]
        self.points = [
            omega @ np.linalg.inv(s) / r if name != "euclidean" else omega.copy()
            for name, omega, s, r in zip(names, components, self.scales, radius, strict=True)
        ]
        self.buffers = None
        self.origins = [scale_of(name, omega) for name, omega in zip(names, before or components, strict=True)]

    def _m(self, i):
        if self.names[i] == "euclidean" or self.metric == "unit":
            return 1.0
        same = [j for j, name in enumerate(self.names) if name == self.names[i]]
        scales = self.scales if self.metric == "embedded" else self.origins
        size = np.mean([np.trace(scales[j] @ scales[j]) / len(scales[j]) for j in same])
        return size * (self.radius[i] ** 2 if self.metric == "embedded" else 1.0)

    def step(self, grads, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, maximize=False, rho=1.0):
        indices = range(len(self.components))
        gradients = []
        for i in indices:
            g = -grads[i] if maximize else grads[i]
            if self.names[i] == "euclidean":
                gradients.append(g + weight_decay * self.components[i])
            else:
                pulled = self.radius[i] * g @ self.scales[i].T
                gradients.append(tangent(self.names[i], self.points[i], pulled) / np.sqrt(self._m(i)))
        if rho is not None:
            for g in set(self.group):
                members = [i for i in indices if self.group[i] == g]
                norm = np.sqrt(sum(np.sum(gradients[i] ** 2) for i in members))
                c = max(0.0 if self.names[i] == "euclidean" else 1.0 / self._m(i) for i in members)
                for i in members:
                    gradients[i] = gradients[i] / normalizer(norm, rho, c)
        if momentum == 0:
            directions = gradients
        else:
            if self.buffers is None:
                self.buffers = [g.copy() for g in gradients]
            else:
                pairs = zip(self.buffers, gradients, strict=True)
                self.buffers = [momentum * b + (1 - dampening) * g for b, g in pairs]
            directions = (
                [g + momentum * b for g, b in zip(gradients, self.buffers, strict=True)] if nesterov else self.buffers
            )
        for i in indices:
            root = np.sqrt(self._m(i))
            self.points[i] = nearest(self.names[i], self.points[i] - lr * directions[i] / root)
            constrained = self.names[i] != "euclidean"
            self.components[i][...] = (
                self.radius[i] * self.points[i] @ self.scales[i] if constrained else self.points[i]
            )
            if self.buffers is not None:
                self.buffers[i] = tangent(self.names[i], self.points[i], self.buffers[i])
