"""The reward of one's own that docs/alignment.md shows: as it stands there it composes, loads and scores."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from oxyray.cli.compose import check, compose_config
from oxyray.reward.mapping import Mapping
from tests.reward.test_mapping import candidates, shop

PAGE = Path(__file__).parents[2] / "docs" / "alignment.md"


def test_the_documented_reward_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for language in ("python", "yaml"):
        [block] = re.findall(rf"```{language}\n# (\S+)\n(.*?)```", PAGE.read_text(), re.S)
        file = tmp_path / block[0]
        file.parent.mkdir(parents=True)
        file.write_text(block[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    config = compose_config(check(["data=mall", "reward=my_shop"], config_dir=tmp_path / "conf")).reward
    mapping = Mapping(config, shop(scenarios=["home", "budget_home"]))
    # Categories are every third item, prices rise: of 0, 3, 6, 9 the first two are up to the (lower) middle.
    found = mapping(candidates([[0, 3, 6, 9], [0, 3, 6, 9]], [-1, -1], scenario_B=torch.tensor([0, 1])))
    assert found.parts["affordable"][0].tolist() == [1, 1, 0, 0, 0]
    rest = found.total_BJ - sum(score for name, score in found.parts.items() if name != "affordable")
    assert rest[:, 0].tolist() == pytest.approx([0.2, 0.5])
