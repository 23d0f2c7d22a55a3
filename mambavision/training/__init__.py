"""Training: `mambavision train`, and from Python `train(Options(data="digits", preset="digits"))`.

    options     what can be set: fields, presets, YAML, command line
    data        image folders and the digits, seeded augmentation, a sampler that starts anywhere
    parallel    devices, several processes, DDP and FSDP
    engine      model, optimizer, schedule, moving average: one update, one evaluation
    folder      what a run leaves behind, written whole or not at all
    interrupts  Ctrl-C
    loggers     TensorBoard and Weights & Biases
    loop        epochs, checkpoints, resuming

Ours is what keeps a run repeatable; the rest is timm's (augmentation, mixing, losses, optimizers,
schedules, moving average) and torch's (devices, DDP, FSDP, autocast, scaler). accelerate was left
out: its `save_state` writes a folder of files, which would need code of our own to appear whole or
not at all, and its data loader draws its own seeds; without it, wrapping a model is two calls.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import train as train
    from .options import Options as Options

__all__ = ["Options", "train"]


def __getattr__(name: str) -> Any:
    homes = {"Options": "options", "train": "loop"}
    if name in homes:
        return getattr(import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
