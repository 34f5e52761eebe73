"""The suites of the other backends: one process each, one after the other, beside JAX's."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
# What depends on the backend; all other files run on JAX alone.
FILES = [
    "test_attention_torch.py",
    "test_block_contract.py",
    "test_depth.py",
    "test_document_scores.py",
    "test_evaluation.py",
    "test_export.py",
    "test_fused_loss_tensorflow.py",
    "test_fused_loss_torch.py",
    "test_generation.py",
    "test_grugformer_attention.py",
    "test_grugformer_core.py",
    "test_grugformer_fused_loss.py",
    "test_grugformer_model_loss.py",
    "test_hf.py",
    "test_hub.py",
    "test_initial_values.py",
    "test_inputs.py",
    "test_keras_features.py",
    "test_optax_optimizer.py",
    "test_optimizers.py",
    "test_parity.py",
    "test_resume.py",
    "test_sharding.py",
    "test_speedruns.py",
    "test_stack.py",
    "test_train_step.py",
    "test_trained.py",
]


class Suites:
    """Runs the suite of each backend in turn, in the background.

    Args:
        backends: list of str.
        marks: str, the marker expression of this session, for them too.
    """

    def __init__(self, backends, marks):
        backends = list(dict.fromkeys(backends))
        self._folder = tempfile.TemporaryDirectory()
        self._logs = {name: pathlib.Path(self._folder.name, name) for name in backends}
        for log in self._logs.values():
            log.touch()
        self._statuses, self._process, self._stopped, self._marks = {}, None, False, marks
        self._thread = threading.Thread(target=self._run_all, daemon=True)
        self._thread.start()

    def _run_all(self):
        for backend, log in self._logs.items():
            if self._stopped or not importlib.util.find_spec(backend):
                continue
            # -B: two processes must not write one cache of bytecode at a time.
            command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            command += ["-m", self._marks, *(str(HERE / name) for name in FILES)]
            environment = {**os.environ, "KERAS_BACKEND": backend, "COLUMNS": "100"}
            with open(log, "wb") as file:
                self._process = subprocess.Popen(
                    command, env=environment, cwd=HERE.parent, stdout=file, stderr=file
                )
                self._statuses[backend] = self._process.wait()

    def follow(self, backend):
        """Yields what a suite prints, as it prints it, until it ends."""
        with open(self._logs[backend], "rb") as file:
            while True:
                is_over = backend in self._statuses or not self._thread.is_alive()
                if text := file.read():
                    yield text.decode(errors="replace")
                elif is_over:
                    return
                else:
                    time.sleep(0.2)

    def status(self, backend):
        """The exit status of a suite that has ended, or None if it never ran."""
        return self._statuses.get(backend)

    def stop(self):
        """Ends what still runs."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()
        self._thread.join()
