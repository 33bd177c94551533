"""Pictures: pixels as they are, a vision model's quarters, the cache, bad bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from oxyray.errors import ConfigError, DataError
from oxyray.sid import pictures as module
from oxyray.sid.pictures import TOKENS, VisionEncoder, patches, pixels


def png(colour: tuple[int, int, int], size: int = 16) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP vision half with random weights."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_pixels_are_those_of_the_picture() -> None:
    picture, seen = pixels([png((255, 0, 127)), None, b""], 8)
    assert picture.shape == (3, 3, 8, 8)
    assert seen.tolist() == [True, False, False]
    assert picture[0, :, 3, 3].tolist() == [255, 0, 127]
    assert not picture[1:].any()


def test_bytes_that_are_no_picture_are_named() -> None:
    with pytest.raises(DataError, match="picture of item row 1"):
        pixels([png((1, 2, 3)), b"not a picture"], 8)


def test_a_vision_model_sees_each_quarter(vision: Path, tmp_path: Path) -> None:
    images = [png((200, 10, 10)), None, png((10, 200, 10)), png((200, 10, 10))]
    found, seen = patches(images, str(vision), str(tmp_path))
    assert found.shape == (4, TOKENS, 16)
    assert seen.tolist() == [True, False, True, True]
    np.testing.assert_allclose(found[0], found[3], atol=1e-5)
    assert not found[1].any()
    assert not np.allclose(found[0], found[2], atol=1e-3)


def test_what_was_encoded_is_not_encoded_again(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [png((200, 10, 10)), png((10, 200, 10))]
    first, _ = patches(images, str(vision), str(tmp_path))

    def never(self: VisionEncoder, pictures: object) -> np.ndarray:
        raise AssertionError("encoded again")

    monkeypatch.setattr(module.VisionEncoder, "encode", never)
    again, _ = patches(images[::-1], str(vision), str(tmp_path))
    np.testing.assert_array_equal(again, first[::-1])


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        patches([png((1, 1, 1))], str(tmp_path), str(tmp_path))
