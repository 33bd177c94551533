"""The reward mapping: components against their definitions, weights by scenario, R*, a user's own reward, failures that name themselves."""

from __future__ import annotations

import pickle

import pytest
import torch

from oxyray.config import RewardConfig
from oxyray.errors import ConfigError, RewardError
from oxyray.reward.components import BUILT_IN, Candidates, Shop
from oxyray.reward.mapping import Mapping, join_target

Tensor = torch.Tensor
ITEMS, NAN = 12, float("nan")


def shop(**more: object) -> Shop:
    random = torch.Generator().manual_seed(3)
    made = {
        "scenarios": ["home", "search"],
        "pool_SI": torch.stack([torch.arange(ITEMS) < 8, torch.ones(ITEMS, dtype=torch.bool)]),
        "codes_IL": torch.stack([torch.arange(ITEMS) // 4, torch.arange(ITEMS) % 4], 1),
        "category_I": torch.arange(ITEMS) % 3,
        "price_I": torch.arange(ITEMS).float() + 1,
        "text_IF": torch.randn(ITEMS, 5, generator=random),
    }
    return Shop(**(made | more))  # type: ignore[arg-type]


def candidates(item_BG: list[list[int]], target_B: list[int], **more: object) -> Candidates:
    """-2 in `item_BG`: no candidate."""
    item = torch.tensor(item_BG)
    item_BJ, real_BJ, place_B = join_target(item.clamp(min=-1), item > -2, torch.tensor(target_B))
    count = len(item_BG)
    made = {
        "request_B": 100 + torch.arange(count),
        "scenario_B": torch.zeros(count, dtype=torch.long),
        "item_BJ": item_BJ,
        "real_BJ": real_BJ,
        "target_place_B": place_B,
        "trigger_B": torch.full((count,), -1),
        "last_B": torch.full((count,), -1),
        "chance_BJH": torch.rand(*item_BJ.shape, 3, generator=torch.Generator().manual_seed(1)),
    }
    return Candidates(**(made | more))  # type: ignore[arg-type]


def score(name: str, asked: Candidates, **more: object) -> Tensor:
    return BUILT_IN[name](shop(**more))(asked)


class Cheap:
    """A user's own reward."""

    def __init__(self, shop: Shop) -> None:
        self.price_I = shop.price_I

    def __call__(self, candidates: Candidates) -> Tensor:
        return 1 / self.price_I[candidates.item_BJ]


class Broken(Cheap):
    def __call__(self, candidates: Candidates) -> Tensor:
        if (candidates.item_BJ == 5).any():
            raise ZeroDivisionError("five")
        return super().__call__(candidates)


class Flat(Cheap):
    def __call__(self, candidates: Candidates) -> Tensor:
        return super().__call__(candidates).sum(1)


def own(name: str) -> RewardConfig:
    return RewardConfig(components={"own": f"{__name__}:{name}"}, weights={})


def test_the_target_is_one_more_member_unless_it_was_generated():
    item_BJ, real_BJ, place_B = join_target(
        torch.tensor([[4, 2, 2], [4, 2, -1], [1, 2, 3], [7, 7, 0]]),
        torch.tensor([[True] * 3, [True] * 3, [True] * 3, [False, True, True]]),
        torch.tensor([2, 5, -1, 7]),
    )
    assert item_BJ[:, -1].tolist() == [2, 5, -1, 7]
    assert real_BJ[:, -1].tolist() == [False, True, False, False]
    assert place_B.tolist() == [1, 3, -1, 1]


def test_format_is_the_pool_of_the_scenario():
    asked = candidates([[0, 9, -1], [0, 9, -1]], [3, 3], scenario_B=torch.tensor([0, 1]))
    found = Mapping(RewardConfig(components={"format": "format"}, weights={}), shop())(asked)
    assert found.parts["format"].tolist() == [[1, 0, 0, 1], [1, 1, 0, 1]]


def test_relative_is_the_cosine_to_query_trigger_or_last_click():
    query_BF = torch.full((4, 5), NAN)
    query_BF[0] = torch.randn(5)
    asked = candidates([[0, 9]] * 4, [3] * 4, trigger_B=torch.tensor([1, 1, -1, -1]), last_B=torch.tensor([2, 2, 2, -1]), query_BF=query_BF)
    text_IF = shop().text_IF
    assert text_IF is not None
    for b, context_F in enumerate([query_BF[0], text_IF[1], text_IF[2]]):
        want = torch.nn.functional.cosine_similarity(text_IF[[0, 9, 3]], context_F[None])
        torch.testing.assert_close(score("relative", asked)[b], want)
    assert score("relative", asked)[3].tolist() == [0, 0, 0]


def test_ranking_is_what_the_ranker_says():
    asked = candidates([[0, 9]], [3])
    assert asked.chance_BJH is not None
    torch.testing.assert_close(score("click", asked), asked.chance_BJH[..., 0])
    torch.testing.assert_close(score("conversion", asked), asked.chance_BJH[..., 2])
    torch.testing.assert_close(score("gmv", asked), asked.chance_BJH[..., 2] * torch.tensor([[1, 10, 4]]) / 6.5)


def test_taken_is_one_for_the_item_that_was_taken():
    asked = candidates([[0, 3, 9], [0, 3, 9], [0, 3, 9]], [9, 7, -1])
    assert score("taken", asked).tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_diversity_shares_a_kind_among_those_who_have_it():
    asked = candidates([[0, 3, 1, -1, -2]], [9])
    # categories 0 0 1 | 0, first codes 0 0 0 | 2
    want = torch.tensor([0.5 / 3 + 0.5 / 3, 0.5 / 3 + 0.5 / 3, 0.5 + 0.5 / 3, 0.5 / 3 + 0.5])
    found = score("diversity", asked)[0]
    torch.testing.assert_close(found[[0, 1, 2, 5]], want)
    assert want.sum().item() == pytest.approx((2 + 2) / 2)  # distinct categories and first codes


def test_weights_are_by_scenario_and_parts_stay_apart():
    config = RewardConfig(
        components={"format": "format", "click": "click", "own": f"{__name__}:Cheap", "unused": f"{__name__}:Broken"},
        weights={"default": {"click": 2.0, "unused": 0.0}, "search": {"click": -1.0, "format": 0.5}},
    )
    asked = candidates([[0, 9, 4], [5, 8, -2]], [4, 5], scenario_B=torch.tensor([0, 1]))
    mapping = Mapping(config, shop())
    found = mapping(asked)
    assert set(found.parts) == {"format", "click", "own"}
    part = found.parts
    torch.testing.assert_close(found.total_BJ[0], part["format"][0] + 2 * part["click"][0] + part["own"][0])
    torch.testing.assert_close(found.total_BJ[1], 0.5 * part["format"][1] - part["click"][1] + part["own"][1])
    torch.testing.assert_close(found.target_B, torch.stack([found.total_BJ[0, 2], found.total_BJ[1, 0]]))
    means = mapping.means(found, asked)
    assert means["home/click"] == (pytest.approx(part["click"][0, :3].mean().item()), 3)
    assert means["search/own"] == (pytest.approx((1 / 6 + 1 / 9) / 2), 2)
    assert means["all/reward"] == (pytest.approx(torch.cat([found.total_BJ[0, :3], found.total_BJ[1, :2]]).mean().item()), 5)


def test_without_a_target_r_star_is_unknown():
    found = Mapping(own("Cheap"), shop())(candidates([[0, 9], [1, 2]], [-1, 3]))
    assert found.target_B.isnan().tolist() == [True, False]
    assert found.target_B[1].item() == pytest.approx(0.25)


def test_an_sid_without_an_item_is_worth_nothing_and_is_no_failure():
    price_I = shop().price_I.clone()
    price_I[-1] = NAN  # what index -1 would read
    found = Mapping(own("Cheap"), shop(price_I=price_I))(candidates([[0, -1, -2]], [3]))
    assert found.total_BJ[0].tolist() == [1, 0, 0, 0.25]


@pytest.mark.parametrize("price", [NAN, 0.0])
def test_a_score_that_is_no_number_names_component_request_and_candidate(price: float):
    price_I = shop().price_I.clone()
    price_I[9] = price
    with pytest.raises(RewardError, match=r"reward own: request 101, candidate 1 \(item 9\) scored (nan|inf)") as caught:
        Mapping(own("Cheap"), shop(price_I=price_I))(candidates([[0, 1], [2, 9]], [3, 3]))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_item_without_a_price_has_no_turnover():
    price_I = shop().price_I.clone()
    price_I[3] = NAN
    config = RewardConfig(components={"gmv": "gmv"}, weights={})
    with pytest.raises(RewardError, match=r"reward gmv: request 100, candidate 2 \(item 3\)"):
        Mapping(config, shop(price_I=price_I))(candidates([[0, 1]], [3]))


def test_a_reward_that_breaks_is_named_and_never_a_zero():
    with pytest.raises(RewardError, match=r"reward own: request 101, candidate 1 \(item 5\): ZeroDivisionError: five"):
        Mapping(own("Broken"), shop())(candidates([[0, 1], [2, 5]], [3, 3]))
    with pytest.raises(RewardError, match=r"reward own: expected a tensor of shape \(1, 3\), got \(1,\)"):
        Mapping(own("Flat"), shop())(candidates([[0, 1]], [3]))
    with pytest.raises(RewardError, match="ranker has not scored"):
        Mapping(RewardConfig(components={"click": "click"}, weights={}), shop())(candidates([[0, 1]], [3], chance_BJH=None))


def test_one_candidate_knows_whether_it_is_the_target():
    cut = candidates([[0, 1, 2]], [1])
    assert [int(cut.only(0, j).target_place_B) for j in range(3)] == [-1, 0, -1]


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="magic"):
        RewardConfig(components={"mine": "magic"}, weights={})
    with pytest.raises(ConfigError, match=r"weights\.home\.clack"):
        RewardConfig(weights={"home": {"clack": 1.0}})
    with pytest.raises(ConfigError, match="must be a number"):
        RewardConfig(weights={"home": {"click": NAN}})
    with pytest.raises(ConfigError, match="no such scenario: hone"):
        Mapping(RewardConfig(weights={"hone": {"click": 1.0}}), shop())
    for path in ("no.such:Thing", f"{__name__}:Missing"):
        with pytest.raises(ConfigError, match=r"components\.mine"):
            Mapping(RewardConfig(components={"mine": path}, weights={}), shop())
    with pytest.raises(ConfigError, match="text vectors"):
        Mapping(RewardConfig(), shop(text_IF=None))
