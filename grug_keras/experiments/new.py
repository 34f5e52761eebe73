"""Starts a new experiment: a script with something to edit, and an entry in the archive."""

import ast
import inspect
import re
import textwrap

from grug_keras.best_guess import build_optimizer
from grug_keras.data.files import write_atomically
from grug_keras.experiments.archive import BUCKETS, PENDING, Archive
from grug_keras.experiments.script import STARTER


def _source(function):
    """Returns the source of a function without its docstring."""
    lines = inspect.getsource(function).splitlines(keepends=True)
    docstring = ast.parse("".join(lines)).body[0].body[0]
    return "".join(lines[: docstring.lineno - 1] + lines[docstring.end_lineno :])


_NEW_BLOCK = "Grugformer(config, block_class=NewBlock)"
# For each bucket: names to import, the code to edit, which changes nothing yet, and the model.
_EDITS = {
    "attention": (
        ("Block", "CausalSelfAttention"),
        """class NewAttention(CausalSelfAttention):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask)


class NewBlock(Block):
    attention_class = NewAttention
""",
        _NEW_BLOCK,
    ),
    "block": (
        ("Block",),
        """class NewBlock(Block):
    def call(self, x, positions=None, attention_mask=None):
        return super().call(x, positions=positions, attention_mask=attention_mask)
""",
        _NEW_BLOCK,
    ),
    "mlp": (
        ("MLP", "Block"),
        """class NewMLP(MLP):
    def call(self, x):
        return super().call(x)


class NewBlock(Block):
    mlp_class = NewMLP
""",
        _NEW_BLOCK,
    ),
    "loss": (
        (),
        """class NewModel(Grugformer):
    def token_mean_loss(self, hidden, labels, weights):
        return super().token_mean_loss(hidden, labels, weights)
""",
        "NewModel(config)",
    ),
    "optimizer": (
        ("Muon",),
        _source(build_optimizer),
        "Grugformer(config)",
    ),
}


def new_experiment(checkout, idea, bucket, purpose):
    """Writes `speedruns/grugformer_<idea>.py` and its entry in the archive.

    Args:
        checkout: `Checkout`.
        idea: str, small letters, digits and underscores, as in `warm_gate`.
        bucket: str, one of `archive.BUCKETS`.
        purpose: str, one line: what is tried, and why.

    Returns:
        Pair of the entry's id and the script's path, relative to the checkout.

    Raises:
        ValueError: for an invalid argument, or a name that is taken.
    """
    idea = idea.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", idea):
        raise ValueError(f"idea={idea!r} must be small letters, digits and _, as in warm_gate")
    if bucket not in BUCKETS:
        raise ValueError(f"bucket={bucket!r} must be one of {', '.join(BUCKETS)}")
    purpose = " ".join(purpose.split())
    if not purpose or '"""' in purpose or "\\" in purpose:
        raise ValueError(
            f'purpose={purpose!r} must be a line of words without """ or \\, for a docstring'
        )
    name, path = f"grugformer-{idea.replace('_', '-')}", f"speedruns/grugformer_{idea}.py"
    archive, script = Archive(checkout), checkout.root / path
    if name in archive.entries:
        status = archive.entries[name].status
        raise ValueError(f"idea={idea!r} has an entry, {name}, {status}: choose another name")
    if script.exists():
        raise ValueError(f"{path} exists: choose another name")
    starter = (checkout.root / STARTER).read_text(encoding="utf-8")
    text = script_text(starter, path, bucket, purpose)
    write_atomically(script, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    fields = {
        "Path": f"`{path}`",
        "Bucket": bucket,
        "Introduced": PENDING,
        "Status": "active",
        "Purpose": purpose,
        "Verdict": PENDING,
    }
    archive.add(name, fields)
    return name, path


def script_text(starter, path, bucket, purpose):
    """Returns the source of a new script: the starter with something to edit.

    Args:
        starter: str, source of the starter.
        path: str, path of the new script.
        bucket: str, one of `archive.BUCKETS`.
        purpose: str, one line.

    Returns:
        str.

    Raises:
        ValueError: if the starter lacks a line that is replaced here.
    """
    imports, code, model = _EDITS[bucket]
    imports = sorted({"Grugformer", *imports}, key=lambda name: (not name.isupper(), name))
    model_function = f"def build_model(config):\n    return {model}\n"
    main = "main(__file__, build_model)"
    if bucket == "optimizer":
        functions = f"{model_function}\n\n{code}"
        new_main = "main(__file__, build_model, build_optimizer=build_optimizer)"
    else:
        functions = f"{code}\n\n{model_function}"
        new_main = main
    text = starter
    for pattern, new in (
        (
            r'\A"""(?s:.*?)"""\n',
            f'"""{textwrap.fill(purpose, 95)}\n\nCommand: python {path}\n"""\n',
        ),
        (r"^from grug_keras import .*$", f"from grug_keras import {', '.join(imports)}"),
        (r"^def build_model\(config\):\n    return Grugformer\(config\)\n", functions),
        (rf"{re.escape(main)}$", new_main),
    ):
        text, count = re.subn(pattern, lambda _, new=new: new, text, count=1, flags=re.M)
        if not count:
            raise ValueError(f"{STARTER} has no line that matches {pattern!r}, to build on")
    return text
