"""Whether a series of measurements grows: a trend that outliers and noise do not make.

The median of all pairwise slopes (Theil and Sen) says how much, the signs of all pairwise
differences (Mann and Kendall) whether it could be chance. A burst or one slow minute is neither.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Z_MIN: Final = 3.0  # one in 700 by chance; neighbouring samples are not quite independent
SAMPLES_MIN: Final = 12


@dataclass(frozen=True, slots=True)
class Trend:
    """`first` and `last` are medians of the first and the last quarter of the series."""

    first: float
    last: float
    growth: float  # over the whole series, by the median slope
    z: float  # of Mann and Kendall; above 3 it hardly is chance

    def grows(self, tolerance: float, floor: float = 0.0) -> bool:
        """Beyond `tolerance` of the first quarter, and beyond `floor` in the series' unit."""
        allowed = max(floor, tolerance * self.first)
        return self.z > Z_MIN and self.growth > allowed and self.last - self.first > allowed


def trend_of(values: Sequence[float]) -> Trend:
    """The trend of evenly spaced values, at least `SAMPLES_MIN`. Cost: quadratic."""
    count = len(values)
    if count < SAMPLES_MIN:
        raise ValueError(f"{count} samples say nothing of a trend; {SAMPLES_MIN} do")
    pairs = list(itertools.combinations(enumerate(values), 2))
    slope = statistics.median((b - a) / (j - i) for (i, a), (j, b) in pairs)
    signs = sum((b > a) - (b < a) for (_, a), (_, b) in pairs)
    variance = count * (count - 1) * (2 * count + 5) / 18
    same = [values.count(value) for value in set(values)]
    variance -= sum(n * (n - 1) * (2 * n + 5) for n in same) / 18
    z = (signs - math.copysign(1, signs)) / math.sqrt(variance) if variance > 0 and signs else 0.0
    quarter = max(count // 4, 1)
    return Trend(
        first=statistics.median(values[:quarter]),
        last=statistics.median(values[-quarter:]),
        growth=slope * (count - 1),
        z=z,
    )
