"""The archive: what its check refuses, in a scratch checkout, and that ours passes it."""

import json
import re

from grug_cli.checkout import script_path
from grug_keras.experiments.archive import Archive
from grug_keras.experiments.archive_check import check
from grug_keras.experiments.checkout import Checkout
from grug_keras.experiments.new import new_experiment
from grug_keras.experiments.record import fill, record
from grug_keras.experiments.reproduce import reproduce, verdict
from grug_keras.experiments.results_file import ResultsFile, portable_command
from grug_keras.experiments.retire import delete, supersede
from grug_keras.experiments.stale import stale
from grug_keras.training.source import source_of
import pytest
import scratch
from scratch import PATH, ROOT, SINKS, STARTER, commit, edit, git, run_record


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return scratch.make(tmp_path_factory.mktemp("template"))


@pytest.fixture
def checkout(template, tmp_path):
    return scratch.copy(template, tmp_path / "tree")


def problems(checkout):
    return [str(problem) for problem in check(checkout)]


def test_our_own_archive_agrees_with_scripts_git_and_results():
    assert problems(Checkout.find(ROOT)) == []


def test_an_archive_that_agrees_has_no_problem_and_its_template_is_no_entry(template):
    assert problems(template) == []
    assert list(Archive(template).entries) == ["grugformer-sink", "grugformer-starter"]


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("- Purpose: Sinks.\n", "", 10, "Purpose is missing: add '- Purpose: ...'"),
        ("- Purpose: Sinks.", "- Why: Sinks.", 15, "'- Why: Sinks.' is not a field"),
        ("- Purpose: Sinks.", "- Purpose:", 15, "is not a field"),
        ("- Purpose: Sinks.", "- Purpose: Sinks.\n* Notes: x", 16, "'* Notes: x' is not a field"),
        ("- Verdict: pending\n", "- Verdict: pending\n\nA thought.\n", 18, "'A thought.' is not a"),
        ("- Status: active", "- Status: fine", 14, "Status is 'fine': it must be one of active"),
        ("- Bucket: attention", "- Bucket: heads", 12, "Bucket 'heads' is unknown: write none"),
        ("- Bucket: attention", "- Bucket: mlp", 12, "changes nothing of its bucket mlp"),
        ("- Bucket: attention", "- Bucket: none", 12, "changes attention too (SinkAttention over"),
        ("### grugformer-starter", "### grugformer-sink", 18, "line 10 has the same id"),
        ("- Verdict: pending", "- Verdict: pending\n- Verdict: baseline", 17, "given twice"),
        ("grugformer_sink.py`", "gone.py`", 11, "Status is active, but speedruns/gone.py does not"),
        ("- Status: active", "- Status: deleted", 11, "Status is deleted, but speedruns/grugform"),
        ("- Status: active", "- Status: superseded", 10, "Superseded by is missing"),
        ("- Status: active", "- Status: superseded", 10, "Last known-good is missing, and Status"),
        ("- Introduced: ", "- Introduced: pending\n- Issue: ", 13, "pending, but .*archive fill"),
        ("- Introduced: ", "- Introduced: TBD\n- Issue: ", 13, "Introduced is 'TBD': write a com"),
        (
            "- Status: ",
            "- Last known-good: {head}\n- Status: ",
            14,
            "an active experiment works at",
        ),
        ("- Verdict: pending", "- Verdict: better by far", 16, "quotes no committed result"),
        ("- Verdict: pending", "- Result: 1.0\n- Verdict: pending", 16, "quotes no committed"),
        (
            "- Verdict: pending",
            "- Verdict: pending\n- Superseded by: grugformer-starter",
            17,
            "Status is active, but it is superseded by grugformer-starter",
        ),
    ],
)
def test_a_wrong_entry_is_named_by_line_with_a_remedy(checkout, old, new, line, sentence):
    edit(checkout, old, new.replace("{head}", checkout.git("rev-parse", "HEAD")))
    pattern = re.escape(sentence).replace(re.escape(".*"), ".*")
    pattern = re.compile(f"^docs/archive.md:{line}: grugformer-sink: .*{pattern}")
    found = problems(checkout)
    assert any(pattern.search(problem) for problem in found), found


def test_commits_must_be_of_this_history_and_hold_the_path(checkout):
    first = Archive(checkout).entries["grugformer-sink"].fields["Introduced"]
    (checkout.root / "speedruns" / "grugformer_late.py").write_text(SINKS)
    edit(checkout, PATH, "speedruns/grugformer_late.py")
    assert any("does not have speedruns/grugformer_late.py" in p for p in problems(checkout))
    edit(checkout, f"Introduced: {first}", "Introduced: 1234567")
    assert any("1234567 is not a commit of this clone" in p for p in problems(checkout))


def test_a_branch_that_is_squashed_or_rebased_stays_true(checkout):
    """Its commits are gone, and what they said is still so."""
    root = checkout.root
    git(root, "checkout", "-q", "-b", "idea")
    name, path = new_experiment(checkout, "idea", "mlp", "An idea.")
    commit(root, "Try it")
    fill(checkout)
    gone = Archive(checkout).entries[name].fields["Introduced"]
    measured = commit(root, "Archive")
    source = source_of(root / path, root / "grug_keras")
    record(checkout, run_record(checkout, experiment="grugformer_idea", source=source))
    commit(root, "Measured")
    git(root, "checkout", "-q", "main")
    git(root, "merge", "-q", "--squash", "idea")
    squashed = commit(root, "An idea, squashed")
    git(root, "branch", "-q", "-D", "idea")
    assert problems(checkout) == []
    assert not checkout.is_ancestor(gone)
    found = ResultsFile(root, name).own_groups()[-1]
    assert found["commit"] == measured
    assert checkout.commit_of(found["source"], path, found["commit"]) == squashed


def test_an_edited_script_does_not_keep_its_result(checkout):
    record(checkout, run_record(checkout))
    commit(checkout.root, "Measured")
    edit(checkout, "A head that has nothing", "A head without anything", PATH)
    assert problems(checkout) == [], "a docstring makes no number"
    edit(checkout, 'initializer="zeros"', 'initializer="ones"', PATH)
    (problem,) = problems(checkout)
    assert f"{PATH} has changed since Result was measured: measure and record it again" in problem


def test_results_of_another_core_are_listed_with_what_changed(checkout):
    record(checkout, run_record(checkout))
    commit(checkout.root, "Measured")
    assert stale(checkout) == []
    (checkout.root / "docs" / "new.md").write_text("more")
    edit(checkout, "answer = 42", "answer = 42  # why", "grug_keras/model.py")
    assert stale(checkout) == [], "a comment makes no number"
    edit(checkout, "answer = 42", "answer = 43", "grug_keras/model.py")
    (checkout.root / "grug_keras" / "new.py").write_text("x = 1\n")
    edit(checkout, "answer = 42", "answer = 43", "ops/model.py")
    (line,) = stale(checkout)
    assert re.match(
        r"grugformer-sink: measured at \w{10}; since then core changed \(model.py\); ops changed "
        r"\(model.py\)",
        line,
    )
    assert problems(checkout) == [], "its numbers are true, of an earlier core"


def test_pending_is_allowed_while_the_path_is_new_and_no_longer(checkout):
    name, path = new_experiment(checkout, "late", "mlp", "Late.")
    assert problems(checkout) == []
    assert fill(checkout) == ([], [name])
    added = commit(checkout.root)
    assert problems(checkout) == [], "a commit cannot know its own name"
    (checkout.root / "note").write_text("more")
    commit(checkout.root)
    assert f"Introduced is pending, but {path} is in an earlier commit" in problems(checkout)[0]
    assert fill(checkout) == ([name], [])
    assert Archive(checkout).entries[name].fields["Introduced"] == added[:10]
    assert problems(checkout) == []


def test_replacements_resolve_and_go_in_no_circle(checkout):
    head = checkout.git("rev-parse", "HEAD")
    end = f"- Status: superseded\n- Superseded by: {{}}\n- Last known-good: {head}"
    edit(checkout, "- Status: active", end.format("grugformer-starter"))
    assert problems(checkout) == []
    edit(checkout, "by: grugformer-starter", "by: nothing-of-the-kind")
    assert "is neither an id of this archive nor a commit" in problems(checkout)[0]
    edit(checkout, "by: nothing-of-the-kind", "by: grugformer-starter")
    edit(checkout, "- Status: active", end.format("grugformer-sink"))
    assert sum("form a circle" in p for p in problems(checkout)) == 2


def test_a_field_goes_on_in_the_next_lines(checkout):
    wrapped = "- Verdict: pending\n- Notes: It costs\n  little,\nand helps.\n"
    edit(checkout, "- Verdict: pending\n", wrapped)
    assert Archive(checkout).entries["grugformer-sink"].fields["Notes"] == (
        "It costs little, and helps."
    )
    assert problems(checkout) == []
    Archive(checkout).set("grugformer-sink", Issue="#1")
    assert "and helps.\n- Issue: #1\n\n### grugformer-starter" in Archive(checkout).text
    commit(checkout.root)
    delete(checkout, "grugformer-sink", why="No more.")
    lines = Archive(checkout).text.splitlines()
    assert "- Notes: It costs little, and helps. No more." in lines
    assert "and helps." not in lines
    assert problems(checkout) == []


@pytest.mark.parametrize("heading", ["## After", "# After"])
def test_a_section_after_the_entries_holds_none_of_them(checkout, heading):
    archive = checkout.root / "docs" / "archive.md"
    archive.write_text(archive.read_text() + f"\n{heading}\n\n- Anything: else\n")
    assert problems(checkout) == []
    new_experiment(checkout, "zebra", "mlp", "The last of them.")
    text = archive.read_text()
    last = "- Purpose: The last of them.\n- Verdict: pending\n"
    assert text.endswith(f"{last}\n{heading}\n\n- Anything: else\n")
    assert "- Verdict: baseline\n\n### grugformer-zebra" in text
    assert problems(checkout) == []


def test_a_document_of_any_name_blocks_nothing(checkout):
    for name in ("docs/naïve.md", 'docs/a "b" -> c.md', "docs/old.md"):
        (checkout.root / name).write_text("text\n" * 9, encoding="utf-8")
    commit(checkout.root)
    (checkout.root / "docs" / "naïve.md").write_text("other", encoding="utf-8")
    (checkout.root / 'docs/a "b" -> c.md').write_text("other", encoding="utf-8")
    git(checkout.root, "mv", "docs/old.md", "docs/new name.md")
    changed = ['docs/a "b" -> c.md', "docs/naïve.md", "docs/new name.md", "docs/old.md"]
    assert sorted(checkout.changed()) == changed
    assert checkout.changed("docs/") == []
    supersede(checkout, "grugformer-sink", "grugformer-starter")
    assert Archive(checkout).entries["grugformer-sink"].status == "superseded"


def test_a_script_of_another_place_is_named(checkout, tmp_path):
    (tmp_path / "elsewhere.py").touch()
    with pytest.raises(ValueError, match=r"elsewhere.py is outside of the checkout .*tree$"):
        script_path(checkout, tmp_path / "elsewhere.py")


def test_every_script_has_one_entry(checkout):
    (checkout.root / "speedruns" / "grugformer_stray.py").write_text(SINKS)
    assert "speedruns/grugformer_stray.py has no entry: add one" in problems(checkout)[0]
    edit(checkout, "speedruns/grugformer_starter.py", PATH)
    assert any("is the path of grugformer-sink too" in p for p in problems(checkout))


def test_results_are_recorded_quoted_and_sealed(checkout):
    assert record(checkout, run_record(checkout)) == "grugformer-sink"
    record(checkout, run_record(checkout, "runs/two", seed=2, bits_per_byte=3.2))
    record(checkout, run_record(checkout, "runs/again"))  # a seed counts once
    assert problems(checkout) == []
    entry = Archive(checkout).entries["grugformer-sink"]
    assert entry.fields["Result"].startswith("3.1000 ± 0.1414 bits per byte (2 seeds), 3 steps of")
    file = checkout.root / "docs" / "results" / "grugformer-sink.json"
    kept = json.loads(file.read_text())["groups"][0]
    assert kept["command"] == f"python {PATH} --steps 3 --seed 1"
    text = file.read_text()
    file.write_text(text.replace("3.2", "2.2"))
    assert "was edited: it no longer says what was measured" in problems(checkout)[0]
    file.write_text(text)
    edit(checkout, "3.1000 ±", "2.1000 ±")
    sentence = "Result differs from docs/results/grugformer-sink.json: write"
    assert sentence in problems(checkout)[0]
    edit(checkout, "2.1000 ±", "3.1000 ±")
    file.rename(file.with_name("stray.json"))
    assert any("stray.json belongs to no entry" in p for p in problems(checkout))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "interrupted"}, "is interrupted: --resume it"),
        ({"source": {"core": "other"}}, "made by code that no commit has, with uncommitted"),
        ({"identity": ""}, "was continued with other code: run it again"),
        ({"experiment": "grugformer_gone"}, "has no entry 'speedruns/grugformer_gone.py'"),
    ],
)
def test_a_run_that_proves_nothing_is_not_recorded(checkout, changes, message):
    folder = run_record(checkout, **changes)
    with pytest.raises(ValueError, match=message):
        record(checkout, folder)
    assert checkout.changed() == []


def test_a_run_whose_record_was_edited_is_not_recorded(checkout):
    folder = run_record(checkout)
    file = folder / "results.json"
    file.write_text(file.read_text().replace('"bits_per_byte": 3.0', '"bits_per_byte": 1.0'))
    with pytest.raises(ValueError, match="was edited: it no longer says what was measured"):
        record(checkout, folder)
    with pytest.raises(ValueError, match="holds no run and no comparison"):
        record(checkout, checkout.root / "docs")


def test_an_experiment_is_superseded_then_deleted_with_a_trail(checkout):
    measured = checkout.git("rev-parse", "HEAD")
    record(checkout, run_record(checkout))
    commit(checkout.root)
    supersede(checkout, "grugformer-sink", "HEAD")
    entry = Archive(checkout).entries["grugformer-sink"]
    assert entry.fields["Superseded by"] == checkout.short("HEAD")
    assert entry.fields["Last known-good"] == measured[:10], "what its numbers are of"
    assert problems(checkout) == []
    commit(checkout.root)
    delete(checkout, PATH, why="The core\nhas it.")
    entry = Archive(checkout).entries["grugformer-sink"]
    assert entry.status == "deleted"
    assert entry.fields["Notes"] == "The core has it."
    assert not (checkout.root / PATH).exists()
    assert problems(checkout) == []
    with pytest.raises(ValueError, match="grugformer-sink is deleted already"):
        supersede(checkout, "grugformer-sink", "HEAD")


@pytest.mark.parametrize(
    ("retire", "message"),
    [
        (
            lambda c: supersede(c, "grugformer-gone", "HEAD"),
            "has no entry 'grugformer-gone'; it has grugformer-sink, grugformer-starter",
        ),
        (lambda c: supersede(c, "grugformer-sink", "grugformer-sink"), "does not replace itself"),
        (lambda c: supersede(c, "grugformer-sink", "1234567"), "--by 1234567: it is neither an id"),
        (lambda c: delete(c, "grugformer-sink"), "say what replaces grugformer-sink, with --by"),
    ],
)
def test_a_retirement_that_leads_nowhere_is_refused(checkout, retire, message):
    with pytest.raises(ValueError, match=message):
        retire(checkout)
    assert checkout.changed() == []


def test_a_tree_with_changes_retires_nothing(checkout):
    (checkout.root / "speedruns" / "grugformer_starter.py").write_text(STARTER + "\n#\n")
    with pytest.raises(ValueError, match="uncommitted changes, speedruns/grugformer_starter"):
        delete(checkout, "grugformer-sink", why="x")
    assert (checkout.root / PATH).exists()


def test_a_circle_of_replacements_is_refused_when_it_is_made(checkout):
    supersede(checkout, "grugformer-sink", "grugformer-starter")
    with pytest.raises(
        ValueError, match="grugformer-sink is superseded by grugformer-starter, directly"
    ):
        supersede(checkout, "grugformer-starter", "grugformer-sink")


def test_a_commit_that_this_clone_has_not_is_named(checkout, tmp_path):
    edit(checkout, "- Status: active", "- Last known-good: 1234567\n- Status: superseded")
    with pytest.raises(ValueError, match="commit 1234567 of grugformer-sink is not in this clone"):
        reproduce(checkout, "grugformer-sink")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{checkout.root}", "shallow")
    found = problems(Checkout(tmp_path / "shallow"))
    sentence = "this is a shallow clone: run `git fetch --unshallow`, then check again"
    assert found == [f"docs/archive.md:0: git: {sentence}"]


def test_outside_of_a_checkout_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="run this inside a checkout of grug_keras"):
        Checkout.find(tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(ValueError, match="has no docs/archive.md"):
        Checkout.find(tmp_path)


def test_commands_are_kept_without_where_they_put_things():
    command = "python a/b.py --out runs --steps 3 --resume --seed=1 --out=x --resume r --batch 2"
    assert portable_command(command, "s/b.py") == "python s/b.py --steps 3 --seed=1 --batch 2"


def test_a_reproduced_number_says_what_differs():
    known = {"bits_per_byte": 2.0, "data": {"sha256": "a"}, "tokenizer": {"sha256": None}}
    known |= {"steps": 3, "device": {}, "versions": {}, "source": "x"}
    assert verdict(known, known) == "2.0000 bits per byte, recorded 2.0000: the same to the bit"
    other = {**known, "bits_per_byte": 2.1, "data": {"sha256": "b"}, "steps": 4}
    assert verdict(other, known).endswith(
        ": +0.1000; the text (another Python?) differs, the number of steps differs"
    )
    assert verdict(known, None) == "2.0000 bits per byte; none is recorded"
