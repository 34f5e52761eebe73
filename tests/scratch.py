"""A scratch checkout with two experiments, for tests of what reads and writes checkouts."""

import json
import pathlib
import shutil
import subprocess

from grug_keras.experiments.checkout import Checkout
from grug_keras.training.record import seal
from grug_keras.training.source import source_of

ROOT = pathlib.Path(__file__).parent.parent
STARTER = (ROOT / "speedruns" / "grugformer_starter.py").read_text()
SINKS = (ROOT / "speedruns" / "grugformer_attn_sink.py").read_text()
ARCHIVE = """# Archive

```text
### <experiment-id>
- Path: `<no entry: it is in a code block>`
```

## Experiments

### grugformer-sink
- Path: `speedruns/grugformer_sink.py`
- Bucket: attention
- Introduced: {commit}
- Status: active
- Purpose: Sinks.
- Verdict: pending

### grugformer-starter
- Path: `speedruns/grugformer_starter.py`
- Bucket: none
- Introduced: {commit}
- Status: active
- Purpose: The baseline.
- Verdict: baseline
"""
PATH = "speedruns/grugformer_sink.py"


def git(folder, *arguments):
    who = ["-c", "user.name=grug", "-c", "user.email=grug"]
    command = ["git", "-C", folder, *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder, message="A change"):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD")


def make(root):
    """Makes a checkout whose archive agrees with its scripts, git and results."""
    git(root, "init", "-q", "-b", "main")
    (root / "docs").mkdir()
    (root / "speedruns").mkdir()
    for package in ("grug_keras", "ops"):  # stand for the code that makes numbers
        (root / package).mkdir()
        (root / package / "model.py").write_text("answer = 42\n")
    (root / ".gitignore").write_text("runs/\n__pycache__/\n")
    (root / "docs" / "archive.md").write_text(ARCHIVE.format(commit="pending"))
    (root / "speedruns" / "grugformer_starter.py").write_text(STARTER)
    (root / PATH).write_text(SINKS)
    first = commit(root, "Scripts")
    (root / "docs" / "archive.md").write_text(ARCHIVE.format(commit=first[:10]))
    commit(root, "Filled")
    return Checkout(root)


def copy(checkout, root):
    shutil.copytree(checkout.root, root)
    return Checkout(root)


def edit(checkout, old, new, path="docs/archive.md"):
    file = checkout.root / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def run_record(checkout, folder="runs/one", **changes):
    """Makes the folder of a run as training leaves it."""
    run = {
        "schema": 5,
        "id": pathlib.Path(folder).name,
        "experiment": "grugformer_sink",
        "status": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "command": "python elsewhere/speedruns/grugformer_sink.py --steps 3 --out there --resume "
        "--seed 1",
        "identity": f"identity of {changes.get('seed', 1)}",
        "source": source_of(checkout.root / PATH, checkout.root / "grug_keras"),
        "config": {"max_seq_len": 128},
        "curve": [[1, 5.0], [3, 4.0]],
        "commit": checkout.git("rev-parse", "HEAD"),
        "dirty": False,
        "size": "smoke",
        "seed": 1,
        "recipe": {"steps": 3, "learning_rate": 0.02, "batch_size": 8},
        "optimizer": "Muon",
        "dtype": "float32",
        "packing": "stream",
        "data": {"name": "python_stdlib", "sha256": "d" * 64},
        "tokenizer": {"name": "bytes", "sha256": None},
        "backend": "jax",
        "device": {"kind": "cpu", "count": 1, "cpu_cores": 2, "processor": "x"},
        "mesh": None,
        "versions": {"keras": "3"},
        "parameters": 10,
        "parameters_non_embedding": 5,
        "flops_per_token": 60,
        "mfu_convention": "6N",
        "steps": 3,
        "tokens": 300,
        "seconds": 1.5,
        "compile_seconds": 1.0,
        "ms_per_step": 500.0,
        "tokens_per_second": 200,
        "mfu": None,
        "peak_memory_bytes": 1,
        "train_loss": 2.0,
        "loss": 2.1,
        "bits_per_byte": 3.0,
        **changes,
    }
    folder = checkout.root / folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(seal(run)))
    return folder
