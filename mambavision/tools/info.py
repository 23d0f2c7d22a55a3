"""`mambavision info`: parameters, operations and memory of a model, stage by stage."""

import argparse
import json
from typing import Any

import torch

from ..errors import CommandError
from ..flops import Cost, count
from ..published import VARIANTS
from .source import read_model
from .text import amount, table

__all__ = ["PUBLISHED_GMACS", "run"]

# Billions of multiply-accumulates at 224 pixels as published, arXiv 2407.08083: without the
# products inside attention.
PUBLISHED_GMACS = {
    "mamba_vision_T": 4.4,
    "mamba_vision_T2": 5.1,
    "mamba_vision_S": 7.5,
    "mamba_vision_B": 15.0,
    "mamba_vision_L": 34.9,
    "mamba_vision_L2": 37.5,
}


def _size(options: argparse.Namespace, default: int) -> tuple[int, int]:
    sizes = options.img_size or [default]
    if len(sizes) > 2:
        raise CommandError(f"--img-size takes one number or height and width, got {len(sizes)}", 2)
    return sizes[0], sizes[-1]


def _published(name: str, size: tuple[int, int]) -> float | None:
    return PUBLISHED_GMACS.get(name) if size == (224, 224) else None


def _stages(cost: Cost) -> str:
    rows = [("part", "holds", "output", "parameters", "MACs", "attention", "kept")]
    rows += [
        (
            part.name,
            part.holds,
            " x ".join(map(str, part.output)),
            f"{part.parameters:,}",
            amount(part.macs),
            amount(part.attention_macs) if part.attention_macs else "",
            amount(part.kept_bytes, "B"),
        )
        for part in cost.parts
    ]
    return table(rows, "lllrrrr")


def _report(name: str, size: tuple[int, int], options: argparse.Namespace, cost: Cost) -> str:
    batch, itemsize = options.batch_size, getattr(torch, options.dtype).itemsize
    known = _published(name, size) if batch == 1 else None
    beside = f"; published: {known} G" if known else ""
    facts = [
        ("parameters", f"{cost.parameters:,}", amount(cost.parameters * itemsize, "B")),
        ("MACs", amount(cost.macs, digits=4), f"without attention products{beside}"),
        ("attention", amount(cost.attention_macs), "MACs of its products, q k^T and p v"),
        ("FLOPs", amount(cost.flops, digits=4), "two per MAC, attention products included"),
        ("fused mixers", amount(cost.fused_macs), "MACs, counted in the above"),
        ("kept", amount(cost.kept_bytes, "B"), "activations for the backward pass"),
        ("peak", amount(cost.peak_bytes, "B"), "activations alive at once in inference"),
    ]
    plural = "image" if batch == 1 else "images"
    return "\n".join(
        [
            f"{name}: {batch} {plural} of {size[0]} x {size[1]} in {options.dtype}",
            "",
            table(facts, "lrl"),
            "",
            _stages(cost),
            "",
            "Counted: convolutions, matrix products, the scan's products; not exp, norms and other",
            "elementwise work. MACs leave the attention products out, as the published tables do.",
            "Memory is a CPU's, with the PyTorch backend's states, and without parameters.",
        ]
    )


def _as_json(name: str, size: tuple[int, int], options: argparse.Namespace, cost: Cost) -> Any:
    return {
        "model": name,
        "img_size": list(size),
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "published_gmacs": _published(name, size),
        **cost._asdict(),
        "parts": [part._asdict() for part in cost.parts],
    }


def _overview(found: list[tuple[str, tuple[int, int], Cost]]) -> str:
    rows = [("model", "input", "parameters", "GMACs", "published", "attention", "kept", "peak")]
    for name, size, cost in found:
        known = _published(name, size)
        rows.append(
            (
                name,
                f"{size[0]} x {size[1]}",
                f"{cost.parameters:,}",
                f"{cost.macs / 1e9:.2f}",
                str(known or ""),
                f"{cost.attention_macs / 1e9:.2f}",
                amount(cost.kept_bytes, "B"),
                amount(cost.peak_bytes, "B"),
            )
        )
    note = (
        "GMACs: billions of multiply-accumulates without attention products, which the column\n"
        "attention has. kept: activations that training keeps for the backward pass; peak: those\n"
        "alive at once in inference."
    )
    return f"{table(rows, 'lrrrrrrr')}\n\n{note}"


def run(options: argparse.Namespace) -> int:
    found = []
    sources = list(VARIANTS) if options.model == "all" else [options.model]
    for source in sources:
        model, name, default = read_model(source)
        size = _size(options, default)
        cost = count(model.to(getattr(torch, options.dtype)), *size, options.batch_size)
        found.append((name, size, cost))
    if options.json:
        content = [_as_json(name, size, options, cost) for name, size, cost in found]
        print(json.dumps(content if options.model == "all" else content[0], indent=2))
    elif options.model == "all":
        print(_overview(found))
    else:
        print(_report(*found[0][:2], options, found[0][2]))
    return 0
