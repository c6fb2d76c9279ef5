"""A MONAI bundle as a task: what is read, and that nothing of it is ever run."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from imaging_files import phantom_folder, write_bundle

from p2pfed.errors import ConfigError
from p2pfed.tasks.bundle import NETWORKS, BundleTask, read_bundle
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import load_task, task_id
from p2pfed.training.vector import check_no_buffers

UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3}
SMALL = UNET | {"channels": [4, 8], "strides": [2], "norm": "instance"}


def task_of(folder, **options):
    return load_task("bundle", {"bundle": str(folder)} | options)


def test_network_classes_and_transform_come_from_the_bundle(tmp_path):
    bundle = read_bundle(write_bundle(tmp_path))
    assert bundle.network == "UNet"
    assert bundle.plan.classes == ("liver", "left_lobe")
    assert bundle.plan.patch == (32, 32, 32)
    assert bundle.plan.transform.spacing == (1.5, 1.5, 2.0)
    assert bundle.plan.transform.window == (-57.0, 164.0)
    assert bundle.weights is None


@pytest.mark.slow
def test_a_bundles_network_trains_and_is_judged(tmp_path):
    task = task_of(write_bundle(tmp_path / "bundle"))
    check_no_buffers(task.model())
    data = task.data(phantom_folder(tmp_path / "data", 8), {})
    start = initial_vector(task, seed=0)
    trained = train_local(
        task, data.train, start, steps=2, learning_rate=0.01, batch_size=2, seed=0
    ).vector
    assert (trained != start).any()
    assert "dice" in evaluate(task, trained, data.test)


def test_the_full_name_of_a_network_is_taken_too(tmp_path):
    for name in ("monai.networks.nets.UNet", "monai.networks.nets.unet.UNet"):
        folder = write_bundle(tmp_path, SMALL | {"_target_": name})
        assert read_bundle(folder).network == "UNet"


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "torch.nn.Linear",
        "monai.networks.nets.EfficientNetBN",
        "evil.UNet",
        "monai.networks.nets.unet.__builtins__",
        "UNet.",
    ],
)
def test_other_classes_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="none of the networks"):
        read_bundle(write_bundle(tmp_path, SMALL | {"_target_": name}))


@pytest.mark.parametrize(
    "argument",
    [
        {"channels": "$[4, 8]"},
        {"channels": "@widths"},
        {"channels": ["$__import__('os').system('true')"]},
        {"act": {"_target_": "os.system", "command": "true"}},
        {"norm": ["instance", {"affine": "$True"}]},
        {"_requires_": "$import os"},
        {"channels": "%other.json::widths"},
    ],
)
def test_expressions_and_references_are_never_evaluated(tmp_path, argument):
    with pytest.raises(ConfigError, match="expression or a reference"):
        read_bundle(write_bundle(tmp_path, SMALL | argument))


@pytest.mark.parametrize("network", [None, "UNet", {"spatial_dims": 3}, {"_target_": 7}])
def test_a_bundle_without_a_network_definition_is_refused(tmp_path, network):
    folder = write_bundle(tmp_path)
    (folder / "configs" / "train.json").write_text(json.dumps({"network_def": network}))
    with pytest.raises(ConfigError, match="no network_def"):
        read_bundle(folder)


def test_deep_supervision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="deep supervision"):
        read_bundle(write_bundle(tmp_path, SMALL | {"deep_supervision": True}))


def test_arguments_that_the_network_does_not_take_are_told(tmp_path):
    task = task_of(write_bundle(tmp_path, SMALL | {"depth": 3}))
    with pytest.raises(ConfigError, match="UNet cannot be made"):
        task.model()


def test_inference_json_does_where_there_is_no_train_json(tmp_path):
    folder = write_bundle(tmp_path)
    (folder / "configs" / "train.json").rename(folder / "configs" / "inference.json")
    assert read_bundle(folder).network == "UNet"
    (folder / "configs" / "inference.json").rename(folder / "configs" / "inference.yaml")
    with pytest.raises(ConfigError, match="no MONAI bundle in JSON"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"network_data_format": {}}, "does not describe"),
        ({"network_data_format": 3}, "does not describe"),
        (
            {
                "network_data_format": {
                    "inputs": {"image": {"num_channels": 1}},
                    "outputs": {"pred": {"num_channels": 1}},
                }
            },
            "a background and a class",
        ),
    ],
)
def test_metadata_that_says_too_little_is_refused(tmp_path, metadata, text):
    with pytest.raises(ConfigError, match=text):
        read_bundle(write_bundle(tmp_path, **metadata))


def test_files_that_are_no_json_are_refused(tmp_path):
    folder = write_bundle(tmp_path)
    (folder / "configs" / "metadata.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        read_bundle(folder)
    (folder / "configs" / "train.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["model.pt", "model.ts"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path, name):
    folder = write_bundle(tmp_path)
    (folder / "models").mkdir()
    (folder / "models" / name).write_bytes(b"whatever it is")
    with pytest.raises(ConfigError, match="pickled or code"):
        task_of(folder).model()
    assert isinstance(task_of(folder, weights="fresh").model(), torch.nn.Module)


def test_weights_come_from_safetensors(tmp_path):
    folder = write_bundle(tmp_path)
    state = task_of(folder).model().state_dict()
    (folder / "models").mkdir()
    (folder / "models" / "model.pt").write_bytes(b"beside it, not opened")
    path = folder / "models" / "model.safetensors"
    safetensors.torch.save_file({n: torch.full_like(t, 0.25) for n, t in state.items()}, path)
    assert (initial_vector(task_of(folder), seed=0) == 0.25).all()
    assert not (initial_vector(task_of(folder, weights="fresh"), seed=0) == 0.25).all()
    safetensors.torch.save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="does not fit"):
        task_of(folder).model()
    path.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="does not fit"):
        task_of(folder).model()


def test_hospitals_with_other_bundles_have_other_tasks(tmp_path):
    one = write_bundle(tmp_path / "one")
    same = write_bundle(tmp_path / "same")
    other = write_bundle(tmp_path / "other")
    config = other / "configs" / "train.json"
    config.write_text(config.read_text().replace("164", "200"))  # grey values alone
    ids = [task_id(task_of(folder)) for folder in (one, same, other)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_a_bundle_must_be_named():
    task = BundleTask()
    assert task.name == "bundle"
    with pytest.raises(ConfigError, match=r"train\.options\.bundle"):
        task.model()


def test_every_network_of_the_list_is_there():
    import monai.networks.nets

    assert all(issubclass(getattr(monai.networks.nets, n), torch.nn.Module) for n in NETWORKS)
