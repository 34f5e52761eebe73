"""Identity by content: what changes the code of a run, and what does not."""

import dataclasses
import json
import pathlib
import subprocess

from grug_keras.best_guess import RECIPES
from grug_keras.data import load_data
from grug_keras.experiments.snapshot import snapshot
from grug_keras.training.identity import run_identity
from grug_keras.training.model_config import size_config
from grug_keras.training.options import RunOptions
from grug_keras.training.provenance import SNAPSHOT, git_state
from grug_keras.training.source import PARTS, code_hash, source_of, text_hash
import pytest
import scratch
from scratch import PATH, commit, edit

CODE = '''
class Layer:
    """What it is."""

    def call(self, x):
        """What it does."""
        return x + 1  # why
'''


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (CODE.replace("# why", "# because"), True),
        (CODE.replace("What it does.", "What else it does."), True),
        (CODE.replace("What it is.", "").replace('"""What it does."""', ""), True),
        (CODE.replace("x + 1", "(x\n            + 1)"), True),
        (CODE.replace("x + 1", "x + 2"), False),
        (CODE.replace("x + 1", "1 + x"), False),
        (CODE.replace("Layer", "Layers"), False),
        (CODE + '\nTEXT = """What it is."""\n', False),
    ],
)
def test_code_is_what_runs(changed, same):
    assert (text_hash(changed) == text_hash(CODE)) == same


def test_a_script_that_is_no_python_is_named_with_its_line(tmp_path):
    (tmp_path / "it.py").write_text("x = 1\nx = = 2\n")
    with pytest.raises(ValueError, match=r"it.py: line 2 is not valid Python"):
        code_hash(tmp_path / "it.py")


@pytest.fixture
def checkout(tmp_path):
    return scratch.make(tmp_path)


def parts_that_differ(before, after):
    return [part for part in before if before[part] != after[part]]


def test_each_part_answers_for_its_own_files(checkout):
    root, script = checkout.root, checkout.root / PATH
    before = source_of(script, root / "grug_keras")
    assert list(before) == [*PARTS, "script"]
    for name, part in [
        ("grug_keras/model.py", ["core"]),
        ("ops/it.py", ["ops"]),
        ("grug_keras/optimizers/muon.py", ["optimizers"]),
        ("grug_keras/cli/it.py", []),
        ("grug_keras/experiments/compare.py", []),
        ("grug_keras/data/notes.txt", []),
        ("grug_keras/training/plots.py", []),
        ("grug_keras/training/loop.py", ["training"]),
        (PATH, ["script"]),
    ]:
        file = root / name
        old = file.read_bytes() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.write_text("answer = 44\n")
        assert parts_that_differ(before, source_of(script, root / "grug_keras")) == part, name
        file.unlink() if old is None else file.write_bytes(old)


def test_what_is_installed_hashes_as_the_checkout_does(checkout, tmp_path):
    """Installed, and in a snapshot, `ops` is inside of the package."""
    with snapshot(checkout.root, [PATH]) as code:
        expected = source_of(checkout.root / PATH, checkout.root / "grug_keras")
        assert code.source(PATH) == expected


def test_a_tree_is_dirty_by_its_code_alone(checkout, monkeypatch):
    root, script = checkout.root, checkout.root / PATH
    monkeypatch.setattr("grug_keras.training.provenance.source_of", lambda *a: "the same")
    head = checkout.git("rev-parse", "HEAD")
    for name in ("loss.png", "docs/new.md", "speedruns/other.py", "nohup.out"):
        (root / name).write_text("x = 1")
    assert git_state(script) == (head, False), "none of these makes a number"
    commit(root, "Pictures")
    (root / "grug_keras" / "new.py").write_text("x = 1")
    assert git_state(script)[1] is True
    commit(root, "Code")
    edit(checkout, "zeros", "ones", PATH)
    assert git_state(script)[1] is True
    assert git_state(root / "speedruns" / "grugformer_starter.py")[1] is False


def test_a_snapshot_stays_as_it_was_and_says_what_it_is_of(checkout):
    edit(checkout, "zeros", "ones", PATH)
    with snapshot(checkout.root, [PATH]) as code:
        before = code.source(PATH)
        edit(checkout, "ones", "twos", PATH)
        (checkout.root / "grug_keras" / "model.py").write_text("answer = 43\n")
        assert 'initializer="ones"' in code.script(PATH).read_text()
        assert source_of(code.script(PATH), code.folder / "package" / "grug_keras") == before
        assert (code.commit, code.dirty) == (checkout.git("rev-parse", "HEAD"), True)
        assert git_state(code.script(PATH)) == (checkout.git("rev-parse", "HEAD"), True)
        assert json.loads((code.folder / SNAPSHOT).read_text())["commit"] == checkout.git(
            "rev-parse", "HEAD"
        )
        folder = code.folder
    assert not folder.exists()


def test_outside_of_git_there_is_no_commit(checkout, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    subprocess.run(["cp", "-r", checkout.root / "speedruns", bare], check=True)
    assert git_state(bare / PATH) == (None, None)


@pytest.fixture(scope="module")
def made_of(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("one and two make three.\n" * 400)
    data = load_data(str(text))
    return {
        "source": {"core": "a", "script": "b"},
        "versions": {"keras": "3"},
        "flags": {},
        "recipe": RECIPES["smoke"],
        "options": RunOptions(),
        "config": size_config("smoke", 257),
        "data": data.describe(),
        "tokenizer": data.tokenizer,
        "backend": "jax",
        "device": {"kind": "cpu", "cpu_cores": 1},
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", {"core": "a", "script": "c"}),
        ("versions", {"keras": "4"}),
        ("flags", {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}),
        ("recipe", dataclasses.replace(RECIPES["smoke"], learning_rate=0.03)),
        ("recipe", dataclasses.replace(RECIPES["smoke"], weight_decay=0.03)),
        ("options", RunOptions(seed=1)),
        ("options", RunOptions(packing="best_fit")),
        ("options", RunOptions(dtype="mixed_bfloat16")),
        ("config", size_config("smoke", 257, 64)),
        ("backend", "torch"),
        ("device", {"kind": "cpu", "cpu_cores": 2}),
    ],
)
def test_whatever_makes_a_number_is_part_of_the_identity(made_of, name, value):
    assert run_identity(**{**made_of, name: value}) != run_identity(**made_of)


def test_neither_places_nor_what_is_left_behind_is_part_of_the_identity(made_of):
    data = {**made_of["data"], "name": "elsewhere/text.txt"}
    options = RunOptions(out="elsewhere", save_every=7, results_only=True, norms=True)
    moved = {**made_of, "data": data, "options": options}
    assert run_identity(**moved) == run_identity(**made_of)


def test_a_squashed_branch_still_has_the_code_of_its_runs(checkout):
    root = checkout.root
    scratch.git(root, "checkout", "-q", "-b", "idea")
    edit(checkout, "zeros", "ones", PATH)
    measured = commit(root, "Idea")
    source = source_of(root / PATH, root / "grug_keras")
    assert checkout.commit_of(source, PATH, measured) == measured
    scratch.git(root, "checkout", "-q", "main")
    assert checkout.commit_of(source, PATH, measured) is None, "not merged"
    scratch.git(root, "merge", "-q", "--squash", "idea")
    squashed = commit(root, "Idea, squashed")
    (root / "docs" / "more.md").write_text("more")
    commit(root, "Documents")
    edit(checkout, "ones", "twos", PATH)
    commit(root, "Another idea")
    assert checkout.source(checkout.commit_of(source, PATH, measured), PATH) == source
    assert pathlib.Path(root, PATH).is_file()
    assert squashed != measured
