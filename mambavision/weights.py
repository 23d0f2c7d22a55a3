"""Checkpoints in and out: weights of any published layout into a model, and a model into a file.

A file is read as data only: torch.load with weights_only=True, which refuses pickled code; of all
classes only argparse.Namespace is let through, in which training scripts keep their arguments.
"""

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .files import replacing
from .hub import MissingExtra, locate
from .published import sizes_of, variants_of

__all__ = ["LoadReport", "load_checkpoint", "read_config", "save_checkpoint"]

# Where a file of nested dicts keeps the weights, best first: the moving average where there is one.
_HOMES = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "model.", "encoder.", "backbone.", "timm_model.")
_HEAD = ("head.weight", "head.bias")


class LoadReport(NamedTuple):
    """What did not match: names the file lacks, names the model lacks, and other shapes.

    `nearest`: where anything did not match, the published variants whose sizes the weights have.
    """

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    nearest: list[str]

    def __str__(self) -> str:
        nearest = " or ".join(self.nearest)
        parts = [f"the weights have the sizes of {nearest}"] if nearest else []
        for kind, names in list(self._asdict().items())[:3]:
            if names:
                more = f", and {len(names) - 4} more" if len(names) > 4 else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:4])}{more}")
        return "; ".join(parts) or "everything matches"


def _safetensors() -> ModuleType:
    try:
        return import_module("safetensors.torch")
    except ImportError:
        raise MissingExtra("safetensors", "a .safetensors file") from None


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _safetensors().load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_config(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        with _safetensors().safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
    else:
        content = _read(path)
        config = content.get("config") if isinstance(content, dict) else None
    return config if isinstance(config, dict) else {}


def _bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper."""
    while inner := next((n for n in ("_orig_mod", "module") if list(model._modules) == [n]), None):
        model = model.get_submodule(inner)
    return model


def _open(
    op: str, source: str | PathLike[str], read: Callable[[Path], Any] = _read
) -> tuple[Any, Path]:
    """What `read` makes of the file behind `source`, and its path, or one clear error."""
    path, downloaded = locate(source)
    if not path.exists():
        raise FileNotFoundError(f"{op}: no file {path}")
    if path.is_dir():
        raise ValueError(f"{op}: {path} is a folder without model.safetensors, expected a file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{op}: no permission to read {path}")
    try:
        return read(path), path
    except MissingExtra:
        raise
    except Exception as error:
        # Damaged bytes raise whatever the reader stumbled over: a dozen types are known.
        reason = str(error)
        refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", reason)
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"{op}: {path} is refused: it holds a pickled {refused[1]}, which is no weight and "
                "could run code"
            ) from error
        # With this byte a pickle of protocol 4 or newer begins.
        if "Unsupported operand 149" in reason:
            raise ValueError(
                f"{op}: {path} is refused: a safe load reads pickle protocols up to 3; save it "
                "again with torch.save's own"
            ) from error
        # torch.load's advice, some fifteen lines, may end in what went wrong.
        reason = reason.rpartition("WeightsUnpickler error:")[2].strip()
        if not reason or reason.startswith("Weights only load failed"):
            reason = type(error).__name__
        again = ""
        if downloaded:
            path.unlink()
            again = f"; the download of {source} is removed, try again"
        raise ValueError(
            f"{op}: {path} is damaged or truncated: {reason.splitlines()[0]}{again}"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights inside, without the prefix that all of their names share."""
    for home in _HOMES:
        if isinstance(content, dict) and isinstance(content.get(home), dict):
            content = content[home]
            break
    if not isinstance(content, dict) or not content:
        raise ValueError(f"load_checkpoint: {path} holds no weights")
    odd = [k for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if odd:
        raise ValueError(
            f"load_checkpoint: {path} holds no state dict: {odd[0]!r} is no tensor under a name"
        )
    state = dict(content)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _shapes(state: dict[str, Tensor]) -> list[torch.Size]:
    return [state[name].shape for name in _HEAD if name in state]


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LoadReport:
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    differs = missing or unexpected or misshapen
    return LoadReport(missing, unexpected, misshapen, variants_of(state) if differs else [])


def _advice(own: Mapping[str, Tensor], state: Mapping[str, Tensor], report: LoadReport) -> str:
    """What to do about weights that do not fit."""
    differing = [*report.missing, *report.unexpected, *(s.split()[0] for s in report.misshapen)]
    if all(name in _HEAD for name in differing):
        return "; only the classifier differs: num_classes keeps the model's own"
    sizes = sizes_of(state)
    if sizes and not report.nearest and sizes != sizes_of(own):
        shown = ", ".join(f"{key}={value}" for key, value in sizes.items())
        return f"; the weights have {shown}, which is no published variant"
    return ""


def load_checkpoint(
    model: nn.Module,
    path_or_repo_id: str | PathLike[str],
    *,
    strict: bool = True,
    num_classes: int | None = None,
) -> LoadReport:
    """Loads weights into a model, and returns what did not match.

    `path_or_repo_id` is a .safetensors file or one of torch.save (.pth, .pt, .pth.tar); a folder
    with a model.safetensors; the name of a Hugging Face repository with one, "owner/name", which
    huggingface_hub fetches or finds in its cache; or a URL of such a file, kept in torch.hub's
    cache. A file of torch.save holds a state dict or a dict with one under the first of
    state_dict_ema, model_ema, state_dict and model that is there. Prefixes such as "module." that
    all names share are stripped. Windows of another size fit: no parameter depends on them.

    With `strict`, every name and shape must match, or ValueError lists the differences, with the
    published variant that would fit, and the model stays as it was; without, what matches is
    loaded, at least one tensor. `num_classes`, the model's number of classes, asks for weights with
    another classifier, or none, to be taken as well: the model then keeps its own.

    Raises FileNotFoundError, PermissionError, ValueError for a damaged, truncated, unsafe or
    misfitting file, RuntimeError where nothing can be fetched or safetensors is not installed.

    >>> load_checkpoint(model, "mambavision_tiny_1k.pth.tar")  # doctest: +SKIP
    >>> load_checkpoint(model, "nvidia/MambaVision-T-1K")  # doctest: +SKIP
    """
    model = _bare(model)
    own = model.state_dict()
    if any(x.is_meta for x in own.values()):
        raise ValueError(
            "load_checkpoint: the model lies on the meta device and cannot hold weights; "
            "model.to_empty(device=...) gives it memory"
        )
    classes = getattr(model, "num_classes", num_classes)
    if num_classes is not None and classes != num_classes:
        raise ValueError(
            f"load_checkpoint: num_classes must be that of the model, {classes}, got {num_classes}"
        )
    state = _state_dict(*_open("load_checkpoint", path_or_repo_id))
    if num_classes is not None and _shapes(state) != _shapes(own):
        state = {k: v for k, v in state.items() if k not in _HEAD}
        state |= {k: own[k] for k in _HEAD if k in own}
    report = _compare(own, state)
    if strict and any(report):
        raise ValueError(
            f"load_checkpoint: {path_or_repo_id} does not fit this {type(model).__name__}: "
            f"{report}{_advice(own, state, report)}"
        )
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise ValueError(
            f"load_checkpoint: nothing in {path_or_repo_id} fits this {type(model).__name__}: "
            f"{report}{_advice(own, state, report)}"
        )
    model.load_state_dict(fitting, strict=False)
    return report


def read_config(path_or_repo_id: str | PathLike[str]) -> dict[str, Any]:
    """What `save_checkpoint` kept beside the weights; empty for files written by others.

    Sources and errors are those of `load_checkpoint`.

    >>> read_config("model.safetensors")["depths"]  # doctest: +SKIP
    [1, 3, 8, 4]
    """
    return _open("read_config", path_or_repo_id, _read_config)[0]


def save_checkpoint(
    model: nn.Module, path: str | PathLike[str], *, config: Mapping[str, Any] | None = None
) -> None:
    """Saves a model's weights: .safetensors, or .pth, .pt, .pth.tar for torch.save's format.

    With them go the arguments a `MambaVision` was made from and, over these, what `config` adds,
    such as label names: plain values that JSON can hold, for `read_config`. Wrappers such as
    DistributedDataParallel leave no trace in the names. The file appears whole or not at all.

    Raises ValueError for another ending or a config that is not plain, FileNotFoundError for a
    folder that is not there, RuntimeError where safetensors is not installed.

    >>> save_checkpoint(model, "model.safetensors", config={"labels": ["cat", "dog"]})
    ... # doctest: +SKIP
    """
    path = Path(path)
    if not path.name.endswith((".safetensors", ".pth", ".pt", ".pth.tar")):
        raise ValueError(
            f"save_checkpoint: path must end in .safetensors, .pth, .pt or .pth.tar, got {path}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_checkpoint: no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"save_checkpoint: {path} is a folder, expected a file")
    model = _bare(model)
    arguments = getattr(model, "arguments", None)
    kept = {**(arguments if isinstance(arguments, Mapping) else {}), **(config or {})}
    try:
        text = json.dumps(kept)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_checkpoint: config must be plain values: {error}") from None
    state = {k: x.detach().cpu().contiguous() for k, x in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save = _safetensors().save
        with replacing(path) as temporary:
            # save_file would make a file that only its owner may read.
            temporary.write_bytes(save(state, {"format": "pt", "config": text}))
    else:
        with replacing(path) as temporary:
            torch.save({"state_dict": state, "config": json.loads(text)}, temporary)
