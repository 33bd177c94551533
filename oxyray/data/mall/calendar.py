"""Days of the shop: seasons, feasts, and the weather of each city, drawn from a seed around the city's climate.

Dates are real (the lunar feasts of 2023 to 2026 stand below), cities too, so that a reasoner with knowledge of the world can use them.
All cities share one clock, UTC+8; times are epoch seconds. Legend: D days, Y cities, P parts of the day.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np

DAY = 86_400
LAST_DAY = dt.date(2025, 7, 1)
"""The shop's log ends here, whatever its length."""
CLOCK = 8 * 3600

SEASONS = ("winter", "spring", "summer", "autumn")
PARTS = ("night", "morning", "noon", "evening")
_PART_OF_HOUR = np.repeat([0, 1, 2, 3, 0], [6, 5, 3, 8, 2])
CONDITIONS = ("clear", "rain", "snow", "haze")
WARMTH = ("hot", "cold")

CITIES = {
    # name: (mean of January, mean of July in °C, share of rainy days in winter, in summer, share of haze days in winter, share of users)
    "Harbin": (-18, 23, 0.15, 0.40, 0.20, 0.09),
    "Urumqi": (-12, 25, 0.20, 0.20, 0.20, 0.05),
    "Beijing": (-3, 27, 0.06, 0.35, 0.30, 0.16),
    "Xi'an": (0, 27, 0.12, 0.30, 0.30, 0.09),
    "Shanghai": (5, 29, 0.30, 0.40, 0.12, 0.17),
    "Wuhan": (4, 30, 0.27, 0.38, 0.15, 0.10),
    "Chengdu": (6, 26, 0.25, 0.48, 0.20, 0.12),
    "Kunming": (9, 20, 0.10, 0.55, 0.02, 0.06),
    "Guangzhou": (14, 29, 0.20, 0.50, 0.06, 0.13),
    "Sanya": (22, 29, 0.10, 0.45, 0.00, 0.03),
}

FEASTS = ("newyear", "love", "child", "dragon", "sale", "school", "moon", "national", "solstice", "xmas")
_LUNAR = {
    "Spring Festival": ("newyear", 16, ("2023-01-22", "2024-02-10", "2025-01-29", "2026-02-17")),
    "Dragon Boat Festival": ("dragon", 9, ("2023-06-22", "2024-06-10", "2025-05-31", "2026-06-19")),
    "Qixi Festival": ("love", 7, ("2023-08-22", "2024-08-10", "2025-08-29", "2026-08-19")),
    "Mid-Autumn Festival": ("moon", 14, ("2023-09-29", "2024-09-17", "2025-10-06", "2026-09-25")),
}
_FIXED = {
    # name: (tag, days of shopping before it, days it lasts, month, day)
    "Valentine's Day": ("love", 8, 1, 2, 14),
    "Labour Day": ("national", 7, 4, 5, 1),
    "Children's Day": ("child", 9, 1, 6, 1),
    "618 Festival": ("sale", 4, 3, 6, 16),
    "Back to School": ("school", 12, 5, 8, 28),
    "National Day": ("national", 8, 6, 10, 1),
    "Singles' Day": ("sale", 4, 2, 11, 10),
    "Winter Solstice": ("solstice", 5, 1, 12, 21),
    "Christmas": ("xmas", 9, 1, 12, 25),
    "New Year's Day": ("sale", 2, 1, 1, 1),
}


@dataclass(frozen=True)
class Calendar:
    """`first` is the epoch second at which day 0 begins (midnight, UTC+8). `feast_D` names a day's feast ("" none)."""

    first: int
    days: int
    season_D: np.ndarray
    feast_tag_DT: np.ndarray
    feast_D: tuple[str, ...]
    condition_DY: np.ndarray
    temperature_DY: np.ndarray

    @property
    def last(self) -> int:
        return self.first + self.days * DAY

    def day(self, time: np.ndarray) -> np.ndarray:
        """Day number of epoch seconds."""
        return np.clip((np.asarray(time) - self.first) // DAY, 0, self.days - 1).astype(np.int64)

    def part(self, time: np.ndarray) -> np.ndarray:
        """Part of the day, an index into PARTS: night 22 to 6, morning to 11, noon to 14, then evening."""
        return _PART_OF_HOUR[(np.asarray(time) - self.first) % DAY // 3600]

    def date(self, day: int) -> dt.date:
        return dt.date.fromordinal(LAST_DAY.toordinal() - self.days + int(day))


def build(days: int, rng: np.random.Generator) -> Calendar:
    """The `days` days before LAST_DAY."""
    dates = [dt.date.fromordinal(LAST_DAY.toordinal() - days + day) for day in range(days)]
    first = int(dt.datetime(dates[0].year, dates[0].month, dates[0].day, tzinfo=dt.UTC).timestamp()) - CLOCK
    season_D = np.array([(date.month % 12) // 3 for date in dates])
    feast_DT = np.zeros((days, len(FEASTS)), np.float32)
    names, nearest = [""] * days, [0.0] * days
    for name, tag, lead, lasts, when in _feasts():
        for day, date in enumerate(dates):
            ahead = (when - date).days
            if -lasts < ahead <= lead:
                strength = 1 - max(ahead, 0) / (lead + 1) * 0.7
                feast_DT[day, FEASTS.index(tag)] = max(feast_DT[day, FEASTS.index(tag)], strength)
                if strength > nearest[day]:
                    names[day], nearest[day] = name, strength
    condition_DY, temperature_DY = _weather(dates, rng)
    return Calendar(first, days, season_D, feast_DT, tuple(names), condition_DY, temperature_DY)


def _feasts() -> list[tuple[str, str, int, int, dt.date]]:
    """(name, tag, days of shopping before, days it lasts, date)."""
    years = range(2023, 2027)
    fixed = [
        (name, tag, lead, lasts, dt.date(year, month, day)) for name, (tag, lead, lasts, month, day) in _FIXED.items() for year in years
    ]
    lunar = [(name, tag, lead, 2, dt.date.fromisoformat(date)) for name, (tag, lead, dates) in _LUNAR.items() for date in dates]
    return fixed + lunar


def _weather(dates: list[dt.date], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Condition (index into CONDITIONS) and temperature in °C: a yearly wave, and spells of some days about it."""
    climate_YC = np.array(list(CITIES.values()))
    turn_D = np.array([(date.timetuple().tm_yday - 15) / 365 * 2 * np.pi for date in dates])
    summer_D1 = ((1 - np.cos(turn_D)) / 2)[:, None]
    noise_DY = rng.normal(0, 1, (len(dates), len(CITIES)))
    spell_DY = np.zeros_like(noise_DY)
    for day in range(len(dates)):
        spell_DY[day] = (0.75 * spell_DY[day - 1] if day else 0) + noise_DY[day] * 0.66
    temperature_DY = np.round(climate_YC[:, 0] + (climate_YC[:, 1] - climate_YC[:, 0]) * summer_D1 + 3.0 * spell_DY)
    wet_DY = rng.random(noise_DY.shape) < climate_YC[:, 2] + (climate_YC[:, 3] - climate_YC[:, 2]) * summer_D1
    haze_DY = rng.random(noise_DY.shape) < climate_YC[:, 4] * (1 - summer_D1)
    condition_DY = np.select([wet_DY & (temperature_DY <= 0), wet_DY, haze_DY], [2, 1, 3], 0)
    return condition_DY.astype(np.int8), temperature_DY.astype(np.float32)
