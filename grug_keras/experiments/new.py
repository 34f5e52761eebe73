"""A new experiment: the starter's frame, a class to edit, and an entry in the archive."""

import re
import textwrap

from grug_keras.experiments.archive import BUCKETS, PENDING, Archive
from grug_keras.experiments.scripts import STARTER
from grug_keras.results import write_atomically

# What an edit surface looks like: names to import, classes, and the model. It changes nothing yet.
_EDITS = {
    "attention": (
        ("Block", "CausalSelfAttention"),
        """class NewAttention(CausalSelfAttention):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask)


class NewBlock(Block):
    attention_class = NewAttention
""",
        "Grugformer(config, block_class=NewBlock)",
    ),
    "block": (
        ("Block",),
        """class NewBlock(Block):
    def call(self, x, positions=None, attention_mask=None):
        return super().call(x, positions=positions, attention_mask=attention_mask)
""",
        "Grugformer(config, block_class=NewBlock)",
    ),
    "mlp": (
        ("Block", "MLP"),
        """class NewMLP(MLP):
    def call(self, x):
        return super().call(x)


class NewBlock(Block):
    mlp_class = NewMLP
""",
        "Grugformer(config, block_class=NewBlock)",
    ),
    "loss": (
        (),
        """class NewModel(Grugformer):
    def token_mean_loss(self, hidden, labels, weights):
        return super().token_mean_loss(hidden, labels, weights)
""",
        "NewModel(config)",
    ),
    "optimizer": ((), None, "Grugformer(config)"),
}


def new_experiment(repository, idea, bucket, purpose):
    """Writes `speedruns/grugformer_<idea>.py` and its entry.

    Args:
        repository: `Repository`.
        idea: str, small letters, digits and underscores: `warm_gate`.
        bucket: str, of `BUCKETS`.
        purpose: str, one line: what is tried, and why.

    Returns:
        Pair of the entry's id and the script's path in the repository.

    Raises:
        ValueError: for a name that is none, or is taken.
    """
    idea = idea.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", idea):
        raise ValueError(f"idea={idea!r} must be small letters, digits and _, as in warm_gate")
    if bucket not in BUCKETS:
        raise ValueError(f"bucket={bucket!r} is none of {', '.join(BUCKETS)}")
    purpose = " ".join(purpose.split())
    if not purpose or '"""' in purpose or "\\" in purpose:
        raise ValueError(f"purpose={purpose!r} must be a line of words, for a docstring")
    name, path = f"grugformer-{idea.replace('_', '-')}", f"speedruns/grugformer_{idea}.py"
    archive = Archive(repository)
    if name in archive.entries:
        raise ValueError(f"idea={idea!r} has an entry, {name}, {archive.entries[name].status}: "
                         "choose another name")  # fmt: skip
    script = repository.root / path
    if script.exists():
        raise ValueError(f"{path} exists: choose another name")
    text = frame((repository.root / STARTER).read_text(encoding="utf-8"), path, bucket, purpose)
    write_atomically(script, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    archive.add(
        name,
        {
            "Path": f"`{path}`",
            "Bucket": bucket,
            "Introduced": PENDING,
            "Status": "active",
            "Purpose": purpose,
            "Verdict": PENDING,
        },
    )
    return name, path


def frame(starter, path, bucket, purpose):
    """The starter's text with the edit surface of a bucket.

    Args:
        starter: str, source of the starter.
        path: str, where the script will stand.
        bucket: str, of `BUCKETS`.
        purpose: str.

    Raises:
        ValueError: if the starter has not the lines that this builds on.
    """
    names, classes, model = _EDITS[bucket]
    head = f'"""{textwrap.fill(purpose, 95)}\n\nCommand: python {path}\n"""\n'
    names = sorted({"Grugformer", "Muon", *names}, key=lambda name: (not name.isupper(), name))
    text = starter
    for pattern, new in (
        (r'\A"""(?s:.*?)"""\n', head),
        (r"^from grug_keras import .*$", f"from grug_keras import {', '.join(names)}"),
        (r"^    return Grugformer\(config\)$", f"    return {model}"),
        (r"^(?=def build_model)", f"{classes}\n\n" if classes else ""),
    ):
        text, count = re.subn(pattern, lambda _, new=new: new, text, count=1, flags=re.M)
        if not count:
            raise ValueError(f"{STARTER} has no line like {pattern!r} to build on")
    return text
