"""A stand-in for the package mamba_ssm, for code that imports its selective scan.

What it holds, and no more: `mamba_ssm.ops.selective_scan_interface` with `selective_scan_fn`, which
is `mambavision.selective_scan_fn`, and `selective_scan_ref`, the same by the reference's loop over
time. It lives in sys.modules only; nothing is written to disk.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from .checks import check_selective_scan
from .ops import selective_scan_fn
from .reference import selective_scan

__all__ = ["ProvidedMambaSsm", "provide_mamba_ssm", "selective_scan_ref"]

_ROOT = "mamba_ssm"
_NAMES = (_ROOT, f"{_ROOT}.ops", f"{_ROOT}.ops.selective_scan_interface")


def selective_scan_ref(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool | None = False,
) -> Any:  # fmt: skip
    """`selective_scan_fn` as one loop over time, to compare with: plain PyTorch, slow.

    Arguments, shapes, dtypes, errors and results are those of `selective_scan_fn`; gradients come
    from autograd.

    >>> u, delta = torch.randn(2, 160, 196), torch.rand(2, 160, 196)
    >>> A, B, C = -torch.rand(160, 8), torch.randn(2, 8, 196), torch.randn(2, 8, 196)
    >>> selective_scan_ref(u, delta, A, B, C).shape
    torch.Size([2, 160, 196])
    """
    check_selective_scan(
        "selective_scan_ref", True, u, delta, A, B, C, D, z, delta_bias, None,
        delta_softplus=delta_softplus, return_last_state=return_last_state,
    )  # fmt: skip

    def over_time(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x
        if A.is_complex():
            x = torch.view_as_complex(x.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())
        return x.movedim(-1, 1)

    y, last_state = selective_scan(
        u.mT, delta.mT, A, over_time(B), over_time(C), D, z=None if z is None else z.mT,
        delta_bias=delta_bias, delta_softplus=delta_softplus, return_last_state=True,
    )  # fmt: skip
    return (y.mT, last_state) if return_last_state else y.mT


class ProvidedMambaSsm:
    """What `provide_mamba_ssm` has done: `active` says whether anything, `undo()` takes it back.

    As a context manager it undoes at the end.
    """

    def __init__(self, active: bool):
        self.active = active
        self._displaced: dict[str, ModuleType] = {}
        if active:
            ours = [name for name in sys.modules if name.split(".")[0] == _ROOT]
            self._displaced = {name: sys.modules.pop(name) for name in ours}
            self._modules = _stand_in()
            sys.modules.update(self._modules)

    def undo(self) -> None:
        """Makes imports of mamba_ssm find what they found before; what has them keeps them."""
        if self.active:
            for name, module in self._modules.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
            sys.modules.update(self._displaced)
        self.active = False

    def __enter__(self) -> "ProvidedMambaSsm":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def _stand_in() -> dict[str, ModuleType]:
    modules = {name: ModuleType(name, __doc__) for name in _NAMES}
    for name, module in modules.items():
        # So that find_spec works, and an ImportError for what is not here names this file.
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=name != _NAMES[-1])
        module.__file__ = __file__
        if name != _NAMES[-1]:
            module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    scans = {"selective_scan_fn": selective_scan_fn, "selective_scan_ref": selective_scan_ref}
    vars(modules[_NAMES[-1]]).update(scans)
    return modules


def provide_mamba_ssm(*, replace: bool = False) -> ProvidedMambaSsm:
    """Lets `import mamba_ssm.ops.selective_scan_interface` work where mamba-ssm is not installed.

    The module holds `selective_scan_fn` and `selective_scan_ref` of this package, on a GPU and on a
    CPU, with gradients; other names of mamba-ssm are not there and fail to import as usual. Call it
    before the code that wants mamba-ssm is imported. An installed mamba_ssm is left alone, and
    nothing happens, unless `replace` is true.

    Returns a handle with `active` (whether it did anything) and `undo()`; used in a `with`
    statement it undoes itself, and what was imported meanwhile keeps working.

    >>> with provide_mamba_ssm():
    ...     from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    """
    there = sys.modules.get(_ROOT) is not None or find_spec(_ROOT) is not None
    return ProvidedMambaSsm(active=replace or not there)
