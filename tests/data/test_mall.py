"""The embedded shop's files: what is in them, that they follow the shop's rules, that they depend on nothing but size and seed."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from oxyray.config import MallConfig
from oxyray.data import mall
from oxyray.data.mall import calendar, goods, pictures, queries
from oxyray.data.mall.world import FEEDS, PATHS, SCENARIOS, World
from oxyray.data.tables import COLUMNS, Table
from oxyray.errors import ConfigError

TINY = MallConfig(size="tiny", seed=3)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mall") / "shop"
    mall.write(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def world():
    return World.make(TINY)


def read(shop: Path, name: str) -> dict[str, list]:
    return pq.read_table(shop / f"{name}.parquet").to_pydict()


def fingerprints(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["items", "users", "events", "pools"])
def test_tables_are_canonical(shop, name):
    table = Table(name, [shop / f"{name}.parquet"])
    wanted = {column.name for column in COLUMNS[name]}
    assert wanted <= set(pq.read_schema(shop / f"{name}.parquet").names)
    assert sum(chunk.rows.num_rows for chunk in table.chunks()) == table.rows > 0


def test_same_seed_same_bytes_and_another_seed_another_shop(shop, tmp_path):
    mall.write(TINY, tmp_path / "again")
    assert fingerprints(tmp_path / "again") == fingerprints(shop)
    mall.write(MallConfig(size="tiny", seed=4, users=20), tmp_path / "other")
    assert pq.read_table(tmp_path / "other" / "items.parquet")["title"] != pq.read_table(shop / "items.parquet")["title"]


@pytest.mark.timeout(600)
def test_workers_on_ray_write_the_same_bytes(shared_ray, shop, tmp_path):
    assert World.make(TINY).size.users > World.make(TINY).size.block, "needs several blocks"
    mall.write(MallConfig(size="tiny", seed=3, workers=2), tmp_path / "shop")
    assert fingerprints(tmp_path / "shop") == fingerprints(shop)


def test_a_shop_cut_down_keeps_its_first_users(shop, tmp_path):
    """Users are drawn block by block, so fewer blocks are the same users with the same lives."""
    mall.write(MallConfig(size="tiny", seed=3, users=64), tmp_path / "part")
    part, whole = read(tmp_path / "part", "events"), read(shop, "events")
    assert part["item_id"] == whole["item_id"][: len(part["item_id"])]


def test_events_follow_the_rules(shop):
    events = read(shop, "events")
    joined = dict(zip(read(shop, "truth/users")["user_id"], read(shop, "truth/users")["joined"], strict=True))
    pool = set(zip(read(shop, "pools")["scenario"], read(shop, "pools")["item_id"], strict=True))
    assert set(events["scenario"]) == set(SCENARIOS)
    assert set(events["action"]) == {"click", "cart", "purchase"}
    with_trigger = {SCENARIOS[code] for code in FEEDS + PATHS}
    last: dict[str, int] = {}
    for user, item, time, action, scenario, trigger, query, quantity in zip(
        *(events[c] for c in ("user_id", "item_id", "event_time", "action", "scenario", "trigger_item_id", "query", "quantity")),
        strict=True,
    ):
        assert joined[user] <= time
        assert last.get(user, 0) < time, "a user's events are in order, one at a time"
        last[user] = time
        assert (scenario, item) in pool
        assert (trigger is not None) == (scenario in with_trigger)
        assert (query is not None) == (scenario == "search")
        assert (quantity is not None) == (action == "purchase")
    assert len(set(events["request_id"])) == len(events["request_id"])
    days = pq.read_table(shop / "calendar.parquet")["date"]
    assert len(pc.unique(days)) == 120


def test_triggers_lead_where_they_should(shop, world):
    """A feed's trigger is the item clicked on its home floor; overlay and checkout start at what was just put in the cart or bought."""
    truth = read(shop, "truth/requests")
    previous: dict[int, tuple[int, ...]] = {}
    home: dict[int, int] = {}
    for user, visit, scenario, trigger, item, action in zip(
        *(truth[c] for c in ("user", "visit", "scenario", "trigger", "item", "action")), strict=True
    ):
        if scenario in PATHS:
            last_item, last_action, last_visit, last_scenario, last_trigger = previous[user]
            assert visit == last_visit
            if (scenario, trigger) != (last_scenario, last_trigger):
                assert trigger == last_item
                assert last_action == (1 if scenario == PATHS[0] else 2)
        if scenario in FEEDS:
            assert trigger == home[user]
            assert world.pool_CI[scenario, trigger]
        if scenario <= 1:
            home[user] = item
        previous[user] = (item, action, visit, scenario, trigger)


def test_overlays_prefer_complements_and_feeds_what_is_near(shop, world):
    truth = {name: np.array(column) for name, column in read(shop, "truth/requests").items() if name != "clean_query"}
    type_I = world.catalogue.type_I
    department_F = world.catalogue.goods.codes("department")

    def among(scenarios: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.isin(truth["scenario"], scenarios)
        return type_I[truth["trigger"][chosen]], type_I[truth["item"][chosen]]

    first, second = among(PATHS)
    assert (world.complement_FF[first, second] > 0).mean() > 0.5
    assert (first == second).mean() < 0.03
    near_first, near_second = among(FEEDS)
    assert (near_first == near_second).mean() > 0.15
    assert (department_F[near_first] == department_F[near_second]).mean() > 0.75


def test_queries_are_typed_by_people(shop, world):
    truth, events = read(shop, "truth/requests"), read(shop, "events")
    pairs = [(clean, typed) for clean, typed in zip(truth["clean_query"], events["query"], strict=True) if clean is not None]
    wrong = [(clean, typed) for clean, typed in pairs if clean != typed]
    assert 0.2 < len(wrong) / len(pairs) < 0.45
    assert any(clean.startswith(typed) for clean, typed in wrong), "some are cut off"
    assert any(not clean.startswith(typed) for clean, typed in wrong), "some are misspelt"
    for form, item, clean in zip(truth["form"], truth["item"], truth["clean_query"], strict=True):
        if form >= 0:
            assert clean.endswith(world.catalogue.goods.types[world.catalogue.type_I[item]].noun)
            assert queries.matches(world.catalogue, np.array([form]), np.array([item]), np.array([[item]])).all()


def test_exposures_hold_the_choice(shop):
    shown, events = read(shop, "exposures"), read(shop, "events")
    chosen = dict(zip(events["request_id"], zip(events["item_id"], events["action"], strict=True), strict=True))
    pool = set(zip(read(shop, "pools")["scenario"], read(shop, "pools")["item_id"], strict=True))
    clicked = 0
    for request, visit, scenario, items, actions in zip(
        *(shown[c] for c in ("request_id", "visit_request_id", "scenario", "item_ids", "actions")), strict=True
    ):
        assert 1 <= len(items) == len(actions) <= 12
        assert len(set(items)) == len(items)
        assert all((scenario, item) in pool for item in items)
        done = [(item, action) for item, action in zip(items, actions, strict=True) if action]
        if request == visit:
            clicked += 1
            item, action = chosen[request]
            assert done == [(item, 1 + ("click", "cart", "purchase").index(action))]
        else:
            assert not done
    assert clicked == len(events["item_id"])
    assert 0.15 < 1 - clicked / len(shown["request_id"]) < 0.35


def test_items_read_and_look_like_goods(shop):
    items = read(shop, "items")
    assert len(set(items["title"])) > 0.95 * len(items["title"])
    for title, brand, description, price, list_price in zip(
        *(items[c] for c in ("title", "brand", "description", "price", "list_price")), strict=True
    ):
        assert title.startswith(brand)
        assert "  " not in title + description
        assert description[0].isupper()
        assert 0 < price <= list_price
    assert len({(one, two, three) for one, two, three in zip(*(items[f"category_{n}"] for n in (1, 2, 3)), strict=True)}) == 34
    for picture in items["image"]:
        opened = Image.open(io.BytesIO(picture))
        opened.load()
        assert (opened.format, opened.mode, opened.size) == ("PNG", "RGB", (32, 32))
    assert len(set(items["image"])) > 0.9 * len(items["image"])


def test_pictures_show_type_and_colour(world):
    """The nearest other picture mostly shows the same shape, so that a picture says what a thing is."""
    shop = world.catalogue
    every = np.arange(shop.items)
    flat_IP = pictures.pixels(shop, every).reshape(shop.items, -1).astype(np.float32)
    distance_II = (flat_IP**2).sum(1)[:, None] - 2 * flat_IP @ flat_IP.T + (flat_IP**2).sum(1)
    np.fill_diagonal(distance_II, np.inf)
    nearest = distance_II.argmin(1)
    shape_I = np.array([kind.shape for kind in shop.goods.types])[shop.type_I]
    assert (shape_I[nearest] == shape_I).mean() > 0.8


def test_the_range_is_whole():
    """Every product type has a shape, complements in the range, and words; every persona and complement names something that exists."""
    range_ = goods.load()
    assert {kind.shape for kind in range_.types} <= set(pictures._shapes())
    assert np.allclose(range_.complement_FF.sum(1), 1)
    assert (np.diag(range_.complement_FF) == 0).all()
    named = {name for kind in range_.types for name in (kind.name, kind.aisle, kind.department)}
    for text in goods.sections("people.txt")["personas"].values():
        assert {want.strip().rsplit(" ", 1)[0] for want in text.split("|")[0].split(",")} <= named
    tags = {*calendar.SEASONS, *calendar.FEASTS, *calendar.CONDITIONS, *calendar.WARMTH, *calendar.PARTS, "f", "m", "young", "mid", "old"}
    assert {tag for kind in range_.types for tag in kind.tags} <= tags
    for kind in range_.types:
        assert (kind.durable_days > 0) != (kind.cycle_days > 0)
    for file in ("goods.txt", "complements.txt"):
        assert goods._lines(file)
    for line in goods._lines("complements.txt"):
        first, others = line.split(">")
        assert {first.strip(), *(other.strip().rsplit(" ", 1)[0] for other in others.split("&"))} <= {kind.name for kind in range_.types}


def test_seasons_and_weather_move_demand(world):
    days = calendar.build(730, np.random.default_rng(0))
    assert {name for name in days.feast_D if name} >= {"Spring Festival", "Mid-Autumn Festival", "Singles' Day", "Winter Solstice"}
    january, july = (np.flatnonzero([days.date(d).month == month for d in range(730)]) for month in (1, 7))
    cities = list(calendar.CITIES)
    assert days.temperature_DY[january, cities.index("Harbin")].mean() < -10 < 20 < days.temperature_DY[july, cities.index("Harbin")].mean()
    snow = days.condition_DY == calendar.CONDITIONS.index("snow")
    assert snow[:, cities.index("Harbin")].any()
    assert not snow[:, cities.index("Sanya")].any()
    assert (days.part(days.first + np.array([1, 7, 12, 19, 23]) * 3600) == [0, 1, 2, 3, 0]).all()
    jackets = world.catalogue.goods.index("Down jackets")
    cold = world.calendar.temperature_DY < 0
    assert world.context_DYF[cold][:, jackets].min() > world.context_DYF[world.calendar.temperature_DY > 20][:, jackets].max()


@pytest.mark.parametrize(
    ("wrong", "said"), [({"items": 50}, "data.mall.items: this shop has 34 product types"), ({"days": 5}, "data.mall.days: must lie in")]
)
def test_a_shop_that_cannot_be_is_refused(wrong, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        mall.write(MallConfig(size="tiny", **wrong), tmp_path / "shop")
