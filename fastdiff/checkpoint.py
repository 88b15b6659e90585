"""A checkpoint: one .safetensors file of weights, with everything needed to sample from them in its metadata. Never pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .files import atomic_write
from .sampler import Sampler
from .schedules import Schedule
from .solvers import PREDICTIONS
from .unet import UNet, UNetConfig
from .unet2d import UNet2D, UNet2DConfig

FORMAT = 1
# Networks by the "kind" in their settings; where there is none it is a UNet.
NETWORKS: dict[str, tuple[Any, Any]] = {"UNet": (UNetConfig, UNet), "UNet2DModel": (UNet2DConfig, UNet2D)}
ASSETS = Path(__file__).parent / "assets"


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or none that this version reads."""


@dataclass
class Checkpoint:
    """A network with what it was trained for. prediction: "epsilon", "v" or "x0". record: how it was trained, plain JSON values."""

    model: UNet | UNet2D
    schedule: Schedule
    prediction: str = "epsilon"
    classes: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.model.config.shape

    def sampler(self, **options: Any) -> Sampler:
        """A Sampler of this network; options as Sampler's."""
        return Sampler(
            self.model,
            self.schedule,
            shape=self.shape,
            prediction=self.prediction,
            num_classes=self.model.config.num_classes,
            **options,
        )

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Write the checkpoint, atomically; weights in `dtype` (fp16 halves the file at a relative error of 2^-11 a weight)."""
        about = {
            "format": FORMAT,
            "network": ({"kind": "UNet2DModel"} if isinstance(self.model, UNet2D) else {}) | self.model.config.config,
            "schedule": self.schedule.config,
            "prediction": self.prediction,
            "classes": list(self.classes),
            "record": self.record,
        }
        write_tensors(path, {k: v.to(dtype) for k, v in self.model.state_dict().items()}, about)


def load(source: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a file, or a shipped one by its name ("sprites"; a file called so is "./sprites"). fp32, on the CPU, in eval mode.

    CheckpointError, a ValueError, where there is none, or it is truncated, foreign, pickled or of another format version.
    """
    path = Path(source)
    if path.name == str(source) and (ASSETS / f"{source}.safetensors").is_file():
        path = ASSETS / f"{source}.safetensors"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in ASSETS.glob("*.safetensors") if p.stem != "classifier")) or "none"
        raise CheckpointError(f"no checkpoint {str(source)!r}: neither a .safetensors file nor a shipped one (shipped: {shipped})")
    tensors, about = read_tensors(path)
    if "format" not in about:
        raise CheckpointError(
            f"{path} has no fastdiff checkpoint in it (is it the state of a training run? then take checkpoint.safetensors)"
        )
    if about["format"] != FORMAT:
        raise CheckpointError(f"{path} has format version {about['format']!r}; this fastdiff reads version {FORMAT}")
    try:
        settings = dict(about["network"])
        settings_of, network = NETWORKS[settings.pop("kind", "UNet")]
        config = settings_of.from_config(settings)
        schedule = Schedule.from_config(about["schedule"])
        classes, prediction, record = about["classes"], about["prediction"], dict(about["record"])
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or len(set(classes)) != len(classes):
            raise ValueError("classes are no list of different names")
    except (KeyError, TypeError, ValueError, AttributeError, MemoryError) as e:
        raise CheckpointError(f"{path} has unreadable metadata: {type(e).__name__}: {e}") from None
    if prediction not in PREDICTIONS or len(classes) != (config.num_classes or 0):
        raise CheckpointError(
            f"{path} has unfitting metadata: prediction {prediction!r}, {len(classes)} class names for {config.num_classes}"
        )
    with torch.device("meta"):
        model = network(config)
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    given = {k: v.shape for k, v in tensors.items()}
    if wanted != given:
        odd = min(k for k in wanted | given if wanted.get(k) != given.get(k))
        raise CheckpointError(f"{path} does not fit its own network settings: {odd} is {given.get(odd)}, should be {wanted.get(odd)}")
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise CheckpointError(f"{path} holds weights that are no finite numbers, in {name}")
    model.to_empty(device="cpu")
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    model.to(memory_format=torch.channels_last)
    return Checkpoint(model.eval().requires_grad_(False), schedule, prediction, tuple(classes), record)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Named tensors and JSON metadata as one .safetensors file, atomically."""
    data = to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"fastdiff": json.dumps(about)})
    with atomic_write(path) as f:
        f.write(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `write_tensors`. CheckpointError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("fastdiff", "null"))
            if not isinstance(about, dict):
                raise CheckpointError(f"{path} is a .safetensors file without fastdiff's metadata; it was not written by fastdiff")
            return {k: file.get_tensor(k) for k in file.keys()}, about  # noqa: SIM118 (not a mapping)
    except SafetensorError as e:
        with open(path, "rb") as f:
            head = f.read(2)
        if head == b"PK" or head[:1] == b"\x80":  # torch.save's zip, or a bare pickle
            raise CheckpointError(
                f"{path} is a pickled checkpoint, which can run code when it is read; fastdiff reads .safetensors only"
            ) from None
        raise CheckpointError(
            f"{path} is not a whole .safetensors file (truncated, or of another kind): {str(e).splitlines()[0]}"
        ) from None
    except (json.JSONDecodeError, RecursionError):
        raise CheckpointError(f"{path} has metadata that is not JSON") from None
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from None
