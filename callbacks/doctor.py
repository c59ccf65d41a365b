"""The command `python -m lightning_curv doctor`: versions, and what can be logged for a model."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import lightning_curv
from lightning_curv.callbacks.curvature import CurvatureCallback
from lightning_curv.callbacks.import_names import imported

PACKAGES = ("torch", "pytorch-lightning", "lightning", "torchmetrics", "tensorboard")


def versions() -> str:
    """Of everything that matters, one per line."""
    lines = [f"lightning_curv {lightning_curv.__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "CPU"
    return "\n".join([*lines, f"device {device}"])


def find(path: str) -> Any:
    """What MODULE:NAME means."""
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise SystemExit(f"Expected MODULE:NAME, found {path!r}.")
    sys.path.insert(0, "")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(
            f"Expected MODULE:NAME that can be imported, found {path!r}: {error}."
        ) from error
    finally:
        sys.path.remove("")


def batch_of(model: Any, given: str | None) -> Any:
    """The batch that is given, or the first one of the model's own loader."""
    if given is not None:
        named = find(given)
        return named() if callable(named) else named
    try:
        return next(iter(model.train_dataloader()))
    except Exception as error:
        raise SystemExit(
            "Expected a model with a `train_dataloader`, or `--batch MODULE:NAME` (a batch or a "
            f"function that returns one), found neither: {error}."
        ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m lightning_curv",
        description="What CurvatureCallback logs for a model.",
    )
    parser.add_argument("command", choices=["doctor"])
    parser.add_argument(
        "model",
        nargs="?",
        help="MODULE:CLASS of a LightningModule, or of a function that returns one",
    )
    parser.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="an argument of the class",
    )
    parser.add_argument(
        "--batch",
        metavar="MODULE:NAME",
        help="a batch, or a function that returns one",
    )
    parser.add_argument(
        "--quantities",
        nargs="*",
        default=["default"],
        help="names, 'default' or 'all'",
    )
    given = parser.parse_args(arguments)
    print(versions())
    if given.model is None:
        return
    imported()
    # At the first sign only: JSON may hold others.
    settings = dict(entry.split("=", 1) for entry in given.init)
    model = find(given.model)(**{name: json.loads(value) for name, value in settings.items()})
    if given.quantities == ["all"]:
        quantities = "all"
    else:
        quantities = given.quantities
    print(CurvatureCallback.preview(model, batch_of(model, given.batch), quantities=quantities))
