"""TensorBoard and Weights & Biases: a point per epoch for every column of results.csv.

Both write into the run folder: event files beside the checkpoints, and `wandb/`. A resumed run goes
on in the curves of the one before it. What wandb reads from the environment (WANDB_MODE=offline,
WANDB_PROJECT, WANDB_API_KEY, ...) holds.
"""

from importlib.util import find_spec
from types import TracebackType
from typing import Any

from ..errors import CommandError
from .folder import Row, RunFolder
from .options import Options

__all__ = ["Loggers", "check_extras"]

EXTRAS = {"log_tensorboard": "tensorboard", "log_wandb": "wandb"}


def check_extras(options: Options) -> None:
    for name, package in EXTRAS.items():
        if getattr(options, name) and not find_spec(package):
            flag, extra = name.replace("_", "-"), f"'mambavision-triton[{package}]'"
            raise CommandError(f"--{flag} needs the package {package}: pip install {extra}", 2)


class Loggers:
    """Those asked for, on the first process only; `epoch` is the number of epochs done before.

    Raises `CommandError` where one cannot start.
    """

    def __init__(self, options: Options, folder: RunFolder, epoch: int):
        self.board: Any = None
        self.wandb: Any = None
        if folder.main and options.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # An epoch that is repeated replaces what a killed run had of it.
            self.board = SummaryWriter(str(folder.path), purge_step=epoch + 1 if epoch else None)
        if folder.main and options.log_wandb:
            import wandb

            try:
                # A run that did not finish is continued: its id lies in dir/wandb.
                self.wandb = wandb.init(
                    dir=folder.path, name=folder.path.name, config=options.as_dict(), resume="auto"
                )
            except Exception as error:
                # No login, no network, no permission: each has an error of its own.
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise CommandError(f"--log-wandb: {reason}") from error

    def log(self, row: Row) -> None:
        epoch = int(row["epoch"])
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, epoch)
            self.board.flush()
        if self.wandb:
            self.wandb.log(row, step=epoch)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish(exit_code=int(error is not None))
