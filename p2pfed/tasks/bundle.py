"""The network of a MONAI bundle as a task, read from the bundle's folder as it lies on disk.

`train.options.bundle` names the folder; `train.data` the hospital's cases, as for any segmentation.
Read are `configs/train.json` or `configs/inference.json` (JSON only) and `configs/metadata.json`:

* `network_def`: a class of `monai.networks.nets` out of `NETWORKS`, by its short or full name, with
  literal arguments. `$` expressions are Python and `@` references lead to them: both are refused,
  nothing of a bundle is ever evaluated.
* `Spacingd` and `ScaleIntensityRanged` of the preprocessing, if they are there with literal
  arguments: spacing and grey values.
* of the metadata: the number of channels, the names of the classes, the size of a patch.
* `models/model.safetensors`: the first weights. `model.pt` and `model.ts` are pickles or code and
  are never opened; a bundle that has only those is refused unless `train.options.weights` is
  "fresh".

What was read is part of the task's name, and so of its identity: hospitals with different bundles
find out before the first round.

Not here: the bundle's own training loop, losses and post-processing; the training room's are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import monai.networks.nets
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from p2pfed.errors import ConfigError
from p2pfed.tasks.segmentation import Plan, SegmentationTask
from p2pfed.tasks.volumes import Transform

__all__ = ["NETWORKS", "Bundle", "BundleTask", "read_bundle"]

# They map (N, C, X, Y, Z) to (N, classes, X, Y, Z), and none of them loads a file or a page.
NETWORKS = (
    "AttentionUnet",
    "BasicUNet",
    "DynUNet",
    "HighResNet",
    "SegResNet",
    "SwinUNETR",
    "UNETR",
    "UNet",
    "VNet",
)
_PACKAGE = "monai.networks.nets."
_PATCH = (96, 96, 96)
_PICKLES = ("model.pt", "model.ts", "model.pth")


@dataclass(frozen=True, slots=True)
class Bundle:
    """What of a bundle is used.

    Attributes:
        network: Name of the class in `monai.networks.nets`.
        arguments: Its arguments.
        plan: Classes, channels, patch and transform.
        weights: The first weights; None for fresh ones.
    """

    network: str
    arguments: Mapping[str, Any]
    plan: Plan
    weights: Path | None

    @property
    def digest(self) -> str:
        """Names network and plan, 16 hexadecimal digits; the weights are the run's matter."""
        facts = [self.network, self.arguments, asdict(self.plan)]
        text = json.dumps(facts, sort_keys=True).encode()
        return hashlib.blake2b(text, digest_size=8, person=b"p2pfed-bundle").hexdigest()


class BundleTask(SegmentationTask):
    """See the module docstring; options `bundle`, `weights` and those of `SegmentationTask`."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, bool], Bundle] = {}
        self._tensors: dict[Path, dict[str, Tensor]] = {}

    # mypy: the class's name is a constant elsewhere; here it follows from the options.
    @property
    def name(self) -> str:  # type: ignore[override]
        """What people call it: "bundle", and which one where `options` say so."""
        return f"bundle-{self.bundle().digest}" if "bundle" in self.options else "bundle"

    def bundle(self) -> Bundle:
        """The bundle that the options name.

        Raises:
            ConfigError: There is none, or something of it cannot be used.
        """
        place = self.options.get("bundle")
        if place is None:
            raise ConfigError("train.options.bundle is missing", "it names a MONAI bundle's folder")
        key = (str(place), self.options.get("weights") == "fresh")
        if key not in self._read:  # once: a folder that changes later is another bundle
            self._read[key] = read_bundle(Path(key[0]), fresh=key[1])
        return self._read[key]

    def _weights(self, path: Path) -> dict[str, Tensor]:
        """The first weights; read once, since a model is made in every round."""
        if path not in self._tensors:
            self._tensors[path] = safetensors.torch.load_file(path)
        return self._tensors[path]

    def plan(self) -> Plan:
        """As the bundle says."""
        return self.bundle().plan

    def model(self) -> nn.Module:
        """The bundle's network, with its weights where it has some as safetensors.

        Raises:
            ConfigError: The network does not take these arguments, or the weights do not fit.
        """
        bundle = self.bundle()
        try:
            model: nn.Module = getattr(monai.networks.nets, bundle.network)(**bundle.arguments)
        except Exception as error:  # a network raises what it likes
            raise ConfigError(
                f"the bundle's {bundle.network} cannot be made of its arguments",
                f"{type(error).__name__}: {error}",
            ) from error
        if bundle.weights is not None:
            try:
                model.load_state_dict(self._weights(bundle.weights))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise ConfigError(
                    f"{bundle.weights} does not fit the bundle's network", type(error).__name__
                ) from error
        return model


def read_bundle(folder: Path, *, fresh: bool = False) -> Bundle:
    """Read a bundle's folder.

    Args:
        folder: With `configs/` and perhaps `models/`.
        fresh: Whether the model starts from fresh weights whatever the bundle has.

    Raises:
        ConfigError: A file is missing or no JSON, the network is not one of `NETWORKS`, an argument
            is an expression, or the weights are pickled.
    """
    configs = folder / "configs"
    names = ("train.json", "inference.json")
    config = next((configs / name for name in names if (configs / name).is_file()), None)
    if config is None:
        raise ConfigError(
            f"{folder} is no MONAI bundle in JSON",
            "configs/train.json and configs/inference.json are missing",
            "write the bundle's YAML as JSON, if it has that",
        )
    facts = _json(config)
    network, arguments = _network(facts.get("network_def"), config)
    plan = _plan(_json(configs / "metadata.json"), _transform(facts), configs / "metadata.json")
    return Bundle(network, arguments, plan, None if fresh else _weights(folder / "models"))


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}", type(error).__name__) from None
    if not isinstance(facts, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return facts


def _network(definition: Any, path: Path) -> tuple[str, dict[str, Any]]:
    if not isinstance(definition, dict) or not isinstance(definition.get("_target_"), str):
        raise ConfigError(f"{path} has no network_def with a _target_")
    name = definition["_target_"].removeprefix(_PACKAGE).rpartition(".")[2]
    whole = definition["_target_"].startswith(_PACKAGE) or definition["_target_"] == name
    if not whole or name not in NETWORKS:
        raise ConfigError(
            f"{path}: network_def is none of the networks that are taken",
            f"those are {', '.join(NETWORKS)} of monai.networks.nets",
            "write a task of your own, as module:Class",
        )
    arguments = {k: v for k, v in definition.items() if k not in ("_target_", "_desc_")}
    if not _is_literal(arguments):
        raise ConfigError(
            f"{path}: network_def holds an expression or a reference",
            "what begins with $, @ or _ is Python or leads to it, and is never evaluated",
            "write its value in its place",
        )
    if arguments.get("deep_supervision"):
        raise ConfigError(f"{path}: network_def asks for deep supervision", "one output is trained")
    return name, arguments


def _is_literal(value: Any) -> bool:
    """Whether a JSON value has no expression, reference or nested object to build in it."""
    if isinstance(value, dict):
        return all(not key.startswith("_") and _is_literal(v) for key, v in value.items())
    if isinstance(value, list):
        return all(map(_is_literal, value))
    return not (isinstance(value, str) and value.startswith(("$", "@", "%")))


def _transform(facts: Mapping[str, Any]) -> Transform:
    """Spacing and window of the preprocessing, as far as they are literal."""
    spacing = window = None
    for step in _objects(facts):
        target = str(step.get("_target_", "")).rpartition(".")[2]
        if target == "Spacingd" and _are_numbers(step.get("pixdim"), 3):
            x, y, z = map(float, step["pixdim"])
            spacing = (x, y, z)
        ends: Any = [step.get("a_min"), step.get("a_max")]
        if target == "ScaleIntensityRanged" and _are_numbers(ends, 2) and ends[0] < ends[1]:
            window = (float(ends[0]), float(ends[1]))
    return Transform(spacing, window)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value, in the file's order."""
    if isinstance(value, dict):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        yield from _objects(part)


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )


def _plan(metadata: Mapping[str, Any], transform: Transform, path: Path) -> Plan:
    try:
        form = metadata["network_data_format"]
        image, output = form["inputs"]["image"], form["outputs"]["pred"]
        channels, count = int(image["num_channels"]), int(output["num_channels"])
        named = {int(k): str(v) for k, v in output.get("channel_def", {}).items()}
        size = image.get("spatial_shape")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not describe one image and one prediction", type(error).__name__
        ) from None
    if count < 2 or channels < 1:
        raise ConfigError(f"{path}: a background and a class at least are needed")
    patch = _PATCH
    if _are_numbers(size, 3):
        patch = (int(size[0]), int(size[1]), int(size[2]))
    classes = tuple(named.get(n, f"class_{n}").replace(" ", "_") for n in range(1, count))
    return Plan(classes=classes, channels=channels, patch=patch, transform=transform)


def _weights(models: Path) -> Path | None:
    path = models / "model.safetensors"
    if path.is_file():
        return path
    if any((models / name).exists() for name in _PICKLES):
        raise ConfigError(
            f"{models} holds weights that are pickled or code",
            "opening them could run anything",
            "write them as model.safetensors, or set train.options.weights = 'fresh'",
        )
    return None
