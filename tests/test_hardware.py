"""What only real hardware shows. Each is asked for by a variable: ``EDGEKIT_TEST_CAMERA=camera:0``, or another source;
``EDGEKIT_TEST_CORAL=NAME.tflite``, a model with its ``NAME_edgetpu.tflite`` beside it; ``EDGEKIT_TEST_GPU=1``."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.devices.sources.images import open_source


def asked_for(variable: str) -> Any:
    return pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} does not ask for it")


@pytest.mark.camera
@asked_for("EDGEKIT_TEST_CAMERA")
def test_camera_gives_one_picture_after_the_other() -> None:
    with open_source(os.environ["EDGEKIT_TEST_CAMERA"]) as source:
        frames = list(itertools.islice(source, 30))
    images = [frame.image_bgr for frame in frames if frame.image_bgr is not None]
    assert len(images) == 30 and all(image.dtype == np.uint8 and image.shape[2:] == (3,) for image in images)
    assert all(before.captured_s < after.captured_s for before, after in itertools.pairwise(frames))
    assert len({image.tobytes() for image in images}) > 1, "each picture is like the other"


def same_as_on_the_cpu(model: Path, delegate: str, atol: float) -> None:
    with edgekit.load(model, delegate=delegate, strict=True) as delegated, edgekit.load(model, delegate="cpu") as cpu:
        assert delegated.delegate == delegate and delegated.operators_delegated
        for seed in range(20):
            image = np.random.default_rng(seed).integers(0, 256, (120, 160, 3)).astype(np.uint8)
            image[:, : 8 * seed] = 255 * np.eye(3, dtype=np.uint8)[seed % 3]  # noise beside one colour
            scores = [one.scores(one.invoke(one.preprocess(image))) for one in (delegated, cpu)]
            np.testing.assert_allclose(*scores, atol=atol)


@pytest.mark.coral
@asked_for("EDGEKIT_TEST_CORAL")
def test_edge_tpu_gives_what_the_cpu_gives() -> None:
    same_as_on_the_cpu(Path(os.environ["EDGEKIT_TEST_CORAL"]), "coral", atol=3 / 256)


@pytest.mark.gpu
@asked_for("EDGEKIT_TEST_GPU")
@pytest.mark.parametrize("name", ["float32", "int8"])
def test_gpu_gives_what_the_cpu_gives(models: Path, name: str) -> None:
    """GPUs may compute in 16 bits."""
    same_as_on_the_cpu(models / f"{name}.tflite", "gpu", atol=0.01)
