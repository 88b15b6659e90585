"""A checkpoint: one .safetensors file of weights, with everything needed to sample from them in its metadata. Never pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .data import MAX_NAME, odd_name, one_line
from .files import atomic_write, open_regular, parse_json, read_regular
from .sampler import Sampler
from .schedules import Schedule
from .solvers import PREDICTIONS
from .unet import UNet, UNetConfig
from .unet2d import UNet2D, UNet2DConfig

FORMAT = 1
# Networks by the "kind" in their settings; where there is none it is a UNet.
NETWORKS: dict[str, tuple[Any, Any]] = {"UNet": (UNetConfig, UNet), "UNet2DModel": (UNet2DConfig, UNet2D)}
ASSETS = Path(__file__).parent / "assets"
# What is read. Nothing is allocated for what a file says of itself before it has been compared with these and with the file's size.
MAX_FILE = 4 << 30  # bytes
MAX_HEADER = 16 << 20  # bytes; also of a JSON file
MAX_TENSORS = 1 << 14
MAX_DIMENSIONS = 8
# What tensors may be, by safetensors' names.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip
CHUNK = 1 << 20  # weights whose being finite is looked at in one go


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or none that this version reads: one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass
class Checkpoint:
    """A network with what it was trained for. prediction: "epsilon", "v" or "x0". record: how it was trained, plain JSON values.

    digest: sha256 (hex) of the file that it was loaded from, of the very bytes that were read; "" for one that comes from no file. clip: the bound
    of x_0 that its samplers have unless they are told another, None for none.
    """

    model: UNet | UNet2D
    schedule: Schedule
    prediction: str = "epsilon"
    classes: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    digest: str = field(default="", compare=False)
    clip: float | None = field(default=1.0, kw_only=True)

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
            **{"clip": self.clip} | options,
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
        if self.clip != 1:
            about["clip"] = self.clip
        write_tensors(path, {k: v.to(dtype) for k, v in self.model.state_dict().items()}, about)


def shipped() -> tuple[str, ...]:
    """Names of the checkpoints that come with the package: `load` takes them in place of a file, and commands as --checkpoint."""
    return tuple(sorted(p.stem for p in ASSETS.glob("*.safetensors") if p.stem != "classifier"))


def load(source: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a file, or a shipped one by its name ("sprites"; a file called so is "./sprites"). fp32, on the CPU, in eval mode.

    CheckpointError, a ValueError, where there is none, or it is truncated, foreign, pickled or of another format version. Nothing is unpickled.

    It is refused before it is read where it is larger than 4 GiB, its header than 16 MiB, or there are more than 2^18 values or 32 levels of JSON,
    2^14 tensors, or a network or schedule past the limits of `UNetConfig` and `Schedule`. Memory: at most 6 times the file's size, for fp16 becomes
    fp32, and 512 MiB.
    """
    path = Path(source)
    if str(source) in shipped():
        path = ASSETS / f"{source}.safetensors"
    if not os.path.isfile(path):  # unlike Path.is_file, never raises
        raise CheckpointError(
            f"no checkpoint {str(source)!r}: neither a .safetensors file nor a shipped one (shipped: {', '.join(shipped()) or 'none'})"
        )
    tensors, about, digest = _read(path)
    if "format" not in about:
        raise CheckpointError(
            f"{path} has no fastdiff checkpoint in it (is it the state of a training run? then take checkpoint.safetensors)"
        )
    if type(about["format"]) is not int or about["format"] != FORMAT:
        raise CheckpointError(f"{path} has format version {about['format']!r}; this fastdiff reads version {FORMAT}")
    try:
        settings = dict(about["network"])
        settings_of, network = NETWORKS[settings.pop("kind", "UNet")]
        config = settings_of.from_config(settings)
        schedule = Schedule.from_config(about["schedule"])
        classes, prediction, record = about["classes"], about["prediction"], dict(about["record"])
        clip = about.get("clip", 1.0)
        if clip is not None and not (type(clip) in (int, float) and 0 < clip < math.inf):
            raise ValueError(f"clip is {clip!r}, neither a positive number nor null")
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or len(set(classes)) != len(classes):
            raise ValueError("classes are no list of different names")
        if (odd := odd_name(classes)) is not None:
            raise ValueError(odd)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError) as e:
        raise CheckpointError(f"{path} has unreadable metadata: {type(e).__name__}: {e}") from None
    if prediction not in PREDICTIONS or len(classes) != (config.num_classes or 0):
        raise CheckpointError(
            f"{path} has unfitting metadata: prediction {prediction!r}, {len(classes)} class names for {config.num_classes}"
        )
    with torch.device("meta"):
        model = network(config)
    try:
        fill(model, tensors)
    except ValueError as e:
        raise CheckpointError(f"{path} {e}") from None
    model.to(memory_format=torch.channels_last)
    return Checkpoint(model, schedule, prediction, tuple(classes), record, digest, clip=clip)


def fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a network on the meta device a file's tensors: fp32, on the CPU, in eval mode. ValueError, whose subject is the file, if they do not fit.

    A buffer that counts (batch norm's) and is not in the file starts at 0.
    """
    wanted = {k: v.shape for k, v in model.state_dict().items() if v.is_floating_point()}
    given = {k: v.shape for k, v in tensors.items()}
    if wanted != given:
        odd = min(k for k in wanted | given if wanted.get(k) != given.get(k))
        raise ValueError(f"does not fit its own network settings: {odd} is {given.get(odd)}, should be {wanted.get(odd)}")
    for name, value in tensors.items():
        if not value.is_floating_point() or not all(part.float().isfinite().all() for part in torch.split(value.reshape(-1), CHUNK)):
            raise ValueError(f"holds weights that are no finite numbers, in {name}")
    counts = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in model.state_dict().items() if not v.is_floating_point()}
    # Assigned: to make room for them on the CPU by `to_empty` imports torch's compiler and takes a second.
    model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in tensors.items()} | counts, assign=True)
    model.eval().requires_grad_(False)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Named tensors and JSON metadata as one .safetensors file, atomically."""
    data = to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"fastdiff": json.dumps(about)})
    with atomic_write(path) as f:
        f.write(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `write_tensors`. CheckpointError for anything else, within the limits of `load`."""
    return _read(path)[:2]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    tensors, metadata, digest = read_safetensors(path)
    try:
        about = parse_json(metadata.get("fastdiff", "null"))
    except ValueError as e:
        raise CheckpointError(f"{path} has metadata that is not JSON, or more than is read: {e}") from None
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} is a .safetensors file without fastdiff's metadata; it was not written by fastdiff")
    return tensors, about, digest


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """The tensors and metadata of any .safetensors file, and the sha256 (hex) of its bytes. CheckpointError, within the limits of `load`.

    The file is read once, into memory that the tensors share, so that they are what the digest is of whatever happens to the file.
    """
    head = header = b""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            if size > MAX_FILE or length > MAX_HEADER:
                raise ValueError(f"{size} bytes, {length} of them header, and at most {MAX_FILE} and {MAX_HEADER} are read")
            header = file.read(length)
            places, metadata = _places(header, size - 8 - length)
            content = bytearray(size)
            content[: 8 + length] = head + header
            if file.readinto(memoryview(content)[8 + length :]) != size - 8 - length or file.read(1):
                raise ValueError("its size changed while it was read")
    except ValueError as e:
        # torch.save's zip, or a bare pickle; a header's length may begin so, too
        if (head[:2] == b"PK" or head[:1] == b"\x80") and header[:1] != b"{":
            raise CheckpointError(
                f"{path} is a pickled checkpoint, which can run code when it is read; fastdiff reads .safetensors only"
            ) from None
        raise CheckpointError(f"{path} is not a whole .safetensors file (truncated, or of another kind): {e}") from None
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from None
    except MemoryError:
        raise CheckpointError(f"cannot read {path}: there is no memory for its {size} bytes") from None
    tensors = {name: _tensor(content, dtype, shape, 8 + length + begin) for name, (dtype, shape, begin) in places.items()}
    return tensors, metadata, hashlib.sha256(content).hexdigest()


def _places(header: bytes, room: int) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], dict[str, str]]:
    """A .safetensors header's tensors, as dtype, shape and place in the `room` bytes that follow it, and metadata. ValueError for any other."""
    entries = parse_json(header.decode())
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no object of strings")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, and at most {MAX_TENSORS} are read")
    places, spans = {}, []
    for name, entry in entries.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"a tensor's name has more than {MAX_NAME} characters, or ones that cannot be printed: {name[:20]!r}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is no tensor")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name} is of the dtype {dtype!r}; read are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(v) is int and 0 <= v <= MAX_FILE for v in shape):
            raise ValueError(f"{name} is of no shape, or one of more than {MAX_DIMENSIONS} dimensions")
        if not isinstance(span, list) or len(span) != 2 or not all(type(v) is int and 0 <= v <= room for v in span):
            raise ValueError(f"{name} lies outside the file")
        if span[1] - span[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name} has {span[1] - span[0]} bytes for a shape of {shape} and {dtype}")
        places[name] = DTYPES[dtype], shape, span[0]
        spans.append(span)
    # As safetensors has it: one after another, without gaps, so that no byte is two tensors' and none is nobody's.
    spans.sort()
    if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), room]:
        raise ValueError("its tensors overlap or leave gaps")
    return places, metadata


def _tensor(content: bytearray, dtype: torch.dtype, shape: list[int], place: int) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if place % dtype.itemsize:  # not aligned, as vector instructions need it
        content, place = content[place : place + count * dtype.itemsize], 0
    return torch.frombuffer(content, dtype=dtype, count=count, offset=place).reshape(shape)


def read_json(path: Path) -> Any:
    """What a JSON file says, within the limits of `load`. ValueError, or OSError where it cannot be read."""
    return parse_json(read_regular(path, MAX_HEADER).decode())
