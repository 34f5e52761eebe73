"""Where the time of a training step goes: the compiler's cycles, part by part."""

import re

from grug_keras.tpu.hlo import _executed

KERNELS = "attention kernels"
PRODUCTS = "products with weights"
LOSS = "head and loss"


def cycles_by_part(hlo_text, model, optimizer):
    """Adds up the cycles that `hlo.static_cycles` adds up, by what they were spent on.

    An operation belongs to the first part whose pattern its scope matches: the layers it was
    called in. A fusion has the scope of one of its operations, so that neighbours blur. Collectives
    have no cycles.

    Args:
        hlo_text: str, `compiled.as_text()`.
        model, optimizer: str, their names, which are scopes.

    Returns:
        dict of part -> int.
    """
    patterns = {
        "copies to another layout": r"^copy",
        "optimizer": rf"/{re.escape(optimizer)}/",
        "embedding": "/token_embedding/",
        PRODUCTS: r"/\w+_proj/",
        "around attention": "/attention/",
        "norms, residuals, the rest of the model": rf"jvp\({re.escape(model)}\)",
        LOSS: r"jvp\(",
        "others": "",
    }
    found = dict.fromkeys(patterns, 0)
    for line, times in _executed(hlo_text):
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            name = re.match(r"\s*(?:ROOT )?%?([\w\-]+)", line)[1]
            scope = re.search(r'op_name="([^"]*)"', line)
            place = f"{name} {scope[1] if scope else ''}"
            part = next(part for part, pattern in patterns.items() if re.search(pattern, place))
            found[part] += times * int(cycles[1])
    return found
