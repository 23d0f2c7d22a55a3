"""Where weights come from: what the user names, and the local file that holds it.

    a path                      itself; of a folder, the model.safetensors inside
    "owner/name"                model.safetensors of that Hugging Face repository, from its cache
    "https://..."               downloaded once into torch.hub's cache

A path that exists is never taken for a repository.
"""

import hashlib
import os
import re
import warnings
from functools import cache
from http.client import HTTPException
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import torch

__all__ = ["MissingExtra", "Source", "locate"]

LICENCE = "the published MambaVision weights are under CC-BY-NC-SA-4.0: not for commercial use"
FILE = "model.safetensors"
_ENDINGS = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")
_PUBLISHED = "nvidia/mambavision-"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class MissingExtra(RuntimeError):
    """A package of the extra `weights` is not installed."""

    def __init__(self, package: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package}: pip install 'mambavision-triton[weights]'"
        )


class Source(NamedTuple):
    """A local file, and whether it is a download that can be had again."""

    path: Path
    downloaded: bool = False


@cache
def _name_licence() -> None:
    """Once in a process."""
    warnings.warn(LICENCE, stacklevel=2)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _from_url(url: str) -> Path:
    parts = urlsplit(url)
    # Half of all weights are called model.safetensors: the address is part of the name.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:10]}-{unquote(parts.path).split('/')[-1]}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, HTTPException, ValueError) as error:
            raise RuntimeError(
                f"{url} cannot be fetched ({_first_line(error)}): fetch it where there is a "
                "network and give the file's path instead"
            ) from error
    return path


def _from_repository(repository: str) -> Path:
    try:
        download = import_module("huggingface_hub").hf_hub_download
        offline = import_module("huggingface_hub.errors").LocalEntryNotFoundError
    except ImportError:
        raise MissingExtra("huggingface_hub", f"the repository {repository}") from None
    try:
        return Path(download(repository, FILE))
    except Exception as error:
        # Whatever it was, offline, refused or gone: the way out is the same.
        no_network = isinstance(error, offline)
        reason = "offline, and not in the cache" if no_network else _first_line(error)
        raise RuntimeError(
            f"the weights of {repository} cannot be fetched ({reason}): fetch {FILE} where there "
            "is a network and give its path instead, to create_model as checkpoint=PATH, to "
            "`mambavision train` as --initial-checkpoint, to eval and predict as --checkpoint"
        ) from error


def locate(source: str | PathLike[str]) -> Source:
    """The local file behind a path, a URL or the name of a Hugging Face repository.

    Whether that file exists is for its reader to find out. The licence of the published weights is
    named, once, before they are fetched. Raises RuntimeError, in one line, where nothing can be
    fetched.
    """
    text = source if isinstance(source, str) else ""
    if _PUBLISHED in text.lower() and not os.path.exists(text):
        _name_licence()
    if text.startswith("file:"):
        source = url2pathname(urlsplit(text).path)
    elif text.startswith(("http://", "https://")):
        return Source(_from_url(text), downloaded=True)
    path = Path(source)
    if path.is_dir() and (path / FILE).exists():
        return Source(path / FILE)
    if not path.exists() and not text.endswith(_ENDINGS) and _REPOSITORY.fullmatch(text):
        return Source(_from_repository(text))
    return Source(path)
