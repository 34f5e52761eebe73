"""A trained model loaded from its run, and text from it: `load_trained`, `grug sample`."""

import json
import pathlib
import re
import shutil

from click.testing import CliRunner
from grug_cli import main
from grug_keras import GrugConfig
from grug_keras.data import ByteTokenizer, load_tokenizer
from grug_keras.experiments.script import load_speedrun
from grug_keras.training.sampling import generate, stream_text
from grug_keras.training.source import code_hash
from grug_keras.training.trained import load_trained
from models import logits_of, seeded_model
import numpy as np
import pytest

SINKS = pathlib.Path(__file__).parent.parent / "speedruns" / "grugformer_attn_sink.py"
CONFIG = GrugConfig(384, 16, 24, 1, 2, 1, max_seq_len=64, initializer_std=0.5)


def leave_run(folder, model, script=SINKS, tokenizer=None):
    """Writes what a run leaves of its model."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer or ByteTokenizer()
    tokenizer.save(folder)
    model.save(folder / "model.keras")
    record = {
        "status": "finished",
        "recipe": {"steps": 1},
        "command": f"python {script} --steps 1",
        "experiment": pathlib.Path(script).stem,
        "commit": "0123abc",
        "source": {"script": code_hash(SINKS)},
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
    }
    (folder / "results.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = seeded_model(CONFIG)
    return leave_run(tmp_path_factory.mktemp("a") / "runs" / "plain", model)


@pytest.fixture
def sinks(tmp_path):
    """A run of a changed block, whose script lies where it was called."""
    script = tmp_path / "speedruns" / SINKS.name
    script.parent.mkdir()
    shutil.copy(SINKS, script)
    model = load_speedrun(script).build_model(CONFIG)
    model.build()
    model.blocks[0].attention.sinks.assign([1.5, -0.5])
    return leave_run(tmp_path / "runs" / "sinks", model, script), model, script


def test_a_changed_block_comes_from_its_script(sinks, tmp_path):
    folder, model, script = sinks
    tokens = np.arange(20)[None].astype("int32")
    want = logits_of(model, tokens)
    script.write_text(script.read_text() + "\n# a comment changes nothing\n")
    for path in (folder, folder / "model.keras"):
        trained = load_trained(path)
        got = logits_of(trained.model, tokens)
        np.testing.assert_array_equal(got, want)
    assert (trained.name, trained.tokenizer.name) == ("sinks", "bytes")
    assert trained.record["experiment"] == "grugformer_attn_sink"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "is no run folder"),
        (lambda f: (f / "results.json").unlink(), "results.json holds no record of a run"),
        (lambda f: (f / "model.keras").unlink(), "model.keras is missing: the run is finished"),
        (lambda f: (f / "model.keras").write_bytes(b"PK"), "model.keras is no model of grug_keras"),
        (lambda f: edit(f, tokenizer={"name": "bpe:300", "sha256": "0"}), "lacks its tokenizer"),
    ],
)
def test_what_is_missing_or_damaged_is_named(run, tmp_path, damage, message):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_trained(folder)


def edit(folder, **fields):
    path = folder / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_script_that_has_changed_or_is_gone_is_named(sinks):
    folder, _, script = sinks
    # The one beside the package is the one that is meant, as long as it does the same.
    script.write_text(script.read_text().replace('"zeros"', '"ones"'))
    load_trained(folder)
    edit(folder, source={"script": "of another day"})
    with pytest.raises(ValueError, match="has changed since .*sinks was trained, at commit 0123"):
        load_trained(folder)
    edit(folder, experiment="grugformer_gone", command="python somewhere/grugformer_gone.py")
    with pytest.raises(ValueError, match=r"needs the classes of grugformer_gone.py: neither some"):
        load_trained(folder)


def test_a_tokenizer_of_another_run_is_refused(tmp_path, run):
    texts = [b"a cat sat on a mat"] * 9
    tokenizer = load_tokenizer("bpe:300", lambda: texts)
    model = seeded_model(CONFIG)
    folder = leave_run(tmp_path / "run", model, tokenizer=tokenizer)
    found = load_trained(folder).tokenizer
    assert found.encode(b"a cat").tolist() == tokenizer.encode(b"a cat").tolist()
    load_tokenizer("bpe:260", lambda: texts).save(folder)
    with pytest.raises(ValueError, match="tokenizer.json is not the tokenizer that"):
        load_trained(folder)


def test_text_comes_in_parts_with_whole_characters(run):
    trained = load_trained(run)
    parts = trained.model, trained.tokenizer, "é".encode()
    whole = generate(*parts, length=40, seed=1)
    pieces = list(stream_text(*parts, length=40, seed=1, every=1))
    assert "".join(pieces) == whole.decode(errors="replace")
    assert len(pieces) > 10


def test_text_ends_before_a_stop_and_never_shows_a_part_of_it(run):
    trained = load_trained(run)
    parts = trained.model, trained.tokenizer, b"def "
    whole = generate(*parts, length=40, seed=2)
    stop = whole[11:15]
    want = whole[: whole.find(stop)]
    assert generate(*parts, length=40, seed=2, stop=[stop, b"\xff\xff\xff"]) == want
    options = {"length": 40, "seed": 2, "stop": [stop]}
    assert "".join(stream_text(*parts, every=1, **options)) == want.decode(errors="replace")


def test_grug_sample_writes_text_or_one_line(run):
    def sample(*arguments):
        return CliRunner().invoke(main, ["sample", str(run), *map(str, arguments)])

    trained = load_trained(run)
    want = generate(trained.model, trained.tokenizer, b"def ", length=20, temperature=0)
    result = sample("--prompt", "def ", "--length", 20, "--temperature", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout == "def " + want.decode(errors="replace") + "\n"
    assert sample().exit_code == 0
    for arguments, message in (
        (["--prompt", ""], "--prompt='' is empty: leave it out"),
        (["--prompt", "a" * 64], "length must be in .* for a prompt of 65 tokens"),
        (["--length", 64], r"length must be in \[1, 63\] .* got 64"),
        (["--temperature", -1], "temperature must be 0 or more, got -1.0"),
    ):
        result = sample(*arguments)
        assert result.exit_code == 1
        assert re.search(message, result.output), result.output
        assert "Traceback" not in result.output
