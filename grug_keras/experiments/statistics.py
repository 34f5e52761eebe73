"""Statistics of paired seeds: is B better than A, and what could this comparison have seen?"""

import math
import statistics

BETTER, WORSE, EQUIVALENT, NOT_SHOWN = "better", "worse", "equivalent", "not shown"
ALPHA, POWER = 0.05, 0.8
_MOST_EXACT, _RESAMPLES = 13, 9999  # of the permutation test: 2**13 is below 9,999
# Pocock's levels of each of K equally spaced looks, for 5% in all, two-sided (Pocock, Biometrika
# 64, 1977; Jennison and Turnbull, Group Sequential Methods, 1999, table 2.1).
LEVELS = {1: 0.05, 2: 0.0294, 3: 0.0221, 4: 0.0182, 5: 0.0158}


def paired_test(a, b, margin=0.005, looks=1):
    """Compares two lists of scores, pair by pair; lower is better.

    The verdict is that of the paired t-test (Student, 1908): "better" or "worse" where the
    confidence interval of the mean difference excludes zero, else "equivalent" where two one-sided
    tests (Schuirmann, 1987) find it within the margin, else "not shown". One in twenty experiments
    that change nothing is called better or worse by chance.

    A None is a run that diverged. Such pairs are not in the mean; a side that diverged more often
    than the other is never better and never equivalent, and it is worse where so many one-sided
    divergences are unlikely by chance (exact sign test).

    Args:
        a, b: lists of float or None, of equal length. Scores of the same seed have the same index.
        margin: float, share of A's mean score within which B counts as equivalent.
        looks: int, 1 to 5, how many times the plan looks at the data; each look has its own level.

    Returns:
        dict of `n` (pairs in the mean), `diverged` (of A, of B), `p_diverged` (of the sign test
        over pairs in which one side diverged), `mean` (of A), `difference`
        (mean of b - a), `deviation` (standard deviation of the differences), `margin` (in bits),
        `confidence`, `low` and `high` (the interval of the difference), `p_t`, `p_permutation`,
        `p_equivalent` (the larger of the two one-sided tests'),
        `least_p` (of the permutation test with so few pairs), `detectable` (the smallest effect
        seen with a power of 80%), `pairs_for_margin` (pairs that make it the margin) and
        `verdict` on b. What cannot be known is None.

    Raises:
        ValueError: for empty lists, lists of different lengths, or scores that are not finite.

    Example:

    >>> paired_test([2.04, 2.01, 2.05], [1.94, 1.90, 1.96])["verdict"]
    'better'
    """
    _check_scores(a, b, looks)
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    differences = [y - x for x, y in pairs]
    mean = statistics.fmean(x for x, _ in pairs) if pairs else None
    level = LEVELS[looks]
    result = {
        "n": len(pairs),
        "diverged": [a.count(None), b.count(None)],
        "p_diverged": _sign_p(
            sum(x is None and y is not None for x, y in zip(a, b, strict=True)),
            sum(y is None and x is not None for x, y in zip(a, b, strict=True)),
        ),
        "mean": mean,
        "difference": statistics.fmean(differences) if pairs else None,
        "deviation": None,
        "margin": margin * mean if pairs else None,
        "confidence": 1 - level,
        **dict.fromkeys(("low", "high", "p_t", "p_permutation", "p_equivalent")),
        "least_p": _least_p(len(pairs)),
        **dict.fromkeys(("detectable", "pairs_for_margin")),
    }
    if len(pairs) > 1:
        deviation = statistics.stdev(differences)
        result["deviation"] = deviation
        if deviation > 1e-12:  # equal differences have no spread to measure them by
            result["low"], result["high"], result["p_t"] = _t_test(differences, 1 - level)
            result["p_equivalent"] = _equivalence_p(differences, result["margin"])
            result["p_permutation"] = _permutation_p(differences)
            result["detectable"] = detectable(deviation, len(pairs), level)
            result["pairs_for_margin"] = pairs_needed(deviation, result["margin"], level)
    return {**result, "verdict": _verdict(result)}


def _verdict(result):
    """Returns the verdict on B of all other figures."""
    more = result["diverged"][1] - result["diverged"][0]
    if more and result["p_diverged"] < 1 - result["confidence"]:
        return WORSE if more > 0 else BETTER
    found = NOT_SHOWN
    if result["low"] is not None:
        if result["low"] > 0:
            found = WORSE
        elif result["high"] < 0:
            found = BETTER
        elif result["p_equivalent"] < 1 - result["confidence"]:
            found = EQUIVALENT
    against = {WORSE} if more < 0 else {BETTER}
    return NOT_SHOWN if more and found in {EQUIVALENT, *against} else found


def _sign_p(x, y):
    """Returns the two-sided p of x events on one side and y on the other, if both are as likely."""
    import scipy.stats

    return float(scipy.stats.binomtest(x, x + y).pvalue) if x + y else 1.0


def _least_p(pairs):
    """Returns the least p that `_permutation_p` can give."""
    return min(1.0, 2 / 2**pairs) if pairs <= _MOST_EXACT else 2 / (_RESAMPLES + 1)


def _check_scores(a, b, looks):
    if len(a) != len(b) or not a:
        raise ValueError(
            f"a and b must hold equally many scores, at least one, got {len(a)}, {len(b)}"
        )
    for name, scores in (("a", a), ("b", b)):
        bad = [score for score in scores if score is not None and not math.isfinite(score)]
        if bad:
            raise ValueError(f"{name} must hold finite scores, got {bad[0]}")
    if looks not in LEVELS:
        raise ValueError(f"looks must be one of {', '.join(map(str, LEVELS))}, got {looks}")


def _t_test(differences, confidence):
    """Returns the two ends of the confidence interval of the mean, and the p of a mean of zero."""
    import scipy.stats

    test = scipy.stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(confidence)
    return float(low), float(high), float(test.pvalue)


def _equivalence_p(differences, margin):
    """Returns the larger p of two one-sided tests that the mean is not within the margin."""
    import scipy.stats

    above = scipy.stats.ttest_1samp(differences, -margin, alternative="greater")
    below = scipy.stats.ttest_1samp(differences, margin, alternative="less")
    return float(max(above.pvalue, below.pvalue))


def _permutation_p(differences):
    """Returns the two-sided p of a sign-flip test of a mean of zero (Fisher, 1935).

    Up to 13 differences all signs are tried, else 9,999 random choices of them.
    """
    import numpy as np
    import scipy.stats

    found = scipy.stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def power(effect, deviation, pairs, level=ALPHA):
    """Returns the chance that a paired t-test sees an effect.

    Args:
        effect: float > 0, true mean difference.
        deviation: float > 0, standard deviation of the differences.
        pairs: int >= 2.
        level: float, of the two-sided test.
    """
    import scipy.stats

    reach = scipy.stats.t.ppf(1 - level / 2, pairs - 1)
    shift = effect / deviation * math.sqrt(pairs)
    # The other tail is a chance in a million wherever the power is of interest.
    return float(scipy.stats.nct.sf(reach, pairs - 1, shift))


def detectable(deviation, pairs, level=ALPHA):
    """Returns the smallest effect that a paired t-test sees with a power of 80%; as `power`."""
    import scipy.optimize

    high = 1.0
    while power(high, 1.0, pairs, level) < POWER:
        high *= 2
    return deviation * scipy.optimize.brentq(
        lambda effect: power(effect, 1.0, pairs, level) - POWER, 1e-9, high
    )


def pairs_needed(deviation, effect, level=ALPHA):
    """Returns the number of pairs with which `effect` is detectable; None beyond 100,000."""
    low, high = 1, 2  # too few, perhaps enough
    while detectable(deviation, high, level) > effect:
        low, high = high, 2 * high
        if high > 100_000:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = detectable(deviation, middle, level) <= effect
        low, high = (low, middle) if enough else (middle, high)
    return high


def sequence(pairs, looks=5):
    """Returns the numbers of pairs at which a group-sequential plan looks, the last being `pairs`.

    Raises:
        ValueError: if the first look would have fewer than three pairs.
    """
    if pairs < 3 * looks:
        raise ValueError(f"until must be at least {3 * looks}, for {looks} looks, got {pairs}")
    return [round(pairs * look / looks) for look in range(1, looks + 1)]
