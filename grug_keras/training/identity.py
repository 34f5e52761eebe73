"""The identity of a run: two runs that share it have the same numbers."""

import dataclasses
import hashlib
import json

from grug_keras.training.initial_weights import find_initial


def run_identity(
    *, source, versions, flags, recipe, options, config, data, tokenizer, backend, device
):
    """Hashes all that makes the numbers of a run.

    Neither the commit nor a path is part of it: files that make no number may change, branches
    may be squashed, and a corpus may move.

    Args:
        source: dict, of `source.source_of`.
        versions: dict of library -> version.
        flags: dict, of `provenance.flags`.
        recipe: `Recipe`.
        options: `RunOptions`.
        config: `GrugConfig` that the script is given.
        data: dict, of `TokenData.describe`.
        tokenizer: `Tokenizer`.
        backend: str.
        device: dict, of `provenance.device`.

    Returns:
        str, 16 hexadecimal digits.
    """
    made_of = {
        "source": source,
        "versions": versions,
        "flags": flags,
        "recipe": dataclasses.asdict(recipe),
        "options": [options.size, options.packing, options.seed, options.dtype_policy],
        "mesh": options.mesh,
        "config": config.as_dict(),
        "data": _without_names(data),
        "tokenizer": tokenizer.sha256 or tokenizer.name,
        "backend": backend,
        "device": device,
    }
    if options.init is not None:
        made_of["init"] = find_initial(options.init).sha256
    text = json.dumps(made_of, sort_keys=True, default=float)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_names(data):
    """Returns the description of data without the names, which are paths, of it and its sources."""
    kept = {name: value for name, value in data.items() if name != "name"}
    if "sources" in kept:
        kept["sources"] = [_without_names(source) for source in kept["sources"]]
    return kept
