"""The world and its requests as Arrow tables in the canonical form, and as truth."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oxyray.data.mall import calendar, queries
from oxyray.data.mall.calendar import CITIES, Calendar
from oxyray.data.mall.catalogue import Catalogue
from oxyray.data.mall.people import AGES, DEVICES, GENDERS, TIERS, Users
from oxyray.data.mall.pictures import render
from oxyray.data.mall.simulate import Requests
from oxyray.data.mall.slates import KEPT, Pager
from oxyray.data.mall.texts import item_texts
from oxyray.data.mall.world import SCENARIOS, SEARCH, World
from oxyray.data.tables import ACTIONS


def item_ids(shop: Catalogue) -> pa.Array:
    """Public id of each item number."""
    return _ids("I", shop.public_I, shop.items)


def user_ids(world: World, rows: np.ndarray) -> pa.Array:
    """Public id of each user number."""
    return _ids("U", rows, world.size.users)


def items_table(shop: Catalogue, items: np.ndarray) -> pa.Table:
    """The given item numbers as rows of `items.parquet`."""
    kinds = [shop.goods.types[kind] for kind in shop.type_I[items].tolist()]
    texts = list(item_texts(shop, items))
    return pa.table(
        {
            "item_id": item_ids(shop).take(pa.array(items)),
            "title": [text.title for text in texts],
            "description": [text.description for text in texts],
            "category_1": [kind.department for kind in kinds],
            "category_2": [kind.aisle for kind in kinds],
            "category_3": [kind.name for kind in kinds],
            "brand": [shop.brand_names[brand] for brand in shop.brand_I[items].tolist()],
            "price": _price(shop.price_I[items]),
            "image": pa.array(render(shop, items), pa.binary()),
            "attributes": [text.attributes for text in texts],
            "list_price": _price(shop.list_price_I[items]),
        }
    )


def users_table(world: World, users: Users, block: int) -> pa.Table:
    """What the shop may know of a block's users."""
    return pa.table(
        {
            "user_id": user_ids(world, block * world.size.block + np.arange(len(users))),
            "age_group": _names(AGES, users.age_U),
            "gender": _names(GENDERS, users.gender_U),
            "city": _names(tuple(CITIES), users.city_U),
            "tier": _names(TIERS, users.tier_U),
            "device": _names(DEVICES, users.device_U),
        }
    )


def hidden_users_table(world: World, users: Users, block: int) -> pa.Table:
    """What it may not: who they were at first, and when they joined."""
    return pa.table(
        {
            "user_id": user_ids(world, block * world.size.block + np.arange(len(users))),
            "joined": users.joined_U,
            "persona": _names(world.people.persona_names, users.persona_U),
            "taste": _names(tuple(world.people.taste_names), users.taste_U),
        }
    )


def log_tables(world: World, pagers: list[Pager], requests: Requests, block: int) -> dict[str, pa.Table]:
    """`events`, `exposures` and truth of `requests` of one block's requests."""
    rng = np.random.default_rng([world.seed, 4, block])
    user_N = block * world.size.block + requests.user_N
    number_N = np.arange(len(requests)) - np.searchsorted(requests.user_N, requests.user_N)
    user_id, item_id = user_ids(world, user_N), item_ids(world.catalogue)
    ids = pc.binary_join_element_wise(user_id, pa.array(number_N).cast(pa.string()), "-")
    clean, typed = _queries(world, requests, rng)
    price = _price(world.catalogue.price_I[requests.item_N])
    bought = pa.array(requests.action_N == 2)
    shared = {
        "user_id": user_id,
        "event_time": requests.time_N,
        "scenario": _names(SCENARIOS, requests.scenario_N),
        "trigger_item_id": item_id.take(pa.array(requests.trigger_N, mask=requests.trigger_N < 0)),
    }
    events = {
        **shared,
        "item_id": item_id.take(pa.array(requests.item_N)),
        "action": _names(ACTIONS, requests.action_N),
        "request_id": ids,
        "query": typed,
        "quantity": pc.if_else(bought, pa.array(requests.quantity_N, pa.int32()), pa.scalar(None, pa.int32())),
        "price": price,
    }
    truth = {
        "request_id": ids,
        "user": user_N.astype(np.int32),
        "number": number_N.astype(np.int32),
        "time": requests.time_N,
        "scenario": requests.scenario_N,
        "trigger": requests.trigger_N,
        "item": requests.item_N,
        "action": requests.action_N,
        "form": requests.form_N,
        "clean_query": clean,
        "visit": requests.visit_N.astype(np.int32),
        "persona": requests.persona_N,
        "taste": requests.taste_N,
        "probability": requests.probability_N,
    }
    order = ["user_id", "item_id", "event_time", "action", "scenario", "request_id", "trigger_item_id", "query", "quantity", "price"]
    shown = _exposures(world, pagers, requests, user_N, shared | {"request_id": ids, "query": typed, "clean_query": clean}, item_id, rng)
    return {"events": pa.table(events).select(order), "requests": pa.table(truth), "exposures": shown}


def _exposures(
    world: World,
    pagers: list[Pager],
    requests: Requests,
    user_N: np.ndarray,
    shared: dict[str, pa.Array],
    item_id: pa.Array,
    rng: np.random.Generator,
) -> pa.Table:
    """Pages: of each request the clicked one, and some left without a click just before it (`visit_request_id` says before which)."""
    kept_N = user_N % world.size.slates_of_one_in == 0
    left_N = kept_N & (rng.random(len(requests)) < KEPT)
    place_E = np.concatenate([np.flatnonzero(kept_N), np.flatnonzero(left_N)])
    clicked_E = np.arange(len(place_E)) < kept_N.sum()
    page_EL = np.zeros((len(place_E), 12), np.int32)
    scenario_E = requests.scenario_N[place_E]
    for scenario, pager in enumerate(pagers):
        here = np.flatnonzero(scenario_E == scenario)
        anchor = np.where(clicked_E[here], requests.item_N[place_E[here]], -1)
        if scenario == SEARCH:
            shop = world.catalogue
            type_ = shop.type_I[requests.item_N[place_E[here]]]
            start = shop.item_of_shelf_S1[shop.shelf_of_type_F1]
            any_item = start[type_] + (rng.random(len(here)) * (start[type_ + 1] - start[type_])).astype(np.int64)
            anchor = np.where(anchor < 0, any_item, anchor)
        page_EL[here] = pager.page(anchor, rng)
    real_EL = page_EL >= 0
    action_EL = np.where(clicked_E[:, None] & (page_EL == requests.item_N[place_E][:, None]), 1 + requests.action_N[place_E][:, None], 0)
    order = np.lexsort((clicked_E, place_E))
    place_E, clicked_E, page_EL, real_EL, action_EL = place_E[order], clicked_E[order], page_EL[order], real_EL[order], action_EL[order]
    offsets = pa.array(np.concatenate([[0], np.cumsum(real_EL.sum(1))]).astype(np.int32))
    columns = {name: _take(value, place_E) for name, value in shared.items()}
    request = columns["request_id"]
    columns |= {
        "request_id": pc.if_else(pa.array(clicked_E), request, pc.binary_join_element_wise(request, "left", "-")),
        "visit_request_id": request,
        "item_ids": pa.ListArray.from_arrays(offsets, item_id.take(pa.array(page_EL[real_EL]))),
        "actions": pa.ListArray.from_arrays(offsets, pa.array(action_EL[real_EL].astype(np.int8))),
    }
    order_of = [
        "request_id",
        "user_id",
        "event_time",
        "scenario",
        "trigger_item_id",
        "query",
        "item_ids",
        "actions",
        "clean_query",
        "visit_request_id",
    ]
    return pa.table(columns).select(order_of)


def _queries(world: World, requests: Requests, rng: np.random.Generator) -> tuple[pa.Array, pa.Array]:
    """Clean and typed query of each request, null where nothing was searched."""
    clean: list[str | None] = [None] * len(requests)
    typed: list[str | None] = [None] * len(requests)
    place_N = np.flatnonzero(requests.form_N >= 0)
    noisy_N = rng.random(len(place_N)) < queries.NOISE_SHARE
    for place, noisy in zip(place_N.tolist(), noisy_N.tolist(), strict=True):
        text = queries.text(world.catalogue, int(requests.form_N[place]), int(requests.item_N[place]))
        clean[place], typed[place] = text, queries.typed(text, rng) if noisy else text
    return pa.array(clean, pa.string()), pa.array(typed, pa.string())


def pools_table(world: World) -> pa.Table:
    scenario_P, item_P = np.nonzero(world.pool_CI)
    return pa.table({"scenario": _names(SCENARIOS, scenario_P), "item_id": item_ids(world.catalogue).take(pa.array(item_P))})


def complements_table(world: World) -> pa.Table:
    """Which product types are bought beside which; `shared_attribute` is the attribute that must agree (a case fits one phone)."""
    types = world.catalogue.goods.types
    first_P, second_P = np.nonzero(world.complement_FF)
    fits = [types[b].fits >= 0 and types[a].makes == types[b].fits for a, b in zip(first_P, second_P, strict=True)]
    return pa.table(
        {
            "category_3": [types[a].name for a in first_P],
            "complement": [types[b].name for b in second_P],
            "weight": world.complement_FF[first_P, second_P],
            "shared_attribute": ["fits" if fit else None for fit in fits],
        }
    )


def calendar_table(days: Calendar) -> pa.Table:
    day_P = np.repeat(np.arange(days.days), len(CITIES))
    dates = [days.date(day) for day in range(days.days)]
    return pa.table(
        {
            "date": pa.array([dates[day] for day in day_P.tolist()], pa.date32()),
            "city": list(CITIES) * days.days,
            "season": _names(calendar.SEASONS, days.season_D[day_P]),
            "holiday": [days.feast_D[day] or None for day in day_P.tolist()],
            "weather": _names(calendar.CONDITIONS, days.condition_DY.ravel()),
            "temperature": days.temperature_DY.ravel(),
        }
    )


def _ids(letter: str, number_N: np.ndarray, count: int) -> pa.Array:
    text = pc.utf8_lpad(pa.array(number_N).cast(pa.string()), max(6, len(str(count - 1))), "0")
    return pc.binary_join_element_wise(letter, text, "")


def _names(names: tuple[str, ...], code_N: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(code_N.astype(np.int32)), pa.array(names)).cast(pa.string())


def _price(price_N: np.ndarray) -> np.ndarray:
    return np.round(price_N.astype(np.float64), 2)


def _take(values: pa.Array | np.ndarray, place_N: np.ndarray) -> pa.Array:
    return pa.array(values).take(pa.array(place_N)) if isinstance(values, np.ndarray) else values.take(pa.array(place_N))
