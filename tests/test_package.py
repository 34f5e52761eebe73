"""What importing the package does and does not do, and that its documents tell the truth."""

import os
import pathlib
import re
import subprocess
import sys

from click.testing import CliRunner
import grug_cli
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def python(code, home, **environment):
    """Runs code as a user with an empty home and no backend chosen."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KERAS_", "TFDS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


DESCRIBE = "import grug_keras.backend as b; print(b.describe_backend())"


def test_jax_is_the_default_on_the_first_start_and_on_the_second(tmp_path):
    for _ in range(2):
        assert python(DESCRIBE, tmp_path).startswith("Keras backend: jax (the default")
        assert not (tmp_path / ".keras" / "keras.json").exists()


def test_a_settings_file_that_tensorflow_left_is_no_choice(tmp_path):
    """Keras's data adapters import it, and so does TFDS: else the second run would change."""
    python("import grug_keras, tensorflow", tmp_path)
    assert (tmp_path / ".keras" / "keras.json").exists(), "nothing to test: it leaves no file"
    assert python(DESCRIBE, tmp_path).startswith("Keras backend: jax (the default")


def test_a_choice_is_never_overridden(tmp_path):
    """Keras's NumPy backend stands for any that somebody chose: it is there on every machine."""
    assert "numpy (KERAS_BACKEND" in python(DESCRIBE, tmp_path, KERAS_BACKEND="numpy")
    settings = tmp_path / ".keras" / "keras.json"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text('{"backend": "numpy"}')
    assert f"numpy (chosen in {settings})" in python(DESCRIBE, tmp_path)
    settings.unlink()
    code = "import os; os.environ['KERAS_BACKEND'] = 'numpy'\nimport keras\n" + DESCRIBE
    assert "numpy (Keras was imported before" in python(code, tmp_path)
    assert settings.exists(), "written by the user's own import of Keras: not ours to remove"


def test_import_stays_light(tmp_path):
    heavy = ("keras_hub", "tensorflow_datasets", "tensorflow", "torch", "optax", "click")
    code = f"import sys, grug_keras; print([m for m in {heavy} if m in sys.modules])"
    assert python(code, tmp_path) == "[]"


def test_a_checkpoint_loads_after_importing_the_package_alone(tmp_path):
    load = "import grug_keras, keras; print(keras.models.load_model({!r}).compiled)"
    assert python(load.format(str(ROOT / "tests" / "saved" / "parity.keras")), tmp_path) == "True"


def test_differences_in_the_readme_are_those_of_the_archive():
    """The archive's own are held to the committed results."""
    signed = re.compile(r"[+-]\d\.\d{4}\b")
    verdicts = re.findall(r"^- Verdict: .*$", (ROOT / "docs" / "archive.md").read_text(), re.M)
    known = {number for verdict in verdicts for number in signed.findall(verdict)}
    quoted = set(signed.findall((ROOT / "README.md").read_text()))
    assert len(quoted) >= 9
    assert quoted <= known


def test_help_does_not_wait_for_keras():
    """Neither `grug --help` nor a command that needs no Keras imports it."""
    code = "import sys, grug_cli; print([m for m in sys.modules if m.startswith(('keras', 'jax'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = CliRunner().invoke(grug_cli.main, ["--help"])
    assert done.exit_code == 0
    for name in ("archive", "check", "compare", "compile", "diff", "new", "plot", "tokenize"):
        assert f"\n  {name} " in done.output


def test_the_package_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "grug_keras", "plot", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("holds no curve.csv: not a run folder")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["README.md", "docs/archive.md", "docs/contributing.md"])
def test_paths_named_in_the_documents_exist(name):
    text = (ROOT / name).read_text()
    gone = set(re.findall(r"^- Path: `([^`]+)`\n(?:- .*\n)*?- Status: deleted", text, re.M))
    pattern = r"(?:grug_keras|ops|speedruns|tests|docs|benchmarks)/[\w/.]*\w"
    for path in set(re.findall(pattern, text)) - gone:
        assert (ROOT / path).exists(), path
