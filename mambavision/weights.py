"""Checkpoints in and out: files of any published layout into a model, and a model into a file.

A file is read as data only: torch.load with weights_only=True, which refuses pickled code; of all
classes only argparse.Namespace is let through, in which training scripts keep their arguments.
"""

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LoadReport", "download_checkpoint", "load_checkpoint", "save_checkpoint"]

# Where a file of nested dicts keeps the weights, best first: the moving average where there is one.
_HOMES = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "model.", "encoder.", "backbone.", "timm_model.")
_HEAD = ("head.weight", "head.bias")
LICENCE = "the published MambaVision weights are under CC-BY-NC-SA-4.0: not for commercial use"


class LoadReport(NamedTuple):
    """What did not match: names the file lacks, names the model lacks, and other shapes."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __str__(self) -> str:
        parts = []
        for kind, names in self._asdict().items():
            if names:
                more = f", and {len(names) - 8} more" if len(names) > 8 else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:8])}{more}")
        return "; ".join(parts) or "everything matches"


class MissingExtra(RuntimeError):
    """A package of the extra `weights` is not installed."""

    def __init__(self, package: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package}: pip install 'mambavision-triton[weights]'"
        )


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


def _bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper."""
    while inner := next((n for n in ("_orig_mod", "module") if list(model._modules) == [n]), None):
        model = model.get_submodule(inner)
    return model


def _read_checkpoint(path: Path) -> Any:
    """The content of a file, or one clear error."""
    if not path.exists():
        raise FileNotFoundError(f"load_checkpoint: no file {path}")
    if path.is_dir():
        raise ValueError(f"load_checkpoint: {path} is a folder, expected a file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"load_checkpoint: no permission to read {path}")
    try:
        return _read(path)
    except MissingExtra:
        raise
    except Exception as error:
        # Damaged bytes raise whatever the reader stumbled over: a dozen types are known.
        reason = str(error)
        refused = re.search(r"[Uu]nsupported global: (?:GLOBAL )?(\S+)", reason)
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"load_checkpoint: {path} is refused: it holds a pickled {refused[1]}, which is no "
                "weight and could run code"
            ) from error
        # torch.load's advice, some fifteen lines, ends in what went wrong.
        reason = reason.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise ValueError(
            f"load_checkpoint: {path} is damaged or truncated: {reason.splitlines()[0]}"
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


def load_checkpoint(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    strict: bool = True,
    num_classes: int | None = None,
) -> LoadReport:
    """Loads a checkpoint file into a model, and returns what did not match.

    `path` is a .safetensors file or one of torch.save (.pth, .pt, .pth.tar) that holds a state dict
    or a dict with one under the first of state_dict_ema, model_ema, state_dict and model that is
    there. Prefixes such as "module." that all names share are stripped. With `strict`, every name
    and shape must match, or ValueError lists the differences and the model stays as it was;
    without, what matches is loaded, at least one tensor.

    `num_classes`, the model's number of classes, asks for a file with another classifier, or none,
    to be taken as well: the model then keeps its own.

    Raises FileNotFoundError, PermissionError, ValueError for a damaged, truncated, unsafe or
    misfitting file, RuntimeError where safetensors is not installed.

    >>> load_checkpoint(model, "mambavision_tiny_1k.pth.tar")  # doctest: +SKIP
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
    state = _state_dict(_read_checkpoint(Path(path)), Path(path))
    if num_classes is not None and _shapes(state) != _shapes(own):
        state = {k: v for k, v in state.items() if k not in _HEAD}
        state |= {k: own[k] for k in _HEAD if k in own}
    report = LoadReport(
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        misshapen=[
            f"{name} {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ],
    )
    if strict and any(report):
        raise ValueError(
            f"load_checkpoint: {path} does not fit this {type(model).__name__}: {report}"
        )
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise ValueError(
            f"load_checkpoint: nothing in {path} fits this {type(model).__name__}: {report}"
        )
    model.load_state_dict(fitting, strict=False)
    return report


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` at the end, or nothing at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(model: nn.Module, path: str | PathLike[str]) -> None:
    """Saves a model's weights: .safetensors, or .pth, .pt, .pth.tar for torch.save's format.

    Wrappers such as DistributedDataParallel leave no trace in the names. The file appears whole or
    not at all. Raises ValueError for another ending, FileNotFoundError for a folder that is not
    there, RuntimeError where safetensors is not installed.

    >>> save_checkpoint(model, "model.safetensors")  # doctest: +SKIP
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
    state = {k: x.detach().cpu().contiguous() for k, x in _bare(model).state_dict().items()}
    if path.suffix == ".safetensors":
        save_file = _safetensors().save_file
        with _replacing(path) as temporary:
            save_file(state, temporary)
    else:
        with _replacing(path) as temporary:
            torch.save({"state_dict": state}, temporary)


def download_checkpoint(repository: str) -> str:
    """The path of a published model.safetensors, fetched by huggingface_hub or from its cache.

    Raises RuntimeError, in one line, where it cannot be had.
    """
    try:
        download = import_module("huggingface_hub").hf_hub_download
    except ImportError:
        raise MissingExtra("huggingface_hub", "pretrained=True") from None
    warnings.warn(LICENCE, stacklevel=3)
    try:
        return download(repository, "model.safetensors")
    except Exception as error:
        # Whatever it was, offline, refused or gone: the way out is the same.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"the weights of {repository} cannot be fetched ({reason}); download model.safetensors "
            "elsewhere and pass checkpoint=PATH"
        ) from error
