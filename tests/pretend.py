"""Runs that only pretend to train, for tests of what is done with their numbers."""

import json

from grug_keras.experiments.child import ended_run
from grug_keras.training.record import seal

DEVICE = {"kind": "cpu", "count": 1, "cpu_cores": 1, "processor": "x"}


class PretendExecutor:
    """Writes what runs leave behind.

    Args:
        score: function of the name of the script, seed, learning rate and steps, returns bits per
            byte; None is a run that diverges, an exception is one that fails.
        ms: dict of name of the script -> milliseconds a step.

    Attributes:
        order: list of `(name, seed, rate, steps)`, of each run that was trained.
    """

    cores = 1

    def __init__(self, score, ms=None):
        self.score, self.ms, self.order = score, ms or {}, []

    def device(self, backend):
        return DEVICE

    def run(self, snapshot, specs, pool):
        for spec in specs:
            given = dict(zip(spec.arguments[::2], spec.arguments[1::2], strict=True))
            name = spec.folder.parent.name
            rate, steps = float(given.get("--learning-rate", 0.007)), int(given["--steps"])
            self.order.append((name, spec.seed, rate, steps))
            out = pool / spec.folder
            out.mkdir(parents=True, exist_ok=True)
            try:
                score = self.score(name, spec.seed, rate, steps)
            except RuntimeError as error:
                (out / "log.txt").write_text(f"{error}\n")
                yield spec, True
                continue
            write(out, spec, name, score, rate, steps, snapshot, self.ms.get(name, 10.0))
            assert ended_run(out)
            yield spec, True


def write(out, spec, name, score, rate, steps, snapshot, ms):
    """Writes record and curve of a run that has ended."""
    folder = out / f"{name}-seed{spec.seed}"
    folder.mkdir()
    rows = [f"{i},{i * 8},{i * ms / 1e3},{3 - i / 100},0.1,1,{ms}" for i in range(1, 11)]
    data = dict(zip(spec.arguments[::2], spec.arguments[1::2], strict=True))["--data"]
    head = "step,tokens,seconds,loss,learning_rate,gradient_norm,ms"
    (folder / "curve.csv").write_text("\n".join([head, *rows]) + "\n")
    record = {
        "id": folder.name,
        "identity": spec.identity,
        "experiment": name,
        "seed": spec.seed,
        "status": "diverged" if score is None else "finished",
        "bits_per_byte": score,
        "source": snapshot.source(spec.script),
        "commit": snapshot.commit,
        "size": "smoke",
        "recipe": {"learning_rate": rate, "steps": steps, "batch_size": 8},
        "optimizer": "Muon",
        "dtype": "float32",
        "packing": "stream",
        "backend": "jax",
        "mesh": None,
        "config": {"max_seq_len": 128},
        "data": {"name": "text", "sha256": data},
        "tokenizer": {"name": "bytes", "sha256": None},
        "device": DEVICE,
        "versions": {},
        "parameters": 10,
        "parameters_non_embedding": 5,
        "flops_per_token": 60,
        "mfu_convention": "6N",
        "steps": steps,
        "tokens": steps * 8 * 128,
        "seconds": steps * ms / 1e3,
        "compile_seconds": 1.0,
        "ms_per_step": ms,
        "tokens_per_second": 1,
        "mfu": None,
        "peak_memory_bytes": 1,
        "train_loss": 2.0,
        "loss": score,
        "curve": [[i, 3 - i / 100] for i in range(1, 11)],
        "started": "2026-01-01T00:00:00+00:00",
        "command": f"python {spec.script} {' '.join(spec.arguments)}",
    }
    (folder / "results.json").write_text(json.dumps(seal(record)))
