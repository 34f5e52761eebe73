"""Minimal pairs from syntax trees: of two texts that differ in little, which is the likelier one.

The pairs of a kind are balanced: for each pair in which A is right and B is wrong there is one in
which B is right and A is wrong, or both hold the same bytes. So a model that knows no more than
how frequent things are is right in half of them.
"""

import collections
import random

from grug_keras.evaluation import standard_errors
from grug_keras.evaluation.pair_kinds import KINDS, SourceFile
from grug_keras.evaluation.scoring import bits_of, common_prefix
import numpy as np

SEED = 0
# At most, of a kind: no file decides alone, and no name of one file.
_PAIRS, _OF_A_FILE, _OF_A_NAME = 400, 80, 3
_TIE = 1e-6  # bits; rounding alone makes less of a difference


def make_pairs(files, seed=SEED):
    """Makes pairs from Python files.

    Args:
        files: list of `(name, bytes)`.
        seed: int, decides which ones are made.

    Returns:
        list of `Place`.
    """
    sources, pairs = [], []
    for name, text in sorted(files):
        if b"\r" in text or b"\f" in text:
            continue  # the positions of the tokenizer would be off
        try:
            sources.append(SourceFile(name, text))
        except (SyntaxError, ValueError):
            continue  # of another version of Python
    for kind, find in KINDS.items():
        rng, places = random.Random(f"{kind} {seed}"), []
        for source in sources:
            found = [place for place in find(source, rng) if place is not None]
            rng.shuffle(found)
            places += _few_of_each_name(found)[:_OF_A_FILE]
        rng.shuffle(places)
        words = {source.name: source.words for source in sources}
        pairs += _balanced(_partnered(places, words), rng)
    return pairs


def _few_of_each_name(places):
    """Returns places of one file, `_OF_A_NAME` of each name at most."""
    count, kept = collections.Counter(), []
    for place in places:
        count[place.right] += place.wrong is None
        if count[place.right] <= _OF_A_NAME:
            kept.append(place)
    return kept


def _partnered(places, words):
    """Gives places without a wrong text one: that of a place where it is the other way round."""
    found = [place for place in places if place.wrong is not None]
    waiting = collections.defaultdict(list)  # by length
    for place in places:
        if place.wrong is not None:
            continue
        others = waiting[len(place.right)]
        for other in others:
            if place.right not in words[other.file] and other.right not in words[place.file]:
                found += [place._replace(wrong=other.right), other._replace(wrong=place.right)]
                others.remove(other)
                break
        else:
            others.append(place)
    return found


def _balanced(places, rng):
    """Returns as many places of each right and wrong text as there are of the reverse."""
    by_texts = collections.defaultdict(list)
    for place in places:
        by_texts[place.right, place.wrong].append(place)
    chosen = []
    for (right, wrong), found in by_texts.items():
        if sorted(right) == sorted(wrong):  # the same bytes
            chosen += [(place,) for place in found]
        elif right < wrong:
            chosen += zip(found, by_texts.get((wrong, right), []), strict=False)
    rng.shuffle(chosen)
    return [place for couple in chosen for place in couple][:_PAIRS]


def score_pairs(model, tokenizer, pairs):
    """Returns how often the right text is the likelier one.

    Args:
        model: built `Grugformer`.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        pairs: list of `Place`, see `make_pairs`.

    Returns:
        dict, see `standard_errors.macro_mean`: the mean over kinds, and each kind. Files are the
        clusters.
    """
    texts = [p.before + text + p.after for p in pairs for text in (p.right, p.wrong)]
    most = model.config.max_seq_len + 1
    tokens = [np.append(tokenizer.bos_id, ids) for ids in tokenizer.encode_batch(texts)]
    bits = bits_of(model, [row[-most:] for row in tokens])
    wins = []
    for i in range(0, len(tokens), 2):
        same = common_prefix(tokens[i], tokens[i + 1])
        right, wrong = (bits[j][-(len(tokens[j]) - same) :].sum() for j in (i, i + 1))
        wins.append(0.5 if abs(right - wrong) < _TIE else float(right < wrong))
    kinds, files = [pair.kind for pair in pairs], [pair.file for pair in pairs]
    return standard_errors.macro_mean(wins, kinds, files)
