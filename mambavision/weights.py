"""Checkpoints in and out: files of any published layout into a model, and a model into a file.

A file is read as data only: torch.load with weights_only=True, which refuses pickled code; of all
classes only argparse.Namespace is let through, in which training scripts keep their arguments.
"""

import argparse
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
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


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise RuntimeError(
                f"{path}: reading safetensors needs the safetensors package: "
                "pip install 'mambavision-triton[weights]'"
            ) from None
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_checkpoint(path: Path) -> Any:
    """The content of a file, or one clear error."""
    if not path.exists():
        raise FileNotFoundError(f"load_checkpoint: no file {path}")
    if path.is_dir():
        raise ValueError(f"load_checkpoint: {path} is a folder, expected a file")
    try:
        return _read(path)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "weights_only" in str(error).lower():
            raise ValueError(
                f"load_checkpoint: {path} holds pickled objects that are no weights; such a file "
                "could run code and is refused"
            ) from error
        raise ValueError(f"load_checkpoint: {path} is damaged or truncated: {error}") from error
    except PermissionError as error:
        raise PermissionError(f"load_checkpoint: no permission to read {path}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if isinstance(error, RuntimeError) and "pip install" in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"load_checkpoint: {path} is damaged or truncated: {reason}") from error
    except Exception as error:
        # safetensors has an error type of its own, derived from Exception
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"load_checkpoint: {path} is damaged or truncated: {error}") from error


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


def load_checkpoint(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    strict: bool = True,
    num_classes: int | None = None,
) -> LoadReport:
    """Loads a checkpoint file into a model, and returns what did not match.

    `path` is a .safetensors file or one of torch.save (.pth, .pt, .pth.tar) that holds a state dict
    or a dict with one under state_dict_ema, model_ema, state_dict or model. Prefixes such as
    "module." that all names share are stripped. With `strict`, every name and shape must match, or
    ValueError lists the differences and the model stays as it was; without, what matches is loaded.

    `num_classes` says how many classes the model has: then a classifier of another size in the file
    is left out, and the model keeps its own.

    Raises FileNotFoundError, OSError, or ValueError for a damaged, truncated or unsafe file.

    >>> load_checkpoint(model, "mambavision_tiny_1k.pth.tar")  # doctest: +SKIP
    """
    state = _state_dict(_read_checkpoint(Path(path)), Path(path))
    own = model.state_dict()
    if num_classes is not None:
        if "head.weight" in own and own["head.weight"].shape[0] != num_classes:
            raise ValueError(
                f"load_checkpoint: num_classes = {num_classes}, but the model's classifier has "
                f"{own['head.weight'].shape[0]}"
            )
        classes = state["head.weight"].shape[0] if "head.weight" in state else num_classes
        if classes != num_classes:
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
    model.load_state_dict(fitting, strict=False)
    return report


@contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A temporary name beside `path` that becomes `path` at the end, or nothing at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield name
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def save_checkpoint(model: nn.Module, path: str | PathLike[str]) -> None:
    """Saves a model's weights: .safetensors, or .pth, .pt, .pth.tar for torch.save's format.

    The file appears whole or not at all. Raises ValueError for another ending, FileNotFoundError
    for a folder that is not there, RuntimeError where safetensors is not installed.

    >>> save_checkpoint(model, "model.safetensors")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_checkpoint: no folder {path.parent}")
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise RuntimeError(
                f"{path}: writing safetensors needs the safetensors package: "
                "pip install 'mambavision-triton[weights]'"
            ) from None
        with _replacing(path) as name:
            save_file(state, name)
    elif path.suffix in (".pth", ".pt", ".tar"):
        with _replacing(path) as name:
            torch.save({"state_dict": state}, name)
    else:
        raise ValueError(
            f"save_checkpoint: {path.name} must end in .safetensors, .pth, .pt or .pth.tar"
        )


def download_checkpoint(repository: str) -> str:
    """The path of a published model.safetensors, fetched by huggingface_hub or from its cache.

    Raises RuntimeError, in one line, where it cannot be had.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise RuntimeError(
            "pretrained=True needs the huggingface_hub package: "
            "pip install 'mambavision-triton[weights]'"
        ) from None
    warnings.warn(LICENCE, stacklevel=3)
    try:
        return hf_hub_download(repository, "model.safetensors")
    except Exception as error:
        # Whatever it was, offline, refused or gone: the way out is the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"the weights of {repository} cannot be fetched ({reason}); download model.safetensors "
            "elsewhere and pass checkpoint=PATH"
        ) from error
