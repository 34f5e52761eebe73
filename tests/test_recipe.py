"""docs/recipe.md, every command of it, from an idea to a deleted experiment that runs again."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from grug_keras.experiments.archive import Archive
from grug_keras.experiments.checkout import Checkout
import keras
import pytest

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = ROOT / "docs" / "recipe.md"
TINY = "--batch 16 --seq-len 64"
# The recipe as it stands, but small: what is asked of the machine, not what is done.
SMALLER = {
    "--steps 100": f"--steps 4 {TINY}",
    "--seeds 12 -- --steps 300": f"--seeds 2 --rates 0.007,0.007 -- --steps 4 {TINY}",
}
pytestmark = pytest.mark.skipif(keras.config.backend() != "jax", reason="one walk is enough")


class Walker:
    """A scratch clone of this tree, its own package, and a shell in it."""

    def __init__(self, folder):
        self.clone, self.package = folder / "clone", folder / "package"
        subprocess.run(["git", "clone", "-q", ROOT, self.clone], check=True)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, files.stdout.split("\0")):
            if (ROOT / name).is_file():
                (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.clone / name)
            else:
                (self.clone / name).unlink(missing_ok=True)
        programs = folder / "bin"
        programs.mkdir()
        for name, module in (("python", ""), ("grug", " -m grug_keras")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -P{module} "$@"\n')
            (programs / name).chmod(0o755)
        identity = {f"GIT_{who}_{what}": "grug" for who in ("AUTHOR", "COMMITTER")
                    for what in ("NAME", "EMAIL")}  # fmt: skip
        self.environment = {
            **os.environ,
            **identity,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.package),
            "JAX_PLATFORMS": "cpu",
        }
        self.install()
        if self.changed():
            self("git add -A && git commit -q -m 'As it is'")
            self("grug archive fill")
            if self.changed():
                self("git add -A && git commit -q -m 'Filled'")

    def install(self):
        """The clone's package, as `pip install -e` puts it together."""
        shutil.rmtree(self.package, ignore_errors=True)
        shutil.copytree(self.clone / "grug_keras", self.package / "grug_keras")
        shutil.copytree(self.clone / "ops", self.package / "grug_keras" / "ops")
        shutil.copytree(self.clone / "grug_keras" / "cli", self.package / "grug_cli")

    def changed(self):
        return Checkout(self.clone).changed()

    def __call__(self, command, refused=None):
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if refused is None:
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            return done.stdout
        assert done.returncode != 0, f"{command} was not refused:\n{done.stdout}"
        assert re.search(refused, done.stdout + done.stderr), f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stderr

    def entry(self, name):
        return Archive(Checkout(self.clone)).entries[name]


def commands():
    """The commands of the recipe by its headings."""
    parts = re.split(r"^## (\d)\..*$", RECIPE.read_text(), flags=re.M)[1:]
    found = {}
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.M | re.S)
        found[int(number)] = [line for block in blocks for line in block.splitlines()]
    return found


def smaller(command):
    for large, small in SMALLER.items():
        if large in command:
            return command.replace(large, small)
    raise AssertionError(f"nothing is made smaller in {command}")


def edit(path, old, new):
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    return Walker(tmp_path_factory.mktemp("walk"))


@pytest.mark.slow
def test_the_recipe_from_an_idea_to_a_deleted_experiment_that_runs_again(walker):
    steps, name = commands(), "grugformer-half-mlp"
    assert all(steps[number] for number in (2, 3, 4, 5, 6))
    script = walker.clone / "speedruns" / "grugformer_half_mlp.py"

    new, diff, *run = steps[2]
    walker(new)
    walker(new, refused="has an entry")
    walker("grug archive check")
    edit(script, "return super().call(x)", "return 0.5 * super().call(x)")
    told = walker(diff)
    assert "mlp        NewMLP overrides MLP.call" in told
    assert "+0.00%" in told
    assert "warning" not in told
    walker(f"grug archive supersede {name} --by HEAD", refused="uncommitted changes")
    train, *rest = run
    walker(smaller(train))
    (folder,) = (walker.clone / "runs").glob("grugformer_half_mlp-*")
    walker(f"grug archive record {folder}", refused="code that no commit has")
    for command in rest:
        walker(command)
    assert walker.entry(name).fields["Introduced"] != "pending"

    compare, record, *rest = steps[3]
    told = walker(smaller(compare))
    assert "B is " in told
    assert "at equal tokens" in told
    before = {p.name for p in (walker.clone / "runs").rglob("results.json")}
    walker(smaller(compare))  # nothing is left to run
    assert {p.name for p in (walker.clone / "runs").rglob("results.json")} == before
    walker(record.replace("-300-", "-4-"))
    for command in rest:
        walker(command)
    assert re.match("better|worse|not shown", walker.entry(name).fields["Verdict"])
    walker("grug leaderboard")
    board = (walker.clone / "docs" / "leaderboard.md").read_text()
    assert f"| {name} | mlp |" in board

    results = walker.clone / "docs" / "results" / f"{name}.json"
    sealed = results.read_text()
    results.write_text(sealed.replace('"bits_per_byte": ', '"bits_per_byte": 1', 1))
    walker("grug archive check", refused=f"{name}.*was edited.*Restore it with git")
    results.write_text(sealed)
    walker("git add -A && git commit -q -m 'Leaderboard'")

    core = walker.clone / "grug_keras" / "block.py"
    edit(core, "self.down_proj(gated), ", "0.5 * self.down_proj(gated), ")
    walker.install()
    check, commit, supersede, *rest = steps[4]
    walker(check)
    walker(commit)
    walker(
        supersede.replace("HEAD", "0000000"), refused="neither an id of the archive nor an ancestor"
    )
    walker(supersede)
    for command in rest:
        walker(command)
    assert walker.entry(name).status == "superseded"
    assert script.is_file()

    for command in steps[5]:
        walker(command)
    assert walker.entry(name).status == "deleted"
    assert not script.exists()
    walker("grug archive check")
    walker(f"grug archive delete {name}", refused=f"{name} is deleted already")

    (again,) = steps[6]
    told = walker(again)
    # Its own core: the one of today has half of the MLP already.
    assert "the same to the bit" in told, told
    walker("grug reproduce grugformer-never-was", refused="has no entry 'grugformer-never-was'")
    walker(f"grug compare grugformer-starter-speedrun {name}", refused=f"grug reproduce {name}")
    assert not walker.changed()


def test_the_recipe_names_no_command_that_is_not_there():
    for lines in commands().values():
        for line in lines:
            words = shlex.split(line)
            assert words[0] in ("grug", "git", "python"), line
