"""Ten users of the test: what they had before, what they took then, what the policy recommended. With titles, prices and pictures.

Half are drawn among the requests whose target was in the first ten places, half among the others, and the page says so: a plain
draw would show next to no hits, a choice of good ones would flatter."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.data.prepared import Prepared
from oxyray.data.requests import timeline

PEOPLE, SHOWN_HISTORY, SHOWN_ITEMS = 10, 6, 10
_PICTURE_BYTES, _PICTURE_SIDE = 12_000, 96
_MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"))


def people(path: Path, prepared: Prepared, model: str, seed: int) -> str:
    """The section's cards, empty when the file holds no row of the model."""
    columns = ["request_id", "user_id", "scenario", "item_ids", "target_item_id"]
    table = pq.read_table(path, columns=columns, filters=(pc.field("model") == model) & (pc.field("protocol") == "all"))
    chosen = _draw(table, seed)
    if not len(chosen):
        return ""
    shop = Goods(prepared)
    return "".join(_person(row, prepared, shop) for row in table.take(pa.array(chosen)).to_pylist())


def _draw(table: pa.Table, seed: int) -> list[int]:
    """Rows of PEOPLE different users: hits and misses in turn, as far as there are any."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(table.num_rows)[:20_000]
    rows = table.select(["user_id", "item_ids", "target_item_id"]).take(pa.array(order)).to_pylist()
    hits, misses, users = list[int](), list[int](), set[str]()
    for number, row in zip(order.tolist(), rows, strict=True):
        if row["user_id"] in users:
            continue
        (hits if row["target_item_id"] in row["item_ids"][:SHOWN_ITEMS] else misses).append(number)
        users.add(row["user_id"])
    few = min(len(hits), PEOPLE // 2)
    few = max(few, min(len(hits), PEOPLE - len(misses)))
    return sorted(hits[:few] + misses[: PEOPLE - few], key=order.tolist().index)


class Goods:
    """Items as list entries of the page."""

    def __init__(self, prepared: Prepared) -> None:
        self.items = prepared.item_columns("item_id", "title", "price", "image")

    def entry(self, item: int, hit: bool = False, note: str = "") -> str:
        row = {name: self.items[name][item].as_py() for name in self.items.column_names}
        title = row.get("title") or row["item_id"]
        price = "" if row.get("price") is None else f"{row['price']:,.2f}"
        below = escape(" · ".join(part for part in (note, price) if part) or row["item_id"])
        uri = picture(row.get("image"))
        shown = f'<img src="{uri}" alt="" width="40" height="40">' if uri else f'<span class="blank">{escape(title[:1].upper())}</span>'
        mark = ' class="hit"' if hit else ""
        return f'<li{mark}>{shown}<div class="what"><b title="{escape(title)}">{escape(title)}</b><span>{below}</span></div></li>'


def picture(image: bytes | None) -> str | None:
    """A PNG or JPEG as a data address, made smaller when it is large; None for anything else or a damaged one."""
    kind = next((name for magic, name in _MAGIC if image and image.startswith(magic)), None)
    if image is None or kind is None:
        return None
    if len(image) > _PICTURE_BYTES:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(image)) as opened:
                small = opened.convert("RGB")
                small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
                out = io.BytesIO()
                small.save(out, "JPEG", quality=80)
                image, kind = out.getvalue(), "jpeg"
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            return None
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _person(row: dict[str, Any], prepared: Prepared, shop: Goods) -> str:
    meta = prepared.meta
    time = timeline(prepared.user_events(prepared.user_index(row["user_id"])))
    here = int(np.flatnonzero(time.request_E == row["request_id"])[0])
    past = np.arange(time.user_start_E[here], time.user_start_E[here] + time.visible_E[here])[::-1]
    target, ids = row["target_item_id"], row["item_ids"][:SHOWN_ITEMS]
    place = ids.index(target) + 1 if target in ids else None
    tag = f'<span class="tag hit">found in place {place}</span>' if place else f'<span class="tag">not in the first {SHOWN_ITEMS}</span>'
    scenario = escape(row["scenario"]) if len(meta.scenarios) > 1 else ""
    trigger = int(time.trigger_E[here])
    looking = f'<h4 style="margin-top:12px">while looking at</h4><ul class="goods">{shop.entry(trigger)}</ul>' if trigger >= 0 else ""
    history = "".join(shop.entry(int(time.item_E[e]), note=meta.actions[time.action_E[e]]) for e in past[:SHOWN_HISTORY])
    listed = "".join(shop.entry(prepared.item_index(item), hit=item == target, note=f"{n}.") for n, item in enumerate(ids, 1))
    taken = shop.entry(prepared.item_index(target), note=meta.actions[time.action_E[here]])
    return f"""<article class="card person">
<div class="top"><b>{escape(row["user_id"])}</b><span>{scenario}</span>{tag}</div>
<div class="lanes">
<div><h4>before ({len(past):,} events, latest first)</h4><ul class="goods">{history or "<li>nothing yet</li>"}</ul></div>
<div><h4>then took</h4><ul class="goods">{taken}</ul>{looking}</div>
<div><h4>was recommended</h4><ul class="goods wide">{listed}</ul></div>
</div></article>"""
