"""The written repository: whole, self-contained, and one config for all versions of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plans.bundle import load_bundle, save_bundle
from plans.errors import ArrowheadError
from tests.trt_runtime.conftest import Made
from trt_runtime.bundles import model_source
from trt_runtime.triton.repository import Settings, versions, write_model

Bundles = Callable[[str], Made]


def test_a_version_holds_all_it_needs(torch_bundle: Bundles, tmp_path: Path) -> None:
    source, bundle, _ = torch_bundle("sd3")
    before = (source / "bundle.json").read_text()
    folder = write_model(source, tmp_path)
    placed = folder / "1" / "bundle"
    assert os.path.samefile(placed / bundle.weights_file, source / bundle.weights_file)
    assert Path(model_source(load_bundle(placed), placed)) == (folder / "1" / "checkpoint")
    parts = {path.name for path in (folder / "1" / "checkpoint").iterdir()}
    assert parts == {"model_index.json", "scheduler", "vae"}  # the transformer is the bundle
    assert (source / "bundle.json").read_text() == before  # linked files are not written to
    assert not list(tmp_path.rglob(".writing-*"))


def test_backend_torch_takes_the_transformer_along(torch_bundle: Bundles, tmp_path: Path) -> None:
    folder = write_model(torch_bundle("sd3")[0], tmp_path, settings=Settings(backend="torch"))
    weights = folder / "1" / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.is_file()


def test_a_hub_id_stays_one(torch_bundle: Bundles, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "source"
    shutil.copytree(torch_bundle("sd3")[0], source)
    bundle = load_bundle(source)
    save_bundle(replace(bundle, model={**bundle.model, "source": "some/model"}), source)
    folder = write_model(source, tmp_path / "models")
    assert load_bundle(folder / "1" / "bundle").model["source"] == "some/model"
    assert not (folder / "1" / "checkpoint").exists()


@pytest.mark.parametrize("kind", ["picture", "stream"])
@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_config(kind: str, model: str, torch_bundle: Bundles, tmp_path: Path) -> None:
    settings = Settings(instances=3, device="cuda", queue=9, queue_seconds=1.5, warmup=False)
    folder = write_model(
        torch_bundle(model)[0], tmp_path, name=f"m-{kind}", kind=kind, settings=settings
    )
    text = (folder / "config.pbtxt").read_text()
    assert f'name: "m-{kind}"' in text and "max_batch_size: 1\n" in text
    assert "instance_group [{ count: 3 kind: KIND_GPU }]" in text
    assert "default_timeout_microseconds: 1500000\n" in text and "max_queue_size: 9\n" in text
    assert ("decoupled: true" in text) == (kind == "stream")
    assert ('"PREVIEW_EVERY"' in text) == (kind == "stream")
    assert ('"NEGATIVE_PROMPT"' in text) == (model == "sd3")
    assert 'name: "PIXELS" data_type: TYPE_UINT8 dims: [64, 96, 3]' in text
    assert "model_warmup" not in text
    # Nothing to gather in a call of one picture, whatever the setting.
    assert "max_queue_delay_microseconds: 0\n" in text


def test_versions_are_added_and_replaced(torch_bundle: Bundles, tmp_path: Path) -> None:
    source = torch_bundle("sd3")[0]
    folder = write_model(source, tmp_path)
    (folder / "1" / "stale").touch()
    write_model(source, tmp_path, version=12)
    assert versions(folder) == [1, 12] and (folder / "1" / "stale").exists()
    write_model(source, tmp_path)
    assert versions(folder) == [1, 12] and not (folder / "1" / "stale").exists()


def test_versions_share_one_config(torch_bundle: Bundles, tmp_path: Path) -> None:
    write_model(torch_bundle("sd3")[0], tmp_path)
    before = (tmp_path / "arrowhead" / "config.pbtxt").read_text()
    with pytest.raises(ArrowheadError, match="version 2 .* got another picture size.*--name"):
        write_model(torch_bundle("flux")[0], tmp_path, version=2)
    assert versions(tmp_path / "arrowhead") == [1]
    assert (tmp_path / "arrowhead" / "config.pbtxt").read_text() == before


@pytest.mark.parametrize(
    "wrong", [{"name": "a/b"}, {"name": ""}, {"kind": "video"}, {"version": 0}]
)
def test_wrong_arguments(wrong: dict[str, object], torch_bundle: Bundles, tmp_path: Path) -> None:
    with pytest.raises(ArrowheadError, match="Triton model"):
        write_model(torch_bundle("sd3")[0], tmp_path, **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"instances": 0}, {"threads": -1}, {"queue": -1}, {"queue_seconds": 0.0}, {"backend": "tpu"}],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArrowheadError, match=f"{next(iter(wrong))}.* Fix: "):
        Settings(**wrong)


def test_each_line_of_the_config_says_what_a_tensor_is(
    torch_bundle: Bundles, tmp_path: Path
) -> None:
    folder = write_model(torch_bundle("sd3")[0], tmp_path)
    lines = (folder / "config.pbtxt").read_text().splitlines()
    tensors = [line for line in lines if re.match("(in|out)put ", line)]
    assert tensors and all(re.search(r"\}\]  # \w", line) for line in tensors)
