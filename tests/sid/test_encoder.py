"""The text encoder: real models (MiniLM from its package, tiny ones made here), vectors against plain passes, the cache under abuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from oxyray.config import ClusterConfig, SidConfig
from oxyray.errors import ConfigError, DataError
from oxyray.sid import encoder as encoder_module
from oxyray.sid.cache import VectorCache, content_keys
from oxyray.sid.encoder import TextEncoder, encode, encoder_identity, item_texts, pooling_of, vector_size

TEXTS = [
    "red lipstick",
    "a matte lip colour in deep red",
    "cast iron frying pan",
    "pan",
    "red lipstick",
    "",
    "shampoo for dry hair, 250 ml " * 40,
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with random weights, saved as any Hugging Face folder is."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def settings(cache: Path, model: Path | str, **changes: object) -> SidConfig:
    return SidConfig(encoder=str(model), cache_dir=str(cache), **changes)  # type: ignore[arg-type]


def by_hand(folder: Path, text: str, pooling: str = "mean") -> np.ndarray:
    """One text alone: no batch, no padding, no mask."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(folder))(text, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden_TF = AutoModel.from_pretrained(str(folder)).eval()(**tokens).last_hidden_state[0]
    vector = {"mean": hidden_TF.mean(dim=0), "first": hidden_TF[0], "last": hidden_TF[-1]}[pooling]
    return (vector / vector.norm()).numpy()


def pooled(folder: Path, **modes: bool) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_text_of_an_item_takes_what_is_there() -> None:
    items = pa.table(
        {
            "item_id": ["1", "2", "3"],
            "title": ["Red lipstick.", "Pan", None],
            "brand": ["Lux", None, " "],
            "category_1": ["Beauty", "Home", None],
            "category_2": ["Lips", None, None],
            "description": ["Lasts long.", "", None],
            "price": [1.0, 2.0, 3.0],
        }
    )
    assert item_texts(items) == ["Red lipstick. Brand: Lux. Category: Beauty > Lips. Lasts long", "Pan. Category: Home", "3"]


def test_minilm_gives_what_sentence_transformers_gives(tmp_path: Path) -> None:
    """The numbers are sentence-transformers 6.2.0's own, `encode(..., normalize_embeddings=True)`, for the same four texts."""
    texts = ["red lipstick", "a matte lip colour in deep red", "cast iron frying pan", "shampoo for dry hair, 250 ml " * 40]
    got = encode(texts, settings(tmp_path, "minilm"))
    assert got.shape == (4, 384)
    assert got.dtype == np.float32
    first = [
        [-0.1076816, -0.0586421, -0.0352982, 0.0643157, -0.0649329],
        [-0.0851440, -0.0687949, -0.0248458, 0.0138703, -0.0489185],
        [0.0027086, 0.0099096, -0.0246355, 0.0828174, 0.0088511],
        [0.0154566, -0.1156154, 0.0446845, -0.0709948, -0.0793640],
    ]
    near = [
        [1, 0.7428878, 0.1049562, -0.0272557],
        [0.7428878, 1, 0.1244052, -0.0241664],
        [0.1049562, 0.1244052, 1, 0.0570963],
        [-0.0272557, -0.0241664, 0.0570963, 1],
    ]
    np.testing.assert_allclose(got[:, :5], first, atol=2e-6)
    np.testing.assert_allclose(got @ got.T, near, atol=5e-6)


@pytest.mark.parametrize(
    ("modes", "pooling"),
    [
        ({}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_any_folder_pooled_as_it_says(copy: Path, tmp_path: Path, modes: dict[str, bool], pooling: str) -> None:
    if modes:
        pooled(copy, **modes)
    assert pooling_of(copy) == pooling
    texts = ["abc", "a b c d e f", "zz top", "k"]
    got = encode(texts, settings(tmp_path / "cache", copy, batch_items=3))
    np.testing.assert_allclose(got, np.stack([by_hand(copy, text, pooling) for text in texts]), atol=1e-6)


def test_equal_texts_and_other_batches_give_equal_vectors(tiny: Path, tmp_path: Path) -> None:
    one = encode(TEXTS, settings(tmp_path / "one", tiny, batch_items=2))
    two = encode(TEXTS[::-1], settings(tmp_path / "two", tiny, batch_items=5))[::-1]
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert (one[0] == one[4]).all()
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)


def test_only_texts_never_seen_are_encoded(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: asked.extend(texts) or real(self, texts))
    config = settings(tmp_path, tiny)
    first = encode(TEXTS[:4], config)
    assert sorted(asked) == sorted(TEXTS[:4])
    asked.clear()
    both = encode([*TEXTS, "new"], config)
    assert sorted(asked) == sorted({*TEXTS, "new"} - set(TEXTS[:4]))
    assert (both[:4] == first).all()
    asked.clear()
    assert (encode([*TEXTS, "new"], config) == both).all()
    assert asked == []


def test_an_interrupted_run_goes_on_where_it_stopped(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "_FLUSH_SECONDS", 0.0)
    real, calls = TextEncoder.encode, []

    def stops(self: TextEncoder, texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", stops)
    texts = [f"word{'s' * n}" for n in range(8)]
    config = settings(tmp_path, tiny, batch_items=2)
    with pytest.raises(KeyboardInterrupt):
        encode(texts, config)
    calls[:] = [0] * 10
    encode(texts, config)
    assert calls[10:] == [2, 2]


def test_damaged_and_foreign_cache_parts_are_passed_over(tiny: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, tiny)
    want = encode(TEXTS, config)
    (part,) = (tmp_path / encoder_identity(tiny)).glob("part-*")
    whole = (part / "vectors.npy").read_bytes()
    for damage in (whole[: len(whole) // 2], b""):
        (part / "vectors.npy").write_bytes(damage)
        np.testing.assert_allclose(encode(TEXTS, config), want, atol=1e-6)
    np.save(part / "vectors.npy", np.ones((len(np.load(part / "keys.npy")), 5), np.float32))
    np.testing.assert_allclose(encode(TEXTS, config), want, atol=1e-6)
    (tmp_path / encoder_identity(tiny) / "part-empty").mkdir()
    np.testing.assert_allclose(encode([*TEXTS, "one more"], config)[:-1], want, atol=1e-6)


WRITER = """
import sys
import numpy as np
from oxyray.sid.cache import VectorCache, content_keys
cache, pair = VectorCache(sys.argv[1], "x"), sys.argv[2]
for turn in range(10):
    keys = content_keys([f"{pair} {turn} {n}" for n in range(20)])
    cache.get(keys, 4)
    cache.put(keys, np.repeat(keys[:, :1] % 1000, 4, axis=1).astype(np.float32))
"""


def test_many_processes_share_a_cache(tmp_path: Path) -> None:
    """Four writers, pairs of them writing the same texts, all reading meanwhile: in the end all is there and right."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(number % 2)]) for number in range(4)]
    assert [writer.wait(timeout=240) for writer in writers] == [0] * 4
    keys = content_keys([f"{pair} {turn} {n}" for pair in range(2) for turn in range(10) for n in range(20)])
    vectors, known = VectorCache(tmp_path, "x").get(keys, 4)
    assert known.all()
    assert (vectors == np.repeat(keys[:, :1] % 1000, 4, axis=1)).all()
    assert not VectorCache(tmp_path, "x").get(content_keys(["never"]), 4)[1].any()


def test_identity_follows_the_weights_and_the_pooling_not_the_path(tiny: Path, copy: Path) -> None:
    assert encoder_identity(copy) == encoder_identity(tiny)
    pooled(copy, pooling_mode_cls_token=True)
    other = encoder_identity(copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert len({encoder_identity(tiny), other, encoder_identity(copy)}) == 3
    assert vector_size(tiny) == 16


def test_folders_that_hold_no_usable_encoder(copy: Path, tmp_path: Path) -> None:
    def refused(model: Path | str, says: str) -> None:
        with pytest.raises(ConfigError, match=says) as caught:
            encode(["a"], settings(tmp_path / "cache", model))
        assert "\n" not in str(caught.value)

    refused("minilmm", "no config.json there; give `minilm`")
    pooled(copy, pooling_mode_weightedmean_tokens=True)
    refused(copy, "weightedmean_tokens is not supported")
    (copy / "1_Pooling" / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(copy, "no hidden_size")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "no .safetensors weights")


def test_weights_that_give_nan_are_an_error_and_nothing_is_cached(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="NaN for the text"):
        encode(["abc", "d"], settings(tmp_path / "cache", copy))
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_on_ray_give_the_same_vectors(shared_ray: None, tiny: Path, tmp_path: Path) -> None:
    texts = [f"{'word ' * (n % 7)}{n}" for n in range(40)]
    want = encode(texts, settings(tmp_path / "one", tiny))
    config = settings(tmp_path / "two", tiny, workers=2, batch_items=8)
    got = encode(texts, config, ClusterConfig(object_store_gb=0.1))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (encode(texts, settings(tmp_path / "two", tiny)) == got).all()  # cached: nobody is asked the second time
