"""The item encoder: what it may depend on, what is missing, saved and read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from oxyray.config import FusionConfig
from oxyray.errors import RunError
from oxyray.sid.fusion import Fusion, ItemTokens

SMALL = FusionConfig(width=16, queries=3, layers=2, heads=2, out=12)


def items(count: int = 6, seed: int = 0, small: bool = False) -> ItemTokens:
    random = np.random.default_rng(seed)
    text_IF = random.standard_normal((count, 10)).astype(np.float32)
    vision_I = (
        random.integers(0, 255, (count, 3, 16, 16)).astype(np.uint8) if small else random.standard_normal((count, 5, 7)).astype(np.float32)
    )
    return ItemTokens(text_IF, vision_I, np.array([True, False] * (count // 2)))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_vectors_have_length_one_whatever_the_batch(small: bool, layers: int) -> None:
    torch.manual_seed(1)
    given = items(small=small)
    fusion = Fusion(FusionConfig(**{**vars(SMALL), "layers": layers}), 10, 0 if small else 7, small).eval()
    whole = fusion.vectors(given)
    assert whole.shape == (6, 12)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(fusion.vectors(given, batch=1), whole, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 2])
def test_an_absent_picture_says_nothing_and_a_present_one_does(layers: int) -> None:
    torch.manual_seed(1)
    given, other = items(), items(seed=9)
    fusion = Fusion(FusionConfig(**{**vars(SMALL), "layers": layers}), 10, 7, False).eval()
    changed = ItemTokens(given.text_IF, other.vision_I, given.seen_I)
    same = np.isclose(fusion.vectors(given), fusion.vectors(changed), atol=1e-6).all(axis=1)
    assert same.tolist() == [False, True] * 3


def test_pictures_alone_and_texts_alone() -> None:
    given = items()
    assert Fusion(SMALL, 10, 0, False).eval().vectors(ItemTokens(given.text_IF, None, None)).shape == (6, 12)
    found = Fusion(SMALL, 0, 7, False).eval().vectors(ItemTokens(None, given.vision_I, given.seen_I))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], found[3], atol=1e-6)  # neither is known by anything


def test_the_shops_own_vectors_beside_texts_and_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given = items()
    own_IW = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)
    fusion = Fusion(SMALL, 10, 7, False, 4).eval()
    both = fusion.vectors(replace(given, given_IW=own_IW))
    fusion.save(tmp_path / "model", fusion.state_dict())
    np.testing.assert_array_equal(Fusion.load(tmp_path / "model").vectors(replace(given, given_IW=own_IW)), both)
    changed = own_IW.copy()
    changed[2] += 1
    same = np.isclose(fusion.vectors(replace(given, given_IW=changed)), both, atol=1e-6).all(axis=1)
    assert same.tolist() == [True, True, False, True, True, True]
    assert Fusion(SMALL, 0, 0, False, 4).eval().vectors(ItemTokens(given_IW=own_IW)).shape == (6, 12)


def test_queries_are_refined_from_layer_to_layer() -> None:
    """Residual initialisation: a layer that adds nothing hands on what the layer before made."""
    torch.manual_seed(2)
    fusion = Fusion(SMALL, 10, 7, False).eval()
    one = Fusion(FusionConfig(**{**vars(SMALL), "layers": 1}), 10, 7, False).eval()
    one.load_state_dict({name: value for name, value in fusion.state_dict().items() if not name.startswith("layers.1")})
    idle = fusion.layers[1]
    with torch.no_grad():
        for part in (idle.query_QD, *idle.own.out_proj.parameters(), *idle.across.out_proj.parameters(), *idle.mlp[2].parameters()):
            part.zero_()
    np.testing.assert_allclose(fusion.vectors(items()), one.vectors(items()), atol=1e-6)


def test_saved_and_read_back(tmp_path: Path) -> None:
    fusion = Fusion(SMALL, 10, 7, False).eval()
    fusion.save(tmp_path / "model", fusion.state_dict(), step=3)
    np.testing.assert_array_equal(Fusion.load(tmp_path / "model").vectors(items()), fusion.vectors(items()))
    (tmp_path / "model" / "fusion.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="does not load"):
        Fusion.load(tmp_path / "model")
