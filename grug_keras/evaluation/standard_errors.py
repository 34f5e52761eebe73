"""Means of dependent measurements, and how far they would move with other files."""

import math

import numpy as np


def figure(value, error, n, **more):
    """Returns a measurement as a record holds it.

    Args:
        value: float.
        error: float, its standard error, or None where that is unknown.
        n: int, how many items it is of.
        **more: what else is said of it.
    """
    known = error is not None and math.isfinite(error)
    return {"value": rounded(value), "error": rounded(error) if known else None, "n": n, **more}


def rounded(value):
    """Returns a float of five digits after the point."""
    return round(float(value), 5)


def standard_error(influences, clusters):
    """Returns the standard error of a statistic whose items are drawn in clusters.

    Items of one file are not independent: files are what could have been others. The influences
    of a cluster add up, and the squares of those sums give the error (K.-Y. Liang and S. Zeger,
    Longitudinal data analysis using generalized linear models, 1986), with the factor C / (C - 1)
    of few clusters.

    Args:
        influences: float array `(n,)`, how far each item moves the statistic; they sum to 0.
        clusters: array `(n,)`, the cluster of each item.

    Returns:
        float, or None of fewer than two clusters.

    Example:

    >>> standard_error((x - x.mean()) / len(x), np.arange(len(x)))  # that of a plain mean
    """
    _, number = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(number, np.asarray(influences, "float64"))
    count = len(sums)
    return math.sqrt(count / (count - 1) * np.sum(sums**2)) if count > 1 else None


def mean(values, clusters):
    """Returns the figure of a mean over items in clusters; see `standard_error`."""
    values = np.asarray(values, "float64")
    value = values.mean()
    influences = (values - value) / len(values)
    return figure(value, standard_error(influences, clusters), len(values))


def ratio(above, below, clusters=None):
    """Returns the figure of a ratio of sums, such as bits per byte, by the delta method.

    Args:
        above, below: float arrays `(n,)`.
        clusters: array `(n,)`, or None: each item is drawn by itself.
    """
    above, below = np.asarray(above, "float64"), np.asarray(below, "float64")
    value = above.sum() / below.sum()
    clusters = np.arange(len(above)) if clusters is None else clusters
    influences = (above - value * below) / below.sum()
    return figure(value, standard_error(influences, clusters), len(above))


def macro_mean(values, groups, clusters):
    """Returns the figure of the mean over groups of each group's mean.

    Args:
        values: float array `(n,)`.
        groups: list of str, the group of each item.
        clusters: array `(n,)`; items of several groups may be in one.

    Returns:
        dict of `value`, `error`, `n`, and `parts`: the figure of each group by its name.
    """
    values, clusters = np.asarray(values, "float64"), np.asarray(clusters)
    chosen = {name: np.asarray(groups) == name for name in dict.fromkeys(groups)}
    influences, means = np.zeros(len(values)), []
    for items in chosen.values():
        means.append(values[items].mean())
        influences[items] = (values[items] - means[-1]) / (items.sum() * len(chosen))
    parts = {name: mean(values[items], clusters[items]) for name, items in chosen.items()}
    error = standard_error(influences, clusters)
    return figure(np.mean(means), error, len(values), parts=parts)
