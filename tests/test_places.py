"""Places as people have them: encodings, homes, git, operating systems, Keras's settings."""

import ast
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile

import click
from click.testing import CliRunner
import grug_cli
from grug_keras import backend
from grug_keras.experiments.checkout import Checkout
from grug_keras.training import compile_cache, process_setup, provenance, restart
import keras
import pytest

pytestmark = pytest.mark.jax

ROOT = pathlib.Path(__file__).parent.parent
STARTER = ROOT / "speedruns" / "grugformer_starter.py"
FILES = sorted([*(ROOT / "grug_keras").rglob("*.py"), *(ROOT / "ops").rglob("*.py")])
POSIX = pytest.mark.skipif(os.name != "posix", reason="shell scripts and modes are of POSIX")


def lacks_encoding(call):
    """Whether a call reads or writes text in the encoding of the locale."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if name == "open" and isinstance(call.func, ast.Name):
        modes = [n.value for a in call.args[1:] for n in ast.walk(a) if isinstance(n, ast.Constant)]
        return not any("b" in mode for mode in modes)
    return "text" in named and ast.unparse(named["text"]) == "True"  # of subprocess


def test_text_is_utf8_whatever_the_locale():
    calls = [
        (path.relative_to(ROOT), node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 1000
    assert [f"{path}:{call.lineno}" for path, call in calls if lacks_encoding(call)] == []


@pytest.fixture
def restarts(monkeypatch):
    """Collects what a command would start again with."""
    found = []
    monkeypatch.setattr(process_setup, "restart", lambda **environment: found.append(environment))
    return found


def test_a_locale_of_another_encoding_starts_the_command_again_in_utf8(restarts, monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    monkeypatch.delenv("PYTHONUTF8", raising=False)
    process_setup.settle_in()
    assert restarts == [{"PYTHONUTF8": "1"}]
    monkeypatch.setenv("PYTHONUTF8", "1")
    with pytest.raises(click.ClickException, match="start Python without -X utf8=0"):
        process_setup.settle_in()
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    process_setup.settle_in()
    assert len(restarts) == 1


def test_grug_settles_in_too(monkeypatch):
    settled = []
    monkeypatch.setattr(process_setup, "settle_in", lambda: settled.append(True))
    CliRunner().invoke(grug_cli.main, ["plot", "--help"])
    assert not settled, "it imports Keras: not where all is as usual"
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    CliRunner().invoke(grug_cli.main, ["plot", "--help"])
    assert settled


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    process_setup.settle_in()
    print("2.1 ± 0.1 日 \udce9", flush=True)
    assert raw.getvalue().split() == b"2.1 \\xb1 0.1 \\u65e5 \\udce9".split()


def test_a_user_without_name_and_home_gets_both(monkeypatch, tmp_path, capfd):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("USER", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(process_setup.getpass, "getuser", nobody)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    process_setup.settle_in()
    home = pathlib.Path(os.environ["HOME"])
    assert home.is_dir()
    assert home.parent == tmp_path
    assert capfd.readouterr().err == f"this user has no home: HOME is {home}\n"
    assert os.environ["USER"]


@pytest.mark.parametrize("error", [RuntimeError, KeyError, PermissionError])
def test_without_name_home_or_leave_to_write_nothing_that_is_compiled_is_kept(monkeypatch, error):
    def refuse(folder):
        raise error

    import jax

    monkeypatch.setattr(compile_cache, "_check_writable", refuse)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert compile_cache.keep_compiled() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_that_is_not_utf8_is_named():
    process_setup.check_utf8("runs/ü", "日")
    with pytest.raises(ValueError, match=r"caf\\udce9' is not UTF-8: rename its folder"):
        process_setup.check_utf8("runs", "caf\udce9")


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_a_restart_keeps_the_flags_of_the_interpreter_and_its_status(system, monkeypatch):
    """On Windows by a child that is waited for: there execve returns before the run has ended."""
    status = "import os, sys; sys.exit(int(os.environ['STATUS']) + sys.flags.dev_mode)"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-c", status])
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(os, "name", system)
    if system == "nt":
        with pytest.raises(SystemExit, match="7"):
            restart.restart(STATUS="6")
        assert not started
    else:
        monkeypatch.setattr(subprocess, "Popen", None)
        with pytest.raises(TypeError):  # it goes on here only where execve has returned
            restart.restart(STATUS="6")
        ((path, command, environment),) = started
        assert command == [sys.executable, "-X", "dev", "-c", status]
        assert (path, environment["STATUS"]) == (sys.executable, "6")


def test_a_backend_that_is_not_installed_is_named_before_a_restart(monkeypatch):
    monkeypatch.setattr(restart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(click.ClickException, match="torch is not installed; pip install torch"):
        restart.restart_with("torch")
    restart.restart_with(keras.config.backend())


# What Linux has and others have not is taken away once the libraries are imported.
ELSEWHERE = """
import ctypes, importlib, os, pkgutil, signal, sys
import click, filelock, jax, keras, matplotlib.figure, orbax.checkpoint, tensorflow_datasets
jax.devices()
for name in ("sched_getaffinity", "sched_setaffinity", "getuid", "sysconf", "fork"):
    delattr(os, name)
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
del signal.SIGKILL
ctypes.CDLL = None
sys.platform = sys.argv[1]
import grug_keras, grug_cli
for package in (grug_keras, grug_cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if ".ops." not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from grug_keras.experiments.child import Children, on_cores
from grug_keras.experiments.executors import LocalExecutor
from grug_keras.training import memory_use, processor, provenance, startup
assert "needs Linux" in grug_keras.keep_memory()
assert provenance.device()["cpu_cores"] and processor.processor()
assert startup.process_seconds() > 0 and memory_use.peak_memory() is None
executor = LocalExecutor(True)
assert (executor.jobs, executor.cores) == (1, 0)
with on_cores(0, Children()):
    print("works on", sys.platform)
"""


def test_modules_import_and_work_without_what_only_linux_has():
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, "win32"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("works on win32\n")


@pytest.fixture
def refusing_git(tmp_path, monkeypatch):
    """A `git` that refuses as the real one does where another user owns the checkout."""
    program = tmp_path / "git"
    program.write_text(
        "#!/bin/sh\necho \"fatal: detected dubious ownership in repository at '/w'\nTo add an "
        'exception, call:\n\n\tgit config --global --add safe.directory /w" >&2\nexit 128\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    provenance._say_once.cache_clear()


@POSIX
def test_a_git_that_refuses_is_quoted_once_with_its_remedy(refusing_git, caplog):
    remedy = "ownership in repository at '/w' To add an exception, call: git config --global --add"
    for _ in range(2):
        assert provenance.git_state(STARTER) == (None, None)
    (said,) = caplog.messages
    assert said.startswith("the run is recorded without its commit: git rev-parse: detected")
    assert remedy in said
    with pytest.raises(ValueError, match=f"^git rev-parse: detected dubious {remedy}"):
        Checkout.find(ROOT)


def test_no_git_is_said_and_no_checkout_is_usual(tmp_path, monkeypatch, caplog):
    provenance._say_once.cache_clear()
    script = tmp_path / "script.py"
    script.touch()
    assert provenance.git_state(script) == (None, None)
    assert not caplog.messages
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(script) == (None, None)
    (said,) = caplog.messages
    assert "git cannot be run: No such file or directory; is it installed?" in said
    with pytest.raises(ValueError, match="^git cannot be run"):
        Checkout.find(tmp_path)


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Chooses a backend with a settings file and a variable; returns it, or what is refused."""
    monkeypatch.setattr(backend, "_import_keras_without_leaving", lambda settings: None)
    monkeypatch.setattr(backend, "announce_backend", lambda: None)
    monkeypatch.setattr(backend, "_reason", None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))

    def chosen(settings=None, variable=None):
        monkeypatch.setenv("KERAS_BACKEND", variable or "")
        (tmp_path / "keras.json").unlink(missing_ok=True)
        if settings is not None:
            (tmp_path / "keras.json").write_text(settings)
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "keras")
            try:
                backend.choose_backend()
            except ValueError as error:
                return str(error)
        return os.environ["KERAS_BACKEND"] or f"keras.json: {backend._reason}"

    return chosen


def test_settings_that_choose_no_backend_leave_jax(choose):
    assert [choose(settings) for settings in (None, "", " \n", "{}", '{"floatx": "float16"}')] == [
        "jax"
    ] * 5
    assert "chosen in" in choose('{"backend": "numpy"}')


@pytest.mark.parametrize(
    ("settings", "variable", "message"),
    [
        ("[]", None, "keras.json holds no JSON object: correct it or delete it"),
        ('{"backend": "torch",}', None, "keras.json cannot be read, Expecting property name"),
        (
            '{"backend": "theano", "image_dim_ordering": "th"}',
            None,
            "keras.json has the backend 'theano', which Keras does not have",
        ),
        (None, "pytorch", "KERAS_BACKEND=pytorch, which Keras does not have"),
        (None, "Torch", "KERAS_BACKEND=Torch, which Keras does not have"),
        (None, "openvino", "KERAS_BACKEND=openvino, which is not installed: pip install openvino"),
    ],
)
def test_a_backend_that_is_none_is_refused_in_one_line(choose, settings, variable, message):
    found = choose(settings, variable)
    assert message in found
    assert found.endswith("; the backends that work here are jax, tensorflow and torch")
    assert "\n" not in found


def test_a_script_ends_in_one_line_where_its_backend_is_none(tmp_path):
    done = subprocess.run(
        [sys.executable, STARTER],
        env={**os.environ, "KERAS_BACKEND": "Torch"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: KERAS_BACKEND=Torch, which Keras does not have;")
    assert done.stderr.count("\n") == 1


def corpus_hash(environment):
    """Starts a process that reads the embedded corpus; returns it."""
    code = "from grug_keras.data import load_corpus; print(load_corpus().sha256)"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_four_first_runs_at_once_prepare_one_corpus(tmp_path):
    children = [corpus_hash({"TFDS_DATA_DIR": str(tmp_path)}) for _ in range(4)]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * 4, outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    assert not any("Downloading" in stderr for _, stderr in outputs)


def test_a_dataset_that_another_process_prepares_meanwhile_is_used(monkeypatch):
    class Builder:
        def __init__(self, fails=False, prepared=False):
            self.fails, self.prepared, self.data_dir = fails, prepared, "/there"

        def download_and_prepare(self):
            if self.fails:
                raise FileExistsError("Cannot rename incomplete.X. Destination exists.")

        def is_prepared(self):
            return self.prepared

    from grug_keras.data import tfds_source

    theirs = Builder(prepared=True)
    assert tfds_source._prepare("x", Builder(fails=True), lambda: theirs) is theirs
    with pytest.raises(ValueError, match="TFDS_DATA_DIR, now /there.*FileExistsError"):
        tfds_source._prepare("x", Builder(fails=True), Builder)


def test_tfds_has_another_folder_only_where_it_can_write_none(tmp_path, monkeypatch):
    from grug_keras.data import tfds_source

    monkeypatch.setenv("TFDS_DATA_DIR", "/named")
    assert tfds_source._has_folder()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tfds_source._has_folder()
    monkeypatch.setenv("HOME", str(tmp_path / "not there"))
    assert not tfds_source._has_folder()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tfds_source.temporary_folder("tfds").parent == tmp_path


SCRIPT = """
from grug_keras import Grugformer
from grug_keras.speedrun import main


def build_model(config):
    return Grugformer(config)


if __name__ == "__main__":
    main(__file__, build_model)
"""


@pytest.mark.slow
def test_a_wheel_trains_in_an_odd_place_without_checkout_git_and_home(tmp_path):
    """The process is all of it: what is installed, how paths are decoded, what is written where."""
    source, site, place = tmp_path / "source", tmp_path / "site", tmp_path / "my dir $ü$"
    place.mkdir()
    for name in ("grug_keras", "ops"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "wheel", ".", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    shutil.rmtree(source)
    before = sorted(site.rglob("*"))
    (place / "script.py").write_text(SCRIPT)
    (place / "text.txt").write_text("Grug speaks of ü and of little else. " * 400, encoding="utf-8")
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "HOME": "/proc"}
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("TFDS_", "XDG_", "KERAS_"))}

    def run(*command):
        return subprocess.run(
            [sys.executable, *command],
            env={
                **kept,
                **odd,
                "PATH": "",
                "PYTHONPATH": str(site),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            cwd=place,
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )

    options = ["--data", "text.txt", "--steps", "4", "--batch", "2", "--seq-len", "16"]
    done = run("script.py", *options, "--out", "läufe")
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    (record,) = place.glob("läufe/*/results.json")
    record = json.loads(record.read_text(encoding="utf-8"))
    assert (record["status"], record["commit"]) == ("finished", None)
    grug = ["-c", "import grug_cli; print(grug_cli.__file__); grug_cli.main(prog_name='grug')"]
    done = run(*grug, "--help")
    assert done.returncode == 0
    assert str(site) in done.stdout
    done = run(*grug, "tokenize", "text.txt", "--out", "tökens")
    assert done.returncode == 0, done.stderr
    assert (place / "tökens").is_dir()
    for command in (["compare", "a", "b"], ["archive", "check"], ["check"], ["leaderboard"]):
        done = run(*grug, *command)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("Error: git cannot be run"), done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(site.rglob("*")) == before, "nothing is written beside the package"


def test_the_log_of_a_run_that_goes_on_keeps_what_was_before(tmp_path, monkeypatch):
    from grug_keras.experiments import child

    snapshot = types.SimpleNamespace(
        script=lambda path: path, environment=lambda: {}, folder=tmp_path
    )
    children = child.Children()
    monkeypatch.setattr(children, "wait", lambda command, **options: options["stdout"].write("x\n"))
    for _ in range(2):
        child.train(snapshot, child.RunSpec("s.py", (), 0, "id"), tmp_path / "run", 0, children)
    assert child.log_file(tmp_path / "run").read_text() == "x\nx\n"


def test_paths_of_options_are_those_of_the_folder_where_one_types(tmp_path, monkeypatch):
    """Runs of a comparison have another working folder."""
    from grug_keras.experiments.side import _with_absolute_paths

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b,c", "tokenizer.json"):
        (tmp_path / name).touch()
    words = {
        "--data ./a": f"--data {tmp_path}/a",
        "--data=./b,c --steps 3": f"--data={tmp_path}/b,c --steps 3",
        "--data a=0.7,gone=0.2,./a=0.1": f"--data {tmp_path}/a=0.7,gone=0.2,{tmp_path}/a=0.1",
        "--mixture-at 500:a": f"--mixture-at 500:{tmp_path}/a",
        "--tokenizer tokenizer.json": f"--tokenizer {tmp_path}/tokenizer.json",
        "--tokenizer bpe:300 --size a": "--tokenizer bpe:300 --size a",
        "--norms a --data": "--norms a --data",
    }
    for given, expected in words.items():
        assert _with_absolute_paths(given.split()) == expected.split()


def test_an_output_that_nobody_reads_is_no_failure():
    from grug_keras.training.process_setup import LastingOutput

    reader, writer = os.pipe()
    output = LastingOutput(open(writer, "w", encoding="utf-8"))  # noqa: SIM115
    print("read", file=output, flush=True)
    assert os.read(reader, 9) == b"read\n"
    os.close(reader)
    for _ in range(3):
        print("unread " * 2000, file=output, flush=True)
    output.close()


def test_a_folder_that_cannot_hold_runs_is_refused_first(tmp_path):
    from grug_keras.training.folder import check_out

    check_out(tmp_path / "new" / "runs")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="out=.*file/runs' cannot hold run folders: .*file cannot"):
        check_out(tmp_path / "file" / "runs")
