"""What one process trains: an update, an evaluation, and the state between two updates.

An update is `grad_accum_steps` steps, each with a batch of its own:

    mix (mixup or cutmix) -> forward under autocast -> loss / steps -> backward
    ... -> clip the norm of all gradients -> optimizer -> moving average

The learning rate is a function of the number of updates, and random numbers are functions of
(seed, epoch, step, rank): neither is state. Left to keep are weights, average, optimizer, scaler
and counters.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import CommandError
from ..model import MambaVision
from ..variants import create_model
from . import parallel
from .data import STEP, WEIGHTS, seed_all
from .options import Options
from .parallel import Ranks, Wrapped

__all__ = ["Metrics", "Trainer", "build_model", "learning_rate"]


class Metrics:
    """Sums over images: loss, right at the first guess, right among five, number."""

    def __init__(self, device: torch.device):
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(4, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        """`losses` (n,) or their mean; images whose target is -1 do not count."""
        counted = targets >= 0
        guesses = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
        parts = [
            (losses * counted).sum(),
            (guesses[:, 0] & counted).sum(),
            (guesses.any(-1) & counted).sum(),
            counted.sum(),
        ]
        self.sums += torch.stack([part.to(self.sums) for part in parts])

    def means(self, ranks: Ranks | None = None) -> tuple[float, float, float]:
        """Loss, top-1, top-5; with `ranks`, over all processes."""
        sums = ranks.total(self.sums.clone()) if ranks else self.sums
        loss, first, five, count = sums.tolist()
        return loss / max(count, 1), first / max(count, 1), five / max(count, 1)


def build_model(options: Options, num_classes: int) -> MambaVision:
    """The model that the options describe, on the CPU; raises `CommandError`."""
    overrides: dict[str, Any] = {"num_classes": num_classes, "drop_rate": options.drop}
    if options.drop_path is not None:
        overrides["drop_path_rate"] = options.drop_path
    overrides |= options.model_kwargs
    checkpoint = options.initial_checkpoint or None
    try:
        return create_model(options.model, options.pretrained, checkpoint, **overrides)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise CommandError(str(error), 2) from None


def learning_rate(options: Options, ranks: int) -> float:
    """`lr`, or `lr_base` scaled from `lr_base_size` images per update to those there are."""
    if options.lr is not None:
        return options.lr
    share = options.batch_size * options.grad_accum_steps * ranks / options.lr_base_size
    root = any(kind in options.opt.lower() for kind in ("ada", "lamb"))
    return options.lr_base * (share**0.5 if root else share)


class Trainer:
    """Model, average, optimizer, schedule and scaler of this process.

    `steps` is the number of batches of an epoch, `updates` that of updates made so far.
    """

    def __init__(self, options: Options, num_classes: int, steps: int, ranks: Ranks):
        self.options, self.ranks, self.steps = options, ranks, steps
        self.updates = 0
        self.amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format

        seed_all(WEIGHTS, options.seed)
        model: Any = build_model(options, num_classes)
        model = model.to(device=ranks.device, memory_format=self.format)
        model.set_grad_checkpointing(options.grad_checkpointing)
        self.ema: Any = None
        if options.model_ema:
            # Copied before the wrappers, which do not like to be. One call for all tensors cannot
            # mix sharded parameters with whole statistics.
            self.ema = ModelEmaV3(
                model, options.model_ema_decay, use_warmup=True, foreach=not options.fsdp
            )
            if options.fsdp:
                Wrapped(self.ema.module, ranks, fsdp=True)
        self.wrapped = Wrapped(model, ranks, options.fsdp)
        self.model = model
        self.run = torch.compile(self.wrapped.run) if options.torchcompile else self.wrapped.run

        rate = learning_rate(options, ranks.count)
        eps = {} if options.opt_eps is None else {"eps": options.opt_eps}
        try:
            # Reads model.no_weight_decay().
            self.optimizer = create_optimizer_v2(
                model, options.opt, lr=rate, weight_decay=options.weight_decay,
                momentum=options.momentum, layer_decay=options.layer_decay, **eps,
            )  # fmt: skip
        except (ValueError, TypeError, AssertionError) as error:
            raise CommandError(f"--opt {options.opt}: {error}", 2) from None
        half = self.amp_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=half)
        if options.warmup_epochs >= options.epochs:
            raise CommandError(
                f"--warmup-epochs {options.warmup_epochs} must be below --epochs {options.epochs}",
                2,
            )
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, options.sched, num_epochs=options.epochs, min_lr=options.min_lr,
            warmup_lr=options.warmup_lr, warmup_epochs=options.warmup_epochs,
            cooldown_epochs=options.cooldown_epochs, step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )  # fmt: skip
        self.mix: Any = None
        if options.mixup or options.cutmix:
            self.mix = Mixup(
                options.mixup, options.cutmix, prob=options.mixup_prob,
                label_smoothing=options.smoothing, num_classes=num_classes,
            )  # fmt: skip
        self.train_metrics = Metrics(ranks.device)

    @property
    def updates_per_epoch(self) -> int:
        return -(-self.steps // self.options.grad_accum_steps)

    @property
    def rate(self) -> float:
        """The learning rate of the last update, of the layers where it is largest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def best_weights(self) -> nn.Module:
        """What is validated and exported: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.ranks.device.type, self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def _moved(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.ranks.device, memory_format=self.format, non_blocking=True)
        return images, targets.to(self.ranks.device, non_blocking=True)

    def gradients(
        self, batches: Iterable[tuple[Tensor, Tensor]], count: int, epoch: int, step: int
    ) -> None:
        """Adds up the mean gradients of `count` batches, of which the first is number `step`."""
        options = self.options
        smoothing = 0.0 if self.mix else options.smoothing
        for index, batch in enumerate(batches):
            images, targets = self._moved(*batch)
            seed_all(STEP, options.seed, epoch, step + index, self.ranks.rank)
            images, mixed = self.mix(images, targets) if self.mix else (images, targets)
            with self.wrapped.synchronising(index == count - 1):
                with self._autocast():
                    logits = self.run(images)
                loss = F.cross_entropy(logits.float(), mixed, label_smoothing=smoothing)
                self.scaler.scale(loss / count).backward()
            self.train_metrics.add(loss.detach(), logits.detach(), targets)

    def update(
        self, batches: Iterable[tuple[Tensor, Tensor]], count: int, epoch: int, step: int
    ) -> None:
        """One step of the optimizer, from `count` batches."""
        self.scheduler.step_update(self.updates)
        self.model.train()
        self.gradients(batches, count, epoch, step)
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.ema:
            self.ema.update(self.model, step=self.updates)

    def _average_statistics(self) -> None:
        for model in [self.model, *([self.ema.module] if self.ema else [])]:
            parallel.average_statistics(model, self.ranks)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        """Loss, top-1 and top-5 of `best_weights` over all processes' batches."""
        self._average_statistics()
        model = self.best_weights.eval()
        metrics = Metrics(self.ranks.device)
        for batch in batches:
            images, targets = self._moved(*batch)
            with self._autocast():
                logits = model(images)
            losses = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-1)
            metrics.add(losses, logits, targets)
        return metrics.means(self.ranks)

    def check_finite(self) -> None:
        """Raises FloatingPointError where the loss or a parameter is no number any more."""
        loss = self.train_metrics.means()[0]
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(f"the loss is {loss}")

    def check_weights(self) -> None:
        self.check_finite()
        for name, parameter in self.model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not local.isfinite().all():
                raise FloatingPointError(f"{name} holds values that are no finite numbers")

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on. Every process must call it."""
        fsdp = self.options.fsdp
        self._average_statistics()
        state = {
            "state_dict": parallel.model_state(self.model, fsdp),
            "optimizer": parallel.optimizer_state(self.model, self.optimizer, fsdp),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            "train_sums": self.ranks.total(self.train_metrics.sums.clone()).tolist(),
        }
        if self.ema:
            state["state_dict_ema"] = parallel.model_state(self.ema.module, fsdp)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; raises ValueError, RuntimeError or KeyError for what does not fit."""
        fsdp = self.options.fsdp
        parallel.load_model_state(self.model, state["state_dict"], fsdp)
        if self.ema:
            parallel.load_model_state(self.ema.module, state["state_dict_ema"], fsdp)
        parallel.load_optimizer_state(self.model, self.optimizer, state["optimizer"], fsdp)
        self.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
        # They are sums over all processes.
        if self.ranks.rank == 0:
            self.train_metrics.sums.copy_(torch.tensor(state["train_sums"], dtype=torch.float64))
