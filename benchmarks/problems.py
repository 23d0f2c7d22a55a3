"""An operator's arguments at one size, the reference's results, and calls that can be timed.

A `Problem` is what is to be computed. A `Call` is one way to compute it, ready to run forward
(without gradients), backward alone, or both; it hands its results back in the layout and under the
names of the reference, for the gate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import Shape
from torch import Tensor, nn

from mambavision import reference

__all__ = [
    "FLAGS", "FLOAT32", "PER_SEQUENCE", "ByHand", "Call", "Problem", "make_problem",
    "reference_results",
]  # fmt: skip

Tensors = dict[str, Tensor]
Run = Callable[[], Any]

# Float32 whatever the activations are.
FLOAT32 = ("A", "D", "delta_bias")
# One value per sequence of the batch; the gradients of all others are sums over the batch.
PER_SEQUENCE = ("u", "delta", "B", "C", "x", "xz", "hidden", "y")
FLAGS: dict[str, dict[str, Any]] = {
    "selective_scan": {"delta_softplus": True}, "conv1d_silu": {}, "mixer": {},
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Arguments by name, in the reference's layout, and the gradient of the output."""

    op: str
    shape: Shape
    tensors: Tensors
    dy: Tensor

    @property
    def batch(self) -> int:
        return self.dy.shape[0]

    def repeated(self, index: Tensor) -> "Problem":
        """The problem whose batch holds this one's sequences at `index`."""
        tensors = {k: x[index] if k in PER_SEQUENCE else x for k, x in self.tensors.items()}
        return Problem(self.op, self.shape, tensors, self.dy[index])

    def to(self, dtype: torch.dtype) -> "Problem":
        """Every tensor in one dtype."""
        tensors = {name: x.to(dtype) for name, x in self.tensors.items()}
        return Problem(self.op, self.shape, tensors, self.dy.to(dtype))


def make_problem(op: str, shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Problem:
    """Random arguments, the same in every run on the same device."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=draw, device=device)

    def linear(out: int, inner: int) -> Tensor:
        return normal(out, inner, scale=inner**-0.5)

    seqlen, dim, dstate, dt_rank = shape.seqlen, shape.dim, shape.dstate, shape.dt_rank
    states = torch.arange(1.0, dstate + 1, device=device).repeat(dim, 1)
    log_A = states.log() + normal(dim, dstate, scale=0.1)
    D, bias = 1 + normal(dim, scale=0.1), normal(dim, scale=0.5) - 3
    scan = {"A": -log_A.exp(), "D": D, "delta_bias": bias}
    weights = {
        "conv_x_weight": normal(dim, shape.width),
        "conv_z_weight": normal(dim, shape.width),
        "x_proj_weight": linear(dt_rank + 2 * dstate, dim),
        "dt_proj_weight": linear(dim, dt_rank),
    }
    if op == "selective_scan":
        tensors = {name: normal(batch, seqlen, dim) for name in ("u", "delta")}
        tensors |= {name: normal(batch, seqlen, dstate) for name in ("B", "C")} | scan
        out = dim
    elif op == "conv1d_silu":
        tensors = {"x": normal(batch, seqlen, dim), "weight": normal(dim, shape.width)}
        out = dim
    elif op == "mixer":
        tensors = {"xz": normal(batch, seqlen, 2 * dim), **weights, **scan}
        out = 2 * dim
    else:
        assert op == "mixer_module", op
        # The published module adds its bias twice.
        tensors = {
            "hidden": normal(batch, seqlen, shape.d_model),
            "in_proj_weight": linear(2 * dim, shape.d_model),
            **weights,
            "A_log": log_A,
            "D": D,
            "dt_proj_bias": bias / 2,
            "out_proj_weight": linear(shape.d_model, 2 * dim),
        }
        out = shape.d_model
    kept = FLOAT32 if op != "mixer_module" else ()
    tensors = {k: x if k in kept else x.to(dtype) for k, x in tensors.items()}
    # So small that the weights' gradients, sums over the batch, stay within float16.
    return Problem(op, shape, tensors, normal(batch, seqlen, out, scale=1 / 64).to(dtype))


# Results of the reference, by hand


def _module_results(problem: Problem, gradients: bool) -> Tensors:
    """in_proj, the reference's mixer, out_proj, and the chain rule."""
    given = dict(problem.tensors)
    hidden, into, out = (given.pop(k) for k in ("hidden", "in_proj_weight", "out_proj_weight"))
    log_A, bias = given.pop("A_log"), given.pop("dt_proj_bias")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    A = -torch.exp(log_A.to(wide))
    given |= {"A": A, "D": given["D"].to(wide), "delta_bias": 2 * bias.to(wide)}
    xz = hidden @ into.t()
    yz = reference.mixer(xz, **given)
    found = {"y": yz @ out.t()}
    if gradients:
        grads = reference.mixer_backward(problem.dy @ out, xz, **given)._asdict()
        found |= {f"d{name}": grads[f"d{name}"] for name in given if name.endswith("weight")}
        found |= {
            "dhidden": grads["dxz"] @ into,
            "din_proj_weight": torch.einsum("btc,btd->cd", grads["dxz"], hidden),
            "dout_proj_weight": torch.einsum("btd,btc->dc", problem.dy, yz),
            "dA_log": grads["dA"] * A,
            "dD": grads["dD"],
            "ddt_proj_bias": 2 * grads["ddelta_bias"],
        }
    return found


def reference_results(problem: Problem, gradients: bool) -> Tensors:
    """The output "y" and, with `gradients`, "d" + name for each argument."""
    if problem.op == "mixer_module":
        return _module_results(problem, gradients)
    flags = FLAGS[problem.op]
    found = {"y": getattr(reference, problem.op)(**problem.tensors, **flags)}
    if gradients:
        backward = getattr(reference, f"{problem.op}_backward")
        grads = backward(problem.dy, **problem.tensors, **flags)._asdict()
        found |= {f"d{name}": grads[f"d{name}"] for name in problem.tensors}
    return found


# Calls


def _as_it_is(name: str, x: Tensor) -> Tensor:
    return x


@dataclass
class Call:
    """A function of `leaves`, which autograd differentiates; `setting` goes into the rows.

    `restore` brings a result, "y" or "d" + name, into the reference's layout.
    """

    function: Callable[[], Tensor]
    leaves: Tensors
    dy: Tensor
    restore: Callable[[str, Tensor], Tensor] = _as_it_is
    setting: str | None = None
    module: nn.Module | None = None
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        for x in self.leaves.values():
            x.requires_grad_()
        self.parameters = [x for name, x in self.leaves.items() if name not in PER_SEQUENCE]

    def _gradients(self, y: Tensor, keep: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, tuple(self.leaves.values()), self.dy, retain_graph=keep)

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self.function()

    def _both(self) -> tuple[Tensor, ...]:
        return self._gradients(self.function(), keep=False)

    def ready(self, direction: str) -> Run:
        """What is timed. "backward" is the backward pass of a forward pass that is done here."""
        if self.module is not None:
            self.module.train(direction != "forward")
        if direction != "backward":
            return {"forward": self._forward, "both": self._both}[direction]
        y = self.function()
        return lambda: self._gradients(y, keep=True)

    def results(self, gradients: bool) -> Tensors:
        """For the gate, by the same functions that are timed."""
        if not gradients:
            return {"y": self.restore("y", self.ready("forward")())}
        self.ready("both")
        y = self.function()
        found = dict(zip(self.leaves, self._gradients(y, keep=False), strict=True))
        results = {"y": y.detach()} | {f"d{name}": x for name, x in found.items()}
        return {name: self.restore(name, x) for name, x in results.items()}


class ByHand(Call):
    """The reference, whose backward pass starts from the arguments alone and keeps nothing."""

    def __init__(self, problem: Problem):
        self.problem, self.setting = problem, None

    def ready(self, direction: str) -> Run:
        if direction != "backward":
            return lambda: reference_results(self.problem, direction == "both")
        backward = getattr(reference, f"{self.problem.op}_backward")
        flags = FLAGS[self.problem.op]
        return lambda: backward(self.problem.dy, **self.problem.tensors, **flags)

    def results(self, gradients: bool) -> Tensors:
        return reference_results(self.problem, gradients)
