"""The archive as data: what it refuses, in a scratch repository, and that ours is true."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

from grug_keras.experiments import leaderboard
from grug_keras.experiments.archive import BUCKETS, Archive
from grug_keras.experiments.check import check
from grug_keras.experiments.new import new_experiment
from grug_keras.experiments.recorded import Recorded, portable_command
from grug_keras.experiments.repository import Repository
from grug_keras.experiments.reproduce import reproduce, verdict
from grug_keras.experiments.scripts import load_speedrun
from grug_keras.experiments.trail import delete, fill, record, supersede
from grug_keras.results import seal
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STARTER = (ROOT / "speedruns" / "grugformer_starter.py").read_text()
SINKS = (ROOT / "speedruns" / "grugformer_attn_sink.py").read_text()
ARCHIVE = """# Archive

```text
### <experiment-id>
- Path: `<not an entry: it is fenced>`
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


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository of two scripts with a true archive."""
    root = tmp_path_factory.mktemp("template")
    git(root, "init", "-q", "-b", "main")
    (root / "docs").mkdir()
    (root / "speedruns").mkdir()
    (root / ".gitignore").write_text("runs/\n__pycache__/\n")
    (root / "docs" / "archive.md").write_text(ARCHIVE.format(commit="pending"))
    (root / "speedruns" / "grugformer_starter.py").write_text(STARTER)
    (root / PATH).write_text(SINKS)
    first = commit(root, "Scripts")
    (root / "docs" / "archive.md").write_text(ARCHIVE.format(commit=first[:10]))
    leaderboard.write(Repository(root))
    commit(root, "Filled")
    return root


@pytest.fixture
def repository(template, tmp_path):
    shutil.copytree(template, tmp_path / "tree")
    return Repository(tmp_path / "tree")


def edit(repository, old, new, path="docs/archive.md"):
    file = repository.root / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def run_record(repository, folder="runs/one", **changes):
    """A run's folder as the harness leaves it."""
    run = {
        "schema": 3, "id": pathlib.Path(folder).name, "experiment": "grugformer_sink",
        "status": "finished", "started": "2026-01-01T00:00:00+00:00", "command":
        "python elsewhere/speedruns/grugformer_sink.py --steps 3 --out there --resume --seed 1",
        "commit": repository.head(), "dirty": False, "size": "smoke", "seed": 1,
        "recipe": {"steps": 3}, "optimizer": "Muon", "dtype": "float32", "packing": "stream",
        "data": {"name": "python_stdlib", "sha256": "d" * 64},
        "tokenizer": {"name": "bytes", "sha256": None}, "backend": "jax",
        "device": {"kind": "cpu", "count": 1, "cpu_cores": 2}, "mesh": None,
        "versions": {"keras": "3"}, "parameters": 10, "parameters_non_embedding": 5,
        "flops_per_token": 60, "mfu_convention": "6N", "steps": 3, "tokens": 300, "seconds": 1.5,
        "compile_seconds": 1.0, "ms_per_step": 500.0, "tokens_per_second": 200, "mfu": None,
        "peak_memory_bytes": 1, "train_loss": 2.0, "loss": 2.1, "bits_per_byte": 3.0, **changes,
    }  # fmt: skip
    folder = repository.root / folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(seal(run)))
    return folder


def problems(repository):
    return [str(problem) for problem in check(repository)]


def test_our_own_archive_is_true():
    assert problems(Repository.find(ROOT)) == []


def test_a_true_archive_has_no_problem_and_a_fenced_template_is_no_entry(repository):
    assert problems(repository) == []
    assert list(Archive(repository).entries) == ["grugformer-sink", "grugformer-starter"]


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("- Purpose: Sinks.\n", "", 10, "Purpose is missing: add '- Purpose: ...'"),
        ("- Purpose: Sinks.", "- Why: Sinks.", 15, "'- Why: Sinks.' is no field"),
        ("- Purpose: Sinks.", "- Purpose:", 15, "is no field"),
        ("- Status: active", "- Status: fine", 14, "Status is 'fine': it is active, superseded"),
        ("- Bucket: attention", "- Bucket: heads", 12, "Bucket 'heads' is unknown: none, or of"),
        ("- Bucket: attention", "- Bucket: mlp", 12, "changes nothing of its bucket mlp"),
        ("- Bucket: attention", "- Bucket: none", 12, "changes attention too (SinkAttention over"),
        ("### grugformer-starter", "### grugformer-sink", 18, "the id is that of line 10 too"),
        ("- Verdict: pending", "- Verdict: pending\n- Verdict: baseline", 17, "given twice"),
        ("grugformer_sink.py`", "gone.py`", 11, "it is active, and speedruns/gone.py does not"),
        ("- Status: active", "- Status: deleted", 11, "it is deleted, and speedruns/grugformer_"),
        ("- Status: active", "- Status: superseded", 10, "Superseded by is missing"),
        ("- Status: active", "- Status: superseded", 10, "Last known-good is missing, of a super"),
        ("- Introduced: ", "- Introduced: pending\n- Issue: ", 13, "it is pending, but .*archive"),
        ("- Introduced: ", "- Introduced: TBD\n- Issue: ", 13, "Introduced is 'TBD': a commit"),
        ("- Introduced: ", "- Introduced: 1234567\n- Issue: ", 13, "1234567 is no commit of"),
        ("- Status: active", "- Last known-good: {head}\n- Status: active", 14, "take the field"),
        ("- Verdict: pending", "- Verdict: better by far", 16, "quotes no committed result"),
        ("- Verdict: pending", "- Result: 1.0\n- Verdict: pending", 16, "quotes no committed"),
        ("- Verdict: pending", "- Verdict: pending\n- Superseded by: grugformer-starter", 17,
         "it is active and superseded by grugformer-starter"),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_true_is_named_by_line_with_a_remedy(
    repository, old, new, line, sentence
):
    edit(repository, old, new.replace("{head}", repository.head()))
    pattern = re.escape(sentence).replace(re.escape(".*"), ".*")
    found = problems(repository)
    assert any(re.search(f"^docs/archive.md:{line}: grugformer-sink: .*{pattern}", p)
               for p in found), found  # fmt: skip


def test_commits_must_be_of_this_history_and_hold_the_path(repository):
    first = Archive(repository).entries["grugformer-sink"].fields["Introduced"]
    git(repository.root, "checkout", "-q", "-b", "aside")
    (repository.root / "note").write_text("aside")
    aside = commit(repository.root)
    git(repository.root, "checkout", "-q", "main")
    edit(repository, f"Introduced: {first}", f"Introduced: {aside}")
    assert "no ancestor of HEAD" in problems(repository)[0]
    (repository.root / "speedruns" / "grugformer_late.py").write_text(SINKS)
    edit(repository, f"Introduced: {aside}", f"Introduced: {first}")
    edit(repository, PATH, "speedruns/grugformer_late.py")
    assert any("does not have speedruns/grugformer_late.py" in p for p in problems(repository))


def test_pending_is_allowed_while_the_path_is_new_and_no_longer(repository):
    name, path = new_experiment(repository, "late", "mlp", "Late.")
    assert problems(repository) == []
    assert fill(repository) == ([], [name])
    added = commit(repository.root)
    assert problems(repository) == [], "a commit cannot know its own name"
    (repository.root / "note").write_text("more")
    commit(repository.root)
    assert f"it is pending, but {path} is in an earlier commit" in problems(repository)[0]
    assert fill(repository) == ([name], [])
    assert Archive(repository).entries[name].fields["Introduced"] == added[:10]
    assert problems(repository) == []


def test_replacements_resolve_and_go_in_no_circle(repository):
    head = repository.head()
    end = f"- Status: superseded\n- Superseded by: {{}}\n- Last known-good: {head}"
    edit(repository, "- Status: active", end.format("grugformer-starter"))
    assert problems(repository) == []
    edit(repository, "by: grugformer-starter", "by: nothing-of-the-kind")
    assert "no id of this archive and no commit" in problems(repository)[0]
    edit(repository, "by: nothing-of-the-kind", "by: grugformer-starter")
    edit(repository, "- Status: active", end.format("grugformer-sink"))
    assert sum("goes in a circle" in p for p in problems(repository)) == 2


def test_every_script_has_one_entry(repository):
    (repository.root / "speedruns" / "grugformer_stray.py").write_text(SINKS)
    assert "speedruns/grugformer_stray.py has no entry: add one" in problems(repository)[0]
    edit(repository, "speedruns/grugformer_starter.py", PATH)
    assert any("is the path of grugformer-sink too" in p for p in problems(repository))


IMPORTS = "import Recipe, main\n"
# A method of the core with its names changed; and one for a part of a longer one.
COPIED_METHOD = """

class Mine:
    def make(self, shape):
        self.gate_proj.build(shape)
        self.up_proj.build(shape)
        self.down_proj.build((*shape[:-1], self.config.intermediate_dim))
"""
COPIED_PART = """

class Mine:
    def make(self, x, positions, attention_mask):
        print("mine")
"""


def pasted():
    """Most of `CausalSelfAttention.heads`."""
    text = (ROOT / "grug_keras" / "attention.py").read_text()
    body = text[text.index("        B, S, D = keras.ops.shape(x)") :]
    return body[: body.index("        return self.attend")]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (IMPORTS, IMPORTS + COPIED_METHOD, "Mine.make is a copy of model.MLP.build; subclass it"),
        (IMPORTS, IMPORTS + COPIED_PART + pasted(), "Mine.make is a copy of attention.CausalSelf"),
        ("RECIPES = {", "import grugformer_starter\nRECIPES = {", "imports another script, "
         "grugformer_starter: copy what you need"),
        ("RECIPES = {", "from speedruns import grugformer_starter\nRECIPES = {", "imports another"),
        ("RECIPES = {", "#\n" * 150 + "RECIPES = {", "lines, 150 at most"),
        ("RECIPES = {", "RECIPES = {{", "is no Python"),
        ("def build_model", "def make_model", "has no build_model"),
        ('if __name__ == "__main__":', "if True:", "runs when it is imported: call main under"),
        ("import Recipe, main", "import Recipe, mane", "cannot be imported: ImportError"),
        ("Grugformer(config, bl", "Grugformer(confi, bl", "cannot be built: NameError"),
        ("learning_rate=0.02)", "learning_rate=0.03)", "changes optimizer too (recipe.learning_r"),
        ("weight_decay=0.01", "weight_decay=0.02", "changes optimizer too (optimizer.weight"),
    ],
)  # fmt: skip
def test_a_script_that_is_no_delta_is_refused(repository, old, new, sentence):
    edit(repository, old, new, PATH)
    found = problems(repository)
    assert any(sentence in problem for problem in found), found


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_new_experiment_is_a_delta_of_its_bucket(repository, bucket):
    name, path = new_experiment(repository, "idea-2", bucket, "An\n  idea.")
    entry = Archive(repository).entries[name]
    assert (name, entry.path, entry.buckets) == ("grugformer-idea-2", path, {bucket})
    assert entry.fields["Purpose"] == "An idea."
    text = (repository.root / path).read_text()
    assert text.startswith(f'"""An idea.\n\nCommand: python {path}\n"""\n')
    ruff = [sys.executable, "-m", "ruff", "format", "--diff", "--line-length", "100", path]
    done = subprocess.run(ruff, cwd=repository.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    load_speedrun(repository.root / path)
    if bucket == "optimizer":  # there is nothing to override: it must be edited first
        assert "changes nothing of its bucket optimizer" in problems(repository)[0]
        edit(repository, "adam_lr_ratio=0.3", "adam_lr_ratio=0.2", path)
    assert problems(repository) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Sink", "mlp", "x"), "idea='Sink' must be small letters"),
        (("../sink", "mlp", "x"), "must be small letters"),
        (("sink", "mlp", "x"), "has an entry, grugformer-sink, active: choose another name"),
        (("other", "heads", "x"), "bucket='heads' is none of attention, block, mlp"),
        (("other", "mlp", " "), "purpose='' must be a line of words"),
        (("other", "mlp", 'a """ b'), "must be a line of words, for a docstring"),
    ],
)
def test_a_new_experiment_needs_a_name_and_a_bucket(repository, arguments, message):
    with pytest.raises(ValueError, match=message):
        new_experiment(repository, *arguments)
    assert repository.changed() == []


def test_results_are_recorded_quoted_and_sealed(repository):
    assert record(repository, run_record(repository)) == ["grugformer-sink"]
    record(repository, run_record(repository, "runs/two", seed=2, bits_per_byte=3.2))
    record(repository, run_record(repository, "runs/again"))  # a seed counts once
    leaderboard.write(repository)
    assert problems(repository) == []
    entry = Archive(repository).entries["grugformer-sink"]
    assert entry.fields["Result"].startswith("3.100 ± 0.141 bits per byte (2 seeds), 3 steps of")
    file = repository.root / "docs" / "results" / "grugformer-sink.json"
    kept = json.loads(file.read_text())["runs"][0]
    assert kept["command"] == f"python {PATH} --steps 3 --seed 1"
    text = file.read_text()
    file.write_text(text.replace("3.2", "2.2"))
    assert "was edited: it no longer says what was measured" in problems(repository)[0]
    file.write_text(text)
    edit(repository, "3.100 ±", "2.100 ±")
    assert (
        "Result is not what docs/results/grugformer-sink.json holds; write"
        in (problems(repository)[0])
    )
    edit(repository, "2.100 ±", "3.100 ±")
    edit(repository, "| 3.100 ± 0.141 | 2 |", "| 2.100 ± 0.141 | 2 |", leaderboard.PAGE)
    assert "it is not what the results say: `grug leaderboard`" in problems(repository)[0]
    file.rename(file.with_name("stray.json"))
    assert any("stray.json belongs to no entry" in p for p in problems(repository))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "interrupted"}, "is interrupted: --resume it"),
        ({"dirty": True}, "changes that no commit has: commit them, run it again"),
        ({"commit": None}, "changes that no commit has"),
        ({"commit": "0" * 40}, "is of commit 0000000000, which is no ancestor of HEAD"),
        ({"experiment": "grugformer_gone"}, "has no entry 'speedruns/grugformer_gone.py'"),
    ],
)
def test_a_run_that_proves_nothing_is_not_recorded(repository, changes, message):
    folder = run_record(repository, **changes)
    with pytest.raises(ValueError, match=message):
        record(repository, folder)
    assert repository.changed() == []


def test_a_run_whose_record_was_edited_is_not_recorded(repository):
    folder = run_record(repository)
    file = folder / "results.json"
    file.write_text(file.read_text().replace('"bits_per_byte": 3.0', '"bits_per_byte": 1.0'))
    with pytest.raises(ValueError, match="was edited: it no longer says what was measured"):
        record(repository, folder)
    with pytest.raises(ValueError, match="holds no run and no comparison"):
        record(repository, repository.root / "docs")


def test_an_experiment_is_superseded_then_deleted_with_its_trail(repository):
    measured = repository.head()
    record(repository, run_record(repository))
    commit(repository.root)
    supersede(repository, "grugformer-sink", "HEAD")
    entry = Archive(repository).entries["grugformer-sink"]
    assert entry.fields["Superseded by"] == repository.short("HEAD")
    assert entry.fields["Last known-good"] == measured[:10], "what its numbers are of"
    leaderboard.write(repository)
    assert problems(repository) == []
    commit(repository.root)
    delete(repository, PATH, why="The core\nhas it.")
    entry = Archive(repository).entries["grugformer-sink"]
    assert entry.status == "deleted"
    assert entry.fields["Notes"] == "The core has it."
    assert not (repository.root / PATH).exists()
    leaderboard.write(repository)
    assert problems(repository) == []
    with pytest.raises(ValueError, match="grugformer-sink is deleted already"):
        supersede(repository, "grugformer-sink", "HEAD")


@pytest.mark.parametrize(
    ("retire", "message"),
    [
        (lambda r: supersede(r, "grugformer-gone", "HEAD"), "has no entry 'grugformer-gone'; it "
         "has grugformer-sink, grugformer-starter"),
        (lambda r: supersede(r, "grugformer-sink", "grugformer-sink"), "does not replace itself"),
        (lambda r: supersede(r, "grugformer-sink", "1234567"), "--by 1234567: no id of the"),
        (lambda r: delete(r, "grugformer-sink"), "say what replaces grugformer-sink, --by"),
    ],
)  # fmt: skip
def test_a_retirement_that_leads_nowhere_is_refused(repository, retire, message):
    with pytest.raises(ValueError, match=message):
        retire(repository)
    assert repository.changed() == []


def test_a_tree_with_changes_retires_nothing(repository):
    (repository.root / "speedruns" / "grugformer_starter.py").write_text(STARTER + "\n#\n")
    with pytest.raises(
        ValueError, match="changes that no commit has, speedruns/grugformer_starter"
    ):
        delete(repository, "grugformer-sink", why="x")
    assert (repository.root / PATH).exists()


def test_a_circle_of_replacements_is_refused_when_it_is_made(repository):
    supersede(repository, "grugformer-sink", "grugformer-starter")
    with pytest.raises(ValueError, match="is superseded by grugformer-starter itself"):
        supersede(repository, "grugformer-starter", "grugformer-sink")


def test_a_commit_that_this_clone_has_not_is_named(repository, tmp_path):
    record(repository, run_record(repository))
    edit(repository, "- Status: active", "- Last known-good: 1234567\n- Status: superseded")
    with pytest.raises(ValueError, match="commit 1234567 of grugformer-sink is not in this clone"):
        reproduce(repository, "grugformer-sink")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository.root}", "shallow")
    found = problems(Repository(tmp_path / "shallow"))
    assert found == ["docs/archive.md:0: git: this clone leaves history out: git fetch "
                     "--unshallow, then check"]  # fmt: skip


def test_outside_of_a_checkout_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="run this inside a checkout of grug_keras"):
        Repository.find(tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(ValueError, match="has no docs/archive.md"):
        Repository.find(tmp_path)


def test_a_board_ranks_no_missing_number_and_mixes_no_two_texts(repository):
    recorded = Recorded(repository.root, "grugformer-sink")
    base = json.loads((run_record(repository) / "results.json").read_text())
    for number, changes in enumerate((
        {"bits_per_byte": 3.0}, {"bits_per_byte": 2.0, "steps": 9, "mfu": 0.5},
        {"bits_per_byte": None, "steps": 7}, {"bits_per_byte": float("nan"), "steps": 8},
        {"bits_per_byte": 1.0, "data": {"name": "other", "sha256": "e" * 64}},
        {"bits_per_byte": 1.5, "tokenizer": {"name": "bpe", "sha256": "f" * 64}},
    )):  # fmt: skip
        recorded.add_run({**base, "id": str(number), **changes}, PATH)
    recorded.save()
    tables = leaderboard.rows(repository)
    assert len(tables) == 3, "one for each pair of text and tokenizer"
    table = next(
        t for (text, tokens), t in tables.items() if "d" * 12 in text and tokens == "bytes"
    )
    assert [(row["rank"], row["bits"]) for row in table] == [(1, 2.0), (2, 3.0), (None, None),
                                                             (None, None)]  # fmt: skip
    page = leaderboard.page(repository)
    assert "| 1 | grugformer-sink | attention | 2.000 | 1 | smoke | 9 |" in page
    assert "| - | grugformer-sink | attention | - | 1 | smoke | 7 |" in page
    assert [p.name for p in leaderboard.write(repository)] == ["leaderboard.md", "leaderboard.png"]
    assert (repository.root / leaderboard.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_commands_are_kept_without_where_they_put_things():
    command = "python a/b.py --out runs --steps 3 --resume --seed=1 --out=x --resume r --batch 2"
    assert portable_command(command, "s/b.py") == "python s/b.py --steps 3 --seed=1 --batch 2"


def test_a_reproduced_number_says_what_differs():
    known = {"bits_per_byte": 2.0, "data": {"sha256": "a"}, "tokenizer": {"sha256": None},
             "steps": 3, "device": {}, "versions": {}, "commit": "x"}  # fmt: skip
    assert verdict(known, known) == "2.0000 bits per byte, recorded 2.0000: the same to the bit"
    other = {**known, "bits_per_byte": 2.1, "data": {"sha256": "b"}, "steps": 4}
    assert verdict(other, known).endswith(
        ": +0.1000; the text (another Python?) differs, the number of steps differs"
    )
    assert verdict(known, None) == "2.0000 bits per byte; none is recorded"
