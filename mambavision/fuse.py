"""The fused mixer inside a model that somebody else's code built.

A mixer is recognised by its parameters, whoever wrote its class: these names and shapes, with or
without a bias of in_proj and out_proj, and nothing else.

    in_proj.weight (2 dim, d_model)             out_proj.weight (d_model, 2 dim)
    conv1d_x.weight (dim, 1, width)             conv1d_z.weight (dim, 1, width)
    x_proj.weight (dt_rank + 2 dstate, dim)     A_log (dim, dstate)
    dt_proj.weight (dim, dt_rank)               dt_proj.bias (dim)             D (dim)

In its place comes a `MambaVisionMixer` that holds the very same Parameter objects under the same
names: optimizers, moving averages and checkpoints made before or after keep working. The replaced
module is remembered, and `unfuse_mixers` puts it back.
"""

from fractions import Fraction
from typing import Any

from torch import nn

from .mixer import MambaVisionMixer

__all__ = ["fuse_mixers", "unfuse_mixers"]

_SHAPES: dict[str, tuple[str, ...]] = {
    "A_log": ("dim", "dstate"),
    "D": ("dim",),
    "dt_proj.weight": ("dim", "dt_rank"),
    "dt_proj.bias": ("dim",),
    "x_proj.weight": ("dt_rank + 2 * dstate", "dim"),
    "in_proj.weight": ("2 * dim", "d_model"),
    "out_proj.weight": ("d_model", "2 * dim"),
    "conv1d_x.weight": ("dim", "1", "width"),
    "conv1d_z.weight": ("dim", "1", "width"),
}
_OPTIONAL = {"in_proj.bias", "out_proj.bias"}
_MODULES = ("in_proj", "x_proj", "dt_proj", "conv1d_x", "conv1d_z", "out_proj")


class _FusedMixer(MambaVisionMixer):
    """Stands in for `original`, whose parts it shares."""

    def __init__(self, original: Any):
        inner, d_model = original.in_proj.weight.shape
        dim, dstate = original.A_log.shape
        expand: Any = Fraction(inner, d_model)
        width, dt_rank = original.conv1d_x.weight.shape[-1], original.dt_proj.weight.shape[1]
        super().__init__(d_model, dstate, width, expand, dt_rank, device="meta")
        # In a tuple it is no submodule, whose parameters would be found a second time.
        self.stands_for: tuple[nn.Module] = (original,)
        _hand_over(original, self)


def _hand_over(old: Any, new: Any) -> None:
    """Parameters, submodules and hooks of one mixer, as they are now, become those of the other."""
    for name in (*_MODULES, "A_log", "D"):
        setattr(new, name, getattr(old, name))
    new.training = old.training
    # The same dicts, so that handles keep removing their hooks.
    vars(new).update({name: hooks for name, hooks in vars(old).items() if "hooks" in name})


def _difference(module: nn.Module) -> str | None:
    """What sets a module apart from a mixer; None where nothing does."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    lacking = [name for name in _SHAPES if name not in shapes]
    if lacking:
        return f"no {', '.join(lacking)}"
    extra = sorted(shapes.keys() - _SHAPES.keys() - _OPTIONAL)
    extra += [name for name, _ in module.named_buffers()]
    if extra:
        return f"also {', '.join(extra)}"
    sizes = {"1": 1}
    for name, axes in _SHAPES.items():
        if len(axes) != len(shapes[name]):
            return f"{name} is {shapes[name]}"
        for axis, size in zip(axes, shapes[name], strict=True):
            if sizes.setdefault(axis, size) != size:
                return f"{name} is {shapes[name]}, expected {axis} = {sizes[axis]}"
        if "dt_rank" in sizes:
            sizes["2 * dim"] = 2 * sizes["dim"]
            sizes["dt_rank + 2 * dstate"] = sizes["dt_rank"] + 2 * sizes["dstate"]
    return None


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> list[str]:
    """Puts the new modules where the old ones were, wherever that is; names of those places."""
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m in new]
    for name, module in places:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new[module])
    return [name for name, _ in places]


def fuse_mixers(model: nn.Module) -> list[str]:
    """Replaces a model's MambaVision mixers by fused ones, in place; their names are returned.

    For models built by the official package or by the code of a Hugging Face repository. A mixer is
    recognised by the names and shapes of its parameters alone and is taken to compute what the
    published one does. The fused one shares its Parameter objects, so optimizers, moving averages,
    wrappers for distributed training and state dicts do not notice. Training and inference, on any
    device; deep copies and pickles of the model keep the fused mixers. A compiled model compiles
    again. `unfuse_mixers` is the way back.

    Raises TypeError for what is no module, ValueError where nothing can be replaced, with a list of
    what came near and why not.

    >>> model = nn.Sequential(nn.LayerNorm(32), OfficialMixer(32))  # doctest: +SKIP
    >>> fuse_mixers(model)  # doctest: +SKIP
    ['1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_mixers: model must be a torch.nn.Module, got {type(model).__name__}")
    new: dict[nn.Module, nn.Module] = {}
    near = []
    for name, module in model.named_modules():
        if isinstance(module, MambaVisionMixer):
            near.append(f"{name or 'the model itself'}: is a fused mixer already")
        elif "A_log" in module._parameters or _difference(module) is None:
            difference = _difference(module)
            if difference is None and module is model:
                difference = "has no parent to be replaced in"
            if difference is None:
                new[module] = _FusedMixer(module)
            else:
                near.append(f"{name or 'the model itself'}: {difference}")
    if not new:
        more = [f"and {len(near) - 8} more"] if len(near) > 8 else []
        seen = "; ".join(near[:8] + more) or "no module has a parameter A_log"
        raise ValueError(f"fuse_mixers: no mixer to replace in this {type(model).__name__}: {seen}")
    return _replace(model, new)


def unfuse_mixers(model: nn.Module) -> list[str]:
    """Undoes `fuse_mixers`, in place, and returns the names of the mixers put back.

    They hold the parameters as they are now: what was trained or loaded meanwhile stays. Raises
    TypeError for what is no module, ValueError where `fuse_mixers` has replaced nothing.

    >>> unfuse_mixers(model)  # doctest: +SKIP
    ['1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"unfuse_mixers: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    old: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, _FusedMixer):
            (old[module],) = module.stands_for
            _hand_over(module, old[module])
    if not old:
        raise ValueError(f"unfuse_mixers: this {type(model).__name__} holds no replaced mixers")
    return _replace(model, old)
