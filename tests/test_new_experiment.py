"""Experiment scripts: how one is started, loaded, compared with the core, and refused."""

import inspect
import subprocess
import sys
import types

from grug_keras import MLP, CausalSelfAttention, best_guess
from grug_keras.experiments.archive import BUCKETS, Archive
from grug_keras.experiments.archive_check import check
from grug_keras.experiments.copies import copies
from grug_keras.experiments.diff import as_text, difference
from grug_keras.experiments.new import new_experiment
from grug_keras.experiments.script import load_speedrun
import pytest
import scratch
from scratch import PATH, ROOT, edit


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return scratch.make(tmp_path_factory.mktemp("template"))


@pytest.fixture
def checkout(template, tmp_path):
    return scratch.copy(template, tmp_path / "tree")


@pytest.fixture(scope="module")
def started(template, tmp_path_factory):
    """A checkout with a new experiment in each bucket; and bucket -> (id, path)."""
    checkout = scratch.copy(template, tmp_path_factory.mktemp("started") / "tree")
    new = {b: new_experiment(checkout, f"idea-{b}", b, "An\n  idea.") for b in BUCKETS}
    return checkout, new


def problems(checkout):
    return [str(problem) for problem in check(checkout)]


ATTENTION = '''"""An idea.

Command: python speedruns/grugformer_idea_attention.py
"""

from grug_keras import Block, CausalSelfAttention, Grugformer
from grug_keras.speedrun import main


class NewAttention(CausalSelfAttention):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask)


class NewBlock(Block):
    attention_class = NewAttention


def build_model(config):
    return Grugformer(config, block_class=NewBlock)


if __name__ == "__main__":
    main(__file__, build_model)
'''
OPTIMIZER = '''"""An idea.

Command: python speedruns/grugformer_idea_optimizer.py
"""

from grug_keras import Grugformer, Muon
from grug_keras.speedrun import main


def build_model(config):
    return Grugformer(config)


def build_optimizer(learning_rate, **changes):
    options = {
        "adam_lr_ratio": 0.3,
        "adam_beta_2": 0.95,
        "weight_decay": 0.01,
        "adam_weight_decay": 0.004,
    }
    return Muon(learning_rate, **{**options, **changes})


if __name__ == "__main__":
    main(__file__, build_model, build_optimizer=build_optimizer)
'''


def test_a_new_script_holds_what_is_to_be_edited_and_no_more(started):
    checkout, new = started
    assert (checkout.root / new["attention"][1]).read_text() == ATTENTION
    assert (checkout.root / new["optimizer"][1]).read_text() == OPTIMIZER
    for command in (["check"], ["format", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml"]
        paths = [path for _, path in new.values()]
        done = subprocess.run([*ruff, *paths], cwd=checkout.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_new_experiment_has_an_entry_and_a_script_that_loads(started, bucket):
    checkout, new = started
    name, path = new[bucket]
    entry = Archive(checkout).entries[name]
    assert (name, entry.path, entry.buckets) == (f"grugformer-idea-{bucket}", path, {bucket})
    assert entry.fields["Purpose"] == "An idea."
    assert load_speedrun(checkout.root / path).build_model


def test_a_new_experiment_changes_its_bucket_alone(started):
    """An optimizer has nothing to override: it is the best guess's until it is edited."""
    checkout, new = started
    (problem,) = problems(checkout)
    assert "grugformer-idea-optimizer: speedruns/grugformer_idea_optimizer.py changes" in problem
    assert "changes nothing of its bucket optimizer" in problem
    edit(checkout, '"adam_lr_ratio": 0.3', '"adam_lr_ratio": 0.2', new["optimizer"][1])
    assert problems(checkout) == []
    edit(checkout, '"adam_lr_ratio": 0.2', '"adam_lr_ratio": 0.3', new["optimizer"][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Sink", "mlp", "x"), "idea='Sink' must be small letters"),
        (("../sink", "mlp", "x"), "must be small letters"),
        (("sink", "mlp", "x"), "has an entry, grugformer-sink, active: choose another name"),
        (("other", "heads", "x"), "bucket='heads' must be one of attention, block, mlp"),
        (("other", "mlp", " "), "purpose='' must be a line of words"),
        (("other", "mlp", 'a """ b'), "must be a line of words .* for a docstring"),
    ],
)
def test_a_new_experiment_needs_a_name_and_a_bucket(template, arguments, message):
    with pytest.raises(ValueError, match=message):
        new_experiment(template, *arguments)
    assert template.changed() == []


IMPORT = "from grug_keras.speedrun import main\n"
RECIPES = """from grug_keras.speedrun import Recipe, main

RECIPES = {"smoke": Recipe(steps=1000, batch_size=8, {})}
"""
OTHER_OPTIMIZER = f"""from grug_keras import Muon
{IMPORT}

def build_optimizer(learning_rate):
    return Muon(learning_rate, adam_lr_ratio=0.3, adam_beta_2=0.95, weight_decay=0.02)
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (IMPORT, f"import grugformer_starter\n{IMPORT}", "imports another script, grugformer_star"),
        (IMPORT, f"from speedruns import grugformer_starter\n{IMPORT}", "imports another script"),
        (IMPORT, IMPORT + "#\n" * 150, "lines, 150 at most"),
        (IMPORT, f"{IMPORT}{{", "is not valid Python"),
        ("def build_model", "def make_model", "has no build_model"),
        ('if __name__ == "__main__":', "if True:", "runs when it is imported: call main under"),
        ("import main", "import mane", "cannot be imported: ImportError"),
        ("Grugformer(config, bl", "Grugformer(confi, bl", "cannot be built: NameError"),
        (
            IMPORT,
            RECIPES.replace("{})", "learning_rate=0.03)"),
            "changes optimizer too (recipe.learning_rate of smoke: 0.007 -> 0.03)",
        ),
        (
            IMPORT,
            RECIPES.replace("{})", "learning_rate=0.007, accumulate=2)"),
            "changes optimizer too (recipe.accumulate of smoke: 1 -> 2)",
        ),
        (IMPORT, OTHER_OPTIMIZER, "changes optimizer too (optimizer.weight_decay: 0.01 -> 0.02)"),
    ],
)
def test_a_script_that_is_no_single_change_is_refused(checkout, old, new, sentence):
    edit(checkout, old, new, PATH)
    found = problems(checkout)
    assert any(sentence in problem for problem in found), found


def test_a_script_takes_what_it_does_not_define_from_the_best_guess(tmp_path):
    script = tmp_path / "speedrun.py"
    script.write_text("def build_model(config): ...\n")
    module = load_speedrun(script)
    assert module.RECIPES is best_guess.RECIPES
    assert module.build_optimizer is best_guess.build_optimizer
    script.write_text("RECIPES = {'mine': 1}\nbuild_model = build_optimizer = len\n")
    module = load_speedrun(script)
    assert (module.RECIPES, module.build_optimizer) == ({"mine": 1}, len)


def test_a_script_may_have_the_name_of_any_module(tmp_path):
    (tmp_path / "types.py").write_text("build_model = 1\n")
    assert load_speedrun(tmp_path / "types.py").build_model == 1
    assert sys.modules["types"] is types


def pasted(function):
    """The source of a method, without its first line, in a method of another class."""
    body = "\n".join(inspect.getsource(function).splitlines()[1:])
    return f"\n\nclass Mine:\n    def make(self, x, positions):\n        print('mine')\n{body}\n"


def test_code_of_the_core_is_found_under_other_names_and_no_script_has_any():
    renamed = pasted(MLP.call).replace("rows", "flat").replace("gated", "y")
    assert copies(renamed) == [(4, "Mine.make", "block.MLP.call")]
    assert copies(pasted(CausalSelfAttention.heads))[0][2] == "attention.CausalSelfAttention.heads"
    for script in sorted((ROOT / "speedruns").glob("*.py")):
        assert copies(script.read_text()) == []


def test_a_difference_says_what_changes_and_warns_of_copies_and_of_two_buckets(checkout):
    edit(checkout, IMPORT, OTHER_OPTIMIZER + pasted(MLP.call), PATH)
    edit(checkout, "Bucket: attention", "Bucket: attention, optimizer")
    assert problems(checkout) == [], "a warning, no error"
    found = difference(checkout.root, PATH)
    assert found["buckets"] == ["attention", "optimizer"]
    copied, buckets = found["warnings"]
    assert "Mine.make repeats code of block.MLP.call; subclass it" in copied
    assert buckets.startswith("it changes 2 buckets, attention, optimizer: ")
    text = as_text(found)
    assert "attention  SinkAttention overrides CausalSelfAttention.attend" in text
    assert "(+8, +0.00%)" in text, "a sink for each head"
    assert text.endswith(f"warning: {copied}\nwarning: {buckets}")
    assert "warning" not in as_text({**found, "warnings": []})
