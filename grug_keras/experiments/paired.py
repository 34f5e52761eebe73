"""Is B better than A? Statistics of paired seeds, from scipy."""

import math

BETTER, WORSE, NOT_SHOWN = "better", "worse", "not shown"


def paired_test(a, b, confidence=0.95):
    """Compares two lists of scores, pair by pair; lower is better.

    The verdict is that of the paired t-test (Student, 1908): "better" or "worse" where the
    confidence interval of the mean difference leaves zero out. Of experiments that change nothing
    it calls one in twenty better or worse by chance. The permutation test (Fisher, 1935) assumes
    no normal distribution; of five pairs it cannot say less than p = 2 / 2**5 = 0.06.

    Args:
        a, b: lists of floats, of equal length. Scores of the same seed stand at the same place.
        confidence: float in (0, 1).

    Returns:
        dict of `n`, `difference` (mean of b - a), `low`, `high` (its confidence interval),
        `p_t`, `p_permutation` and `verdict` on b; None what one pair cannot tell.

    Raises:
        ValueError: for lists of other lengths, empty ones, or scores that are not finite.

    Example:

    >>> paired_test([2.04, 2.01, 2.05], [1.94, 1.90, 1.96])["verdict"]
    'better'
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b must hold as many scores, at least one, got {len(a)}, {len(b)}")
    for name, scores in (("a", a), ("b", b)):
        bad = [score for score in scores if score is None or not math.isfinite(score)]
        if bad:
            raise ValueError(f"{name} must hold finite scores, got {bad[0]}")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    result = {
        "n": len(a),
        "difference": sum(differences) / len(differences),
        "confidence": confidence,
        "low": None,
        "high": None,
        "p_t": None,
        "p_permutation": None,
        "verdict": NOT_SHOWN,
    }
    if len(a) == 1:
        return result
    if len(set(differences)) == 1:  # no spread to measure against, as of a run and itself
        same = differences[0] == 0
        p = 1.0 if same else 0.0
        result |= {"low": differences[0], "high": differences[0], "p_t": p}
    else:
        import scipy.stats

        test = scipy.stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(confidence)
        result |= {"low": float(low), "high": float(high), "p_t": float(test.pvalue)}
    result["p_permutation"] = _permutation(differences)
    if result["low"] > 0:
        result["verdict"] = WORSE
    elif result["high"] < 0:
        result["verdict"] = BETTER
    return result


def _permutation(differences):
    """How often signs drawn at random give as large a mean; all of them up to 13 pairs."""
    import numpy as np
    import scipy.stats

    found = scipy.stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
