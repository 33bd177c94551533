"""The best that can be done in the shop, computed from its truth: choice probabilities, the best hit rate, the value of a slate.

Two kinds of knowledge, everywhere: `hidden=True` knows each user's persona and taste at the time (an upper bound that no model can
reach); `hidden=False` knows the log and the shop's rules, and infers the rest exactly (`belief.py`): the best that a model can reach. A
search is judged by its clean query, so typing errors cost a model something against the optimum.

Items are numbered here as in the prepared form: place i is the i-th item by `item_id`. Legend: R requests, I items, L places of a
slate, S shelves, F product types, Z personas, K tastes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oxyray.config import MallConfig, from_dict
from oxyray.data.mall import queries
from oxyray.data.mall.belief import Situation, replay, type_share
from oxyray.data.mall.people import Users
from oxyray.data.mall.simulate import MEAN_EXTRA, Requests, block_users
from oxyray.data.mall.slates import OUTSIDE
from oxyray.data.mall.utility import action_probability, candidates, item_utility, shelf_utility, softmax
from oxyray.data.mall.world import SCENARIOS, World
from oxyray.errors import DataError
from oxyray.files import read_json

_CELLS = 4_000_000


@dataclass(frozen=True)
class SlateValue:
    """Expected clicks, carts, purchases and turnover (price times pieces) of one showing of a slate, float64 (R,)."""

    clicks: np.ndarray
    carts: np.ndarray
    purchases: np.ndarray
    turnover: np.ndarray


class Optimum:
    """Opened on a folder that `mall.write` wrote. Requests are named by row of `truth/requests.parquet`: see `rows` and `rows_at`."""

    def __init__(self, folder: str | Path) -> None:
        """Raises RunError or DataError where the folder holds no shop."""
        self.folder = Path(folder)
        about = read_json(self.folder / "truth" / "shop.json")
        self.world = World.make(from_dict(MallConfig, about["mall"]))
        self.table = pq.read_table(self.folder / "truth" / "requests.parquet")
        if about["version"] != self.world.version():
            raise DataError(
                f"{self.folder}: this shop was written by another version of the simulator; write it again to compute its optimum"
            )
        self._public_I = np.argsort(self.world.catalogue.public_I)

    def rows(self, request_ids: Sequence[str]) -> np.ndarray:
        """Rows of the named requests. Raises DataError for an unknown one."""
        return self._found(pc.index_in(pa.array(request_ids, pa.string()), self.table["request_id"]), request_ids)

    def rows_at(self, user_ids: Sequence[str], times: np.ndarray) -> np.ndarray:
        """Rows of the requests that users made at the given times (a user makes one at a time)."""
        users = np.array([int(user[1:]) for user in user_ids], np.int64)
        key = users * (1 << 34) + np.asarray(times, np.int64)
        known = self._column("user").astype(np.int64) * (1 << 34) + self._column("time")
        place = np.minimum(np.searchsorted(known, key), len(known) - 1)
        return self._found(pa.array(place, mask=known[place] != key), list(zip(user_ids, times, strict=True)))

    def choice_probability(self, rows: np.ndarray, hidden: bool = False, query: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks (places in `rows`, P_RI): the probability of each item to be chosen in each request. Rows of P sum to 1.

        `query` False: what can be known without reading the queries, for a model that does not.
        """
        for users, situation, places in self._situations(rows, hidden, self.world.catalogue.items):
            if not query:
                situation.form_B = np.full_like(situation.form_B, -1)
            yield places, choice_probability(self.world, users, situation)[:, self._public_I]

    def best_hit_rate(
        self, rows: np.ndarray, ks: Sequence[int] = (1, 5, 10), hidden: bool = False, query: bool = True
    ) -> dict[str, dict[int, float]]:
        """Highest expected HR@K, overall and by scenario: the mean probability that the target is among the K likeliest items."""
        mass_RK = np.zeros((len(rows), len(ks)))
        for places, share_RI in self.choice_probability(rows, hidden, query):
            top = min(max(ks), share_RI.shape[1])
            best_RT = -np.sort(-np.partition(share_RI, -top, axis=1)[:, -top:], axis=1)
            mass_RK[places] = np.cumsum(best_RT, axis=1)[:, np.minimum(ks, top) - 1]
        scenario_R = self._column("scenario")[rows]
        groups = {"all": np.ones(len(rows), bool)} | {name: scenario_R == code for code, name in enumerate(SCENARIOS)}
        return {name: dict(zip(ks, mass_RK[which].mean(0).tolist(), strict=True)) for name, which in groups.items() if which.any()}

    def slate_values(self, rows: np.ndarray, slates: Sequence[np.ndarray], hidden: bool = True) -> list[SlateValue]:
        """Expected values of showing each of `slates`, (R, L) item numbers as in the prepared form (-1 behind short ones, none twice), in
        the requests.

        The user clicks item i with probability p_i / (OUTSIDE + sum of p over the slate); then cart and purchase follow. Items outside
        the scenario's pool are worth nothing.
        """
        value_MRX = np.zeros((len(slates), len(rows), 4))
        longest = max((slate_RL.shape[1] for slate_RL in slates), default=1)
        for users, situation, places in self._situations(rows, hidden, longest * 2_000):
            for value_RX, slate_RL in zip(value_MRX, slates, strict=True):
                item_RL = self._public_I[slate_RL[places]]
                value_RX[places] = slate_value(self.world, users, situation, item_RL, slate_RL[places] >= 0)
        return [SlateValue(*value_RX.T) for value_RX in value_MRX]

    def _situations(self, rows: np.ndarray, hidden: bool, cells: int) -> Iterator[tuple[Users, Situation, np.ndarray]]:
        """The rows' situations block by block, in chunks of about _CELLS / cells, with their places in `rows`."""
        rows = np.asarray(rows, np.int64)
        user_R = self._column("user")[rows]
        for block in np.unique(user_R // self.world.size.block).tolist():
            here = np.flatnonzero(user_R // self.world.size.block == block)
            users, requests, first = self._block(block)
            order = here[np.argsort(rows[here], kind="stable")]
            asked = np.unique(rows[order]) - first
            for situation in _chunks(replay(self.world, users, requests, asked, hidden), max(1, _CELLS // cells)):
                start, stop = (np.searchsorted(rows[order], situation.place_B + first, side) for side in ("left", "right"))
                copies = np.repeat(np.arange(len(situation)), stop - start)
                within = np.arange(len(copies)) - np.repeat(np.cumsum(stop - start) - (stop - start), stop - start)
                yield users, situation[copies], order[start[copies] + within]

    def _block(self, block: int) -> tuple[Users, Requests, int]:
        user_N = self._column("user")
        first, last = np.searchsorted(user_N, [block * self.world.size.block, (block + 1) * self.world.size.block])
        columns = {
            name: self._column(name)[first:last]
            for name in ("time", "scenario", "trigger", "item", "action", "form", "persona", "taste", "visit")
        }
        spare = np.zeros(last - first)
        requests = Requests(
            user_N=user_N[first:last] - block * self.world.size.block,
            quantity_N=spare,
            probability_N=spare,
            **{f"{name}_N": value for name, value in columns.items()},
        )
        return block_users(self.world, block), requests, int(first)

    def _column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    def _found(self, place: pa.Array, asked: Sequence[object]) -> np.ndarray:
        missing = pc.is_null(place).to_numpy(zero_copy_only=False)
        if missing.any():
            first = asked[int(np.flatnonzero(missing)[0])]
            raise DataError(f"{self.folder}: no such request in this shop: {first}; is it the shop that the run was made from?")
        return place.to_numpy(zero_copy_only=False).astype(np.int64)


def _chunks(parts: Iterator[Situation], limit: int) -> Iterator[Situation]:
    """Situations gathered or cut into pieces of at most `limit`."""
    held: list[Situation] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= limit:
            whole = Situation.join(held)
            held = []
            for first in range(0, len(whole), limit):
                yield whole[np.arange(first, min(first + limit, len(whole)))]
    if held:
        yield Situation.join(held)


def choice_probability(world: World, users: Users, situation: Situation) -> np.ndarray:
    """(R, I) in the simulator's own item order. Mixes over what is not known of persona and taste; a query keeps what matches it."""
    shop, asked, memory = world.catalogue, situation.asked, situation.memory
    type_RF = np.einsum("rz,rzf->rf", situation.persona_BZ, type_share(world, users, memory, asked))
    shelf_free_RS = shelf_utility(world, users, memory, asked, np.arange(len(shop.type_S))[None]).astype(np.float64)
    item_RI = np.exp(item_utility(world, users, memory, asked, np.arange(shop.items)[None]).astype(np.float64))
    mixed_RI = np.zeros_like(item_RI)
    for taste in range(len(world.taste_KI)):
        rows = np.flatnonzero(situation.taste_BK[:, taste] > 1e-9)
        if not len(rows):
            continue
        shelf_RS = np.exp(shelf_free_RS[rows] + world.shelf_CKS[asked.scenario_B[rows], taste])
        sum_RF = np.add.reduceat(shelf_RS, shop.shelf_of_type_F1[:-1], axis=1)
        liked_RI = item_RI[rows] * np.exp(world.taste_KI[taste].astype(np.float64))
        sum_RS = np.add.reduceat(liked_RI, shop.item_of_shelf_S1[:-1], axis=1)
        share_RS = shelf_RS / np.maximum(sum_RF, 1e-300)[:, shop.type_S] * situation.taste_BK[rows, taste][:, None]
        mixed_RI[rows] += liked_RI * (share_RS / np.maximum(sum_RS, 1e-300))[:, shop.shelf_I]
    chosen_RI = mixed_RI * type_RF[:, shop.type_I]
    searched = np.flatnonzero(situation.form_B >= 0)
    if len(searched):
        everything = np.arange(shop.items)[None]
        chosen_RI[searched] *= queries.matches(shop, situation.form_B[searched], situation.wanted_B[searched], everything)
    return chosen_RI / chosen_RI.sum(1, keepdims=True)


def slate_value(world: World, users: Users, situation: Situation, item_RL: np.ndarray, real_RL: np.ndarray) -> np.ndarray:
    """(R, 4): expected clicks, carts, purchases, turnover of each slate, over all that persona and taste may be."""
    value_R4 = np.zeros((len(situation), 4))
    asked, memory, shop = situation.asked, situation.memory, world.catalogue
    type_RZL = np.take_along_axis(type_share(world, users, memory, asked), shop.type_I[item_RL][:, None], axis=2)
    pieces_RL = np.where(world.cycle_F[shop.type_I[item_RL]] > 0, 1 + MEAN_EXTRA, 1.0) * shop.price_I[item_RL]
    within_RKL, mass_RK = within_type(world, users, situation, item_RL)
    within_RKL = np.where(real_RL[:, None], within_RKL, 0)
    searched_R = situation.form_B >= 0
    taste_RK = situation.taste_BK * np.where(searched_R[:, None], mass_RK, 1)
    taste_RK = taste_RK / taste_RK.sum(1, keepdims=True)
    for taste in range(len(world.taste_KI)):
        cart_RL, buy_RL = action_probability(world, users, memory, asked, item_RL, world.taste_KI[taste][item_RL])
        for persona in range(type_RZL.shape[1]):
            weight_R = taste_RK[:, taste] * np.where(searched_R, persona == 0, situation.persona_BZ[:, persona])
            rows = np.flatnonzero(weight_R > 1e-12)
            if not len(rows):
                continue
            share_RL = within_RKL[rows, taste] * np.where(searched_R[rows, None], 1, type_RZL[rows, persona])
            click_RL = share_RL / (OUTSIDE + share_RL.sum(1, keepdims=True))
            bought_RL = click_RL * cart_RL[rows] * buy_RL[rows]
            parts = (click_RL, click_RL * cart_RL[rows], bought_RL, bought_RL * pieces_RL[rows])
            value_R4[rows] += weight_R[rows, None] * np.stack([part.sum(1) for part in parts], axis=1)
    return value_R4


def within_type(world: World, users: Users, situation: Situation, item_RL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, K, L) P(item | its product type, taste, query if any), and (R, K) P(query's word | type, taste), 1 without query."""
    share_RKL = _within(world, users, situation, item_RL)
    mass_RK = np.ones(share_RKL.shape[:2])
    shop = world.catalogue
    searched = np.flatnonzero(situation.form_B >= 0)
    if len(searched):
        asked = situation[searched]
        every_RJ, real_RJ = candidates(shop.item_of_shelf_S1[shop.shelf_of_type_F1], shop.type_I[asked.wanted_B])
        match_RJ = real_RJ & queries.matches(shop, asked.form_B, asked.wanted_B, every_RJ)
        mass_RK[searched] = (_within(world, users, asked, every_RJ) * match_RJ[:, None]).sum(2)
        match_RL = queries.matches(shop, asked.form_B, asked.wanted_B, item_RL[searched])
        share_RKL[searched] *= match_RL[:, None] / mass_RK[searched][:, :, None]
    return share_RKL, mass_RK


def _within(world: World, users: Users, situation: Situation, item_RL: np.ndarray) -> np.ndarray:
    """(R, K, L): P(item | its product type, taste) before any query; 0 outside the pool."""
    shop, (requests, places) = world.catalogue, item_RL.shape
    each = situation[np.repeat(np.arange(requests), places)]
    item_N, every = item_RL.ravel(), np.arange(item_RL.size)
    shelf_N = shop.shelf_I[item_N]
    shelf_NX, real_NX = candidates(shop.shelf_of_type_F1, shop.type_S[shelf_N])
    shelf_free_NX = np.where(real_NX, shelf_utility(world, users, each.memory, each.asked, shelf_NX), -np.inf)
    item_NX, real_NX = candidates(shop.item_of_shelf_S1, shelf_N)
    item_free_NX = np.where(real_NX, item_utility(world, users, each.memory, each.asked, item_NX), -np.inf)
    shares = []
    with np.errstate(invalid="ignore"):
        for taste in range(len(world.taste_KI)):
            shelf_share_NX = softmax(shelf_free_NX + world.shelf_CKS[each.asked.scenario_B[:, None], taste, shelf_NX])
            item_share_NX = softmax(item_free_NX + world.taste_KI[taste][item_NX])
            shelf_place_N, item_place_N = shelf_N - shop.shelf_of_type_F1[shop.type_S[shelf_N]], item_N - shop.item_of_shelf_S1[shelf_N]
            shares.append(np.nan_to_num(shelf_share_NX[every, shelf_place_N] * item_share_NX[every, item_place_N]))
    return np.stack(shares, axis=1).reshape(requests, places, -1).transpose(0, 2, 1)
