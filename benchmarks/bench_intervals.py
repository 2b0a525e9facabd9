"""How often a 95 % interval of `lssl.benchmark.statistics` holds the true difference, and how often bold is wrong.

    python benchmarks/bench_intervals.py [DRAWS]

A table of a difference is drawn as ``x[s, n] = a_s + b_map(n) + c_n + e_sn`` with true mean 0, in several patterns of
the four standard deviations; the interval should then hold 0 in 95 % of the draws. ``percentile`` is the two-way
percentile bootstrap, for comparison. The second table counts tables of five strategies, none of which differs from
scratch, with a bold row. The third is the coverage where seeds rotate over seven subjects: seed s trains on some,
validates on the next and is tested on the others, so the table has holes. One core, about a minute.
"""

from __future__ import annotations

import sys

import numpy as np

from lssl.benchmark.statistics import holm, two_way

SEEDS = (1, 2, 3, 5, 10)
#: name → sd of seeds, maps, subjects, residual; subjects; subjects of one map
PATTERNS = {
    "all alike, 10 subjects": (1.0, 0.0, 1.0, 1.0, 10, 1),
    "seeds vary most": (1.0, 0.0, 0.2, 0.5, 10, 1),
    "subjects vary most": (0.1, 0.0, 1.0, 0.5, 10, 1),
    "residual varies most": (0.1, 0.0, 0.1, 1.0, 10, 1),
    "no seed effect, 6 subjects": (0.0, 0.0, 1.0, 1.0, 6, 1),
    "12 subjects of 6 maps": (0.5, 1.0, 0.5, 0.5, 12, 2),
}
ROTATED = {  # name → sd of seeds, subjects, residual
    "all alike": (1.0, 1.0, 1.0),
    "seeds vary most": (1.0, 0.2, 0.5),
    "subjects vary most": (0.1, 1.0, 0.5),
    "residual varies most": (0.1, 0.1, 1.0),
}


def draw(random: np.random.Generator, draws: int, seeds: int, pattern: tuple, strategies: int = 1) -> np.ndarray:
    """``(draws, strategies, seeds, subjects)`` differences whose true mean is 0, independent between strategies."""
    of_seed, of_map, of_subject, rest, subjects, per_map = pattern
    shape = (draws, strategies)
    maps = of_map * random.normal(size=(*shape, 1, subjects // per_map)).repeat(per_map, -1)
    own = of_subject * random.normal(size=(*shape, 1, subjects))
    by_seed = of_seed * random.normal(size=(*shape, seeds, 1))
    return by_seed + maps + own + rest * random.normal(size=(*shape, seeds, subjects))


def clustered(values: np.ndarray, per_map: int) -> np.ndarray:
    """Means of the subjects of each map."""
    return values.reshape(*values.shape[:-1], -1, per_map).mean(-1)


def rotated(values: np.ndarray, train: int) -> np.ndarray:
    """``(…, S, N)`` without what seed s has trained or validated on: subjects s to s + train."""
    seeds, subjects = np.indices(values.shape[-2:])
    return np.where((subjects - seeds) % values.shape[-1] <= train, np.nan, values)


def rotated_coverage(draws: int, train: int, pattern: tuple, seed: int = 0) -> float:
    """Share of intervals that hold the true difference, of seven seeds that rotate over seven subjects."""
    of_seed, of_subject, rest = pattern
    values = draw(np.random.default_rng(seed), draws, 7, (of_seed, 0.0, of_subject, rest, 7, 1))[:, 0]
    low, high, _ = two_way(rotated(values, train))
    return float(((low <= 0) & (high >= 0)).mean())


def coverage(draws: int, seeds: int, pattern: tuple, seed: int = 0) -> float:
    """Share of intervals that hold the true difference; NaN where there is no interval."""
    values = clustered(draw(np.random.default_rng(seed), draws, seeds, pattern)[:, 0], pattern[-1])
    low, high, _ = two_way(values)
    return float("nan") if np.isnan(low).any() else float(((low <= 0) & (high >= 0)).mean())


def percentile_coverage(draws: int, seeds: int, pattern: tuple, seed: int = 0, resamples: int = 400) -> float:
    """The same of a percentile bootstrap over seeds and subjects, which knows no maps."""
    random = np.random.default_rng(seed)
    inside = 0
    for values in draw(random, draws, seeds, pattern)[:, 0]:
        often = [random.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in values.shape]
        low, high = np.quantile(np.einsum("ds,sn,dn->d", often[0], values, often[1], optimize=True), [0.025, 0.975])
        inside += low <= 0 <= high
    return inside / draws


def false_bold(draws: int, seeds: int, pattern: tuple, seed: int = 0, strategies: int = 5) -> tuple[float, float]:
    """Share of tables with a bold row though no strategy differs: Holm over the rows, and each row by itself.

    A row is bold if its difference is significant and above 0.
    """
    random = np.random.default_rng(seed)
    values = clustered(draw(random, draws, seeds, pattern, strategies), pattern[-1])
    _, _, p = two_way(values)
    above = values.mean((-2, -1)) > 0
    corrected = np.array([holm(row) for row in p])
    return tuple(float(((each < 0.05) & above).any(1).mean()) for each in (corrected, p))  # type: ignore[return-value]


def main(draws: int) -> None:
    """Prints the tables."""
    print(f"{draws} draws\n\n| coverage of 95 % | seeds | ours | percentile |\n|---|--:|--:|--:|")
    for name, pattern in PATTERNS.items():
        for seeds in SEEDS:
            ours = coverage(draws, seeds, pattern)
            text = "no interval" if np.isnan(ours) else f"{ours:.3f}"
            print(f"| {name} | {seeds} | {text} | {percentile_coverage(max(200, draws // 20), seeds, pattern):.2f} |")
    print("\n| tables with a false bold row | seeds | Holm | uncorrected |\n|---|--:|--:|--:|")
    for name, pattern in PATTERNS.items():
        for seeds in SEEDS[1:]:
            corrected, alone = false_bold(draws, seeds, pattern)
            print(f"| {name} | {seeds} | {corrected:.3f} | {alone:.3f} |")
    print("\n| coverage of 95 %, seven rotated | 1 trained on | 3 | 4 |\n|---|--:|--:|--:|")
    for name, pattern in ROTATED.items():
        shares = (rotated_coverage(draws, train, pattern) for train in (1, 3, 4))
        print(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
