"""Nothing gets a time before it is right: an operator's results against the reference in float64.

The batch that is timed holds a few different sequences over and over, in random order. So every
result at full size, by the very code that is timed, has a truth that takes a few sequences to
compute: outputs and gradients of a sequence repeat, and sums over the batch are multiples.

Allowed is twice the error which the reference itself makes in the same dtype, plus eight roundings
of it, each relative to the largest value of the tensor; and for a sum over n elements sqrt(n)
roundings of float32, what adding them up one after another loses.
"""

import math

import torch
from problems import PER_SEQUENCE, Call, Tensors, make_problem, reference_results
from shapes import Shape
from torch import Tensor
from ways import Wrong

__all__ = ["Gate"]

ROUNDINGS = 8


def _different(batch: int) -> int:
    """How many different sequences a batch holds: they all have to occur equally often."""
    return next(count for count in (4, 3, 2, 1) if batch % count == 0)


class Gate:
    """A problem at full size (`problem`), and whether a call of it is right."""

    def __init__(self, op: str, shape: Shape, batch: int, dtype: torch.dtype, device: str):
        count = _different(batch)
        self.few = make_problem(op, shape, count, dtype, device)
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)) % count
        self.index = order.to(device)
        self.times = batch // count
        self.problem = self.few.repeated(self.index)
        self._known: dict[bool, tuple[Tensors, dict[str, float]]] = {}

    def truth(self, gradients: bool) -> tuple[Tensors, dict[str, float]]:
        """Exact results of the few sequences, and the limit of each."""
        if gradients not in self._known:
            truth = reference_results(self.few.to(torch.float64), gradients)
            plain = reference_results(self.few, gradients)
            least = ROUNDINGS * torch.finfo(self.few.dy.dtype).eps
            limits = {name: 2 * _error(plain[name], x) + least for name, x in truth.items()}
            summed = math.sqrt(self.problem.batch * self.few.shape.seqlen)
            for name in truth:
                if not _per_sequence(name):
                    limits[name] += summed * torch.finfo(torch.float32).eps
            self._known[gradients] = truth, limits
        return self._known[gradients]

    def check(self, call: Call, gradients: bool) -> None:
        """Wrong, naming the first result that is off; a NaN is never within a limit."""
        truth, limits = self.truth(gradients)
        found = call.results(gradients)
        for name, exact in truth.items():
            if _per_sequence(name):
                error = _error(found[name], exact[self.index])
            else:
                error = _error(found[name], exact * self.times)
            if not error <= limits[name]:
                raise Wrong(f"{name} is off by {error:.1e}, allowed {limits[name]:.1e}")


def _per_sequence(name: str) -> bool:
    return name.removeprefix("d") in PER_SEQUENCE


def _error(x: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest value of the truth."""
    x = x.detach().double()
    return float((x - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
