"""One training run: from data, options and a model to a folder with the record of it."""

import contextlib
import copy
import functools
import pathlib
import shutil
import time

import click
from grug_keras import distribution
from grug_keras.data import TokenBatches
from grug_keras.metrics import NORMS, metric_results
from grug_keras.optimizers import role_in, set_weight_decay
from grug_keras.tpu.flops import peak_flops
from grug_keras.training.artifacts import write_artifacts
from grug_keras.training.checkpoint_stores import one_line
from grug_keras.training.checkpoints import Checkpoints
from grug_keras.training.continuation import Continuation
from grug_keras.training.initial_values import initial_values_by_path
from grug_keras.training.initial_weights import find_initial
from grug_keras.training.interrupts import StopOnInterrupt
from grug_keras.training.loop import TrainingLoop
from grug_keras.training.memory_use import (
    check_memory,
    in_one_line,
    is_out_of_memory,
    least_bytes,
    peak_memory,
)
from grug_keras.training.meter import Meter
from grug_keras.training.model_config import run_config
from grug_keras.training.plots import thin_curve
from grug_keras.training.record import new_record, utc_now
from grug_keras.training.report import announce, report
from grug_keras.training.run_data import load_run_data
from grug_keras.training.sinks import SINKS, open_sinks
from grug_keras.training.startup import compiled_programs, process_seconds
import keras

NARROW = 256


class Run:
    """One run: reads and checks data and options on construction, trains when called.

    Args:
        script: path of the experiment script.
        recipe: `Recipe`.
        options: `RunOptions`.

    Raises:
        ValueError: if the data or the options cannot make a batch.
    """

    def __init__(self, script, recipe, options):
        self.script, self.options = pathlib.Path(script), options
        self.past = Continuation(self.script.stem, recipe, options)
        self.recipe = self.past.recipe
        try:
            self.data = self.past.load(self._load)
            self.config = run_config(options, self.data.tokenizer.vocab_size)
            self.train_batches, self.validation_batches = self._batches()
            self.schedule = self.recipe.schedule()
            self.log = options.log if distribution.process()[0] == 0 else ()
            for name in self.log:
                SINKS[name].require()
        except BaseException:
            self.past.unlock()
            raise

    @property
    def folder(self):
        """The `RunFolder`, None before it has one."""
        return self.past.folder

    def _load(self, tokenizer):
        return load_run_data(self.options, tokenizer)

    def _batches(self):
        """The batches of training, and of the validation slice of each source."""
        recipe, options = self.recipe, self.options
        shape = {
            "seq_len": self.config.max_seq_len,
            "batch_size": recipe.batch_size,
            "rows": distribution.local_rows(recipe.batch_size, recipe.accumulate),
        }
        train = self.data.batches(
            steps=recipe.steps, seed=options.seed, packing=options.packing, **shape
        )
        bos_id = self.data.tokenizer.bos_id
        return train, [TokenBatches(p.validation, bos_id=bos_id, **shape) for p in self.data.parts]

    def __call__(self, build_model, build_optimizer):
        """Trains, evaluates, records.

        Args:
            build_model: function of a `GrugConfig`, returns the model.
            build_optimizer: function of a learning-rate schedule, returns the optimizer.

        Returns:
            int, the exit status of the process.
        """
        begin, imported = time.perf_counter(), process_seconds()
        keras.utils.set_random_seed(self.options.seed)
        with contextlib.ExitStack() as stack:
            stack.callback(self.past.unlock)
            with refusals():
                model = self._compiled_model(build_model, build_optimizer)
                record = new_record(self, model)
                self.past.check_same(record.as_dict())
                restored = self.past.restore_origin(model, record.as_dict())
                shared = self.past.open_folder()
                record.id = self.folder.id
                checkpoints = Checkpoints(shared.checkpoints, keep=self.options.keep)
                stack.enter_context(contextlib.closing(checkpoints))
                step, notes = checkpoints.restore(model) or restored or (0, {})
                sinks = open_sinks(self.log, self.folder.path, record.as_dict())
                for sink in sinks:
                    stack.callback(sink.close)
                loop = self._loop(model, record, checkpoints, sinks, step, notes)
            self.past.take_over(record, step, notes)
            built = process_seconds()
            record.update(import_seconds=round(imported, 2), build_seconds=round(built, 2))
            announce(self, model, record, step)
            self.data.tokenizer.save(self.folder.path)
            record.save(self.folder.results)
            stopped_with = self._train(loop, begin)
            self._tidy_up(loop, begin)
            return report(self, record, checkpoints, stopped_with)

    def _compiled_model(self, build_model, build_optimizer):
        """The model with all its variables and its optimizer's, so that what is refused is now."""
        with initial_values_by_path(self.options.seed) as seed_noise:
            model = build_model(self.config)
            model.build()
            seed_noise(model)
        if self.options.init is not None:
            find_initial(self.options.init).assign_to(model)
        optimizer = build_optimizer(self.schedule)
        if self.recipe.weight_decay is not None:
            set_weight_decay(optimizer, self.recipe.weight_decay)
        model.compile(
            optimizer,
            accumulate=self.recipe.accumulate,
            norms_by=functools.partial(role_in, optimizer) if self.options.norms else None,
            jit_compile=self._jit_compile(),
        )
        model.optimizer.build(model.trainable_variables)
        return model

    def _jit_compile(self):
        """What `compile` gets: on TensorFlow, Keras leaves CPUs without XLA.

        There it is faster for narrow models and slower for wide ones (docs/performance.md).
        """
        narrow = self.config.hidden_dim <= NARROW
        return True if narrow and keras.config.backend() == "tensorflow" else "auto"

    def _loop(self, model, record, checkpoints, sinks, step, notes):
        mesh = record.mesh
        num_devices = mesh["data"] * mesh["model"] if mesh else 1
        meter = Meter(
            self.folder.curve,
            # Of its own: the loader's threads have the other copies.
            tokens_in=copy.copy(self.train_batches).tokens_in,
            steps=self.recipe.steps,
            schedule=self.schedule,
            flops_per_token=record.flops_per_token,
            peak_flops=peak_flops({**record.device, "count": num_devices}),
            first_step=step,
            train_seconds=notes.get("train_seconds", 0.0),
            sinks=sinks,
            extra=extra_logs(model),
        )
        return TrainingLoop(
            model=model,
            record=record,
            options=self.options,
            steps=self.recipe.steps,
            batches=self.train_batches,
            data=self.data,
            validation_batches=self.validation_batches,
            folder=self.folder,
            checkpoints=checkpoints,
            meter=meter,
            sinks=sinks,
        )

    def _train(self, loop, begin):
        """Runs the loop; however it ends, the record is written.

        Returns:
            int, the exit status if a signal has stopped it.
        """
        record, before = loop.record, loop.meter.train_seconds
        parts, seq_len = self.recipe.accumulate, self.config.max_seq_len
        needs = least_bytes(loop.model, self.recipe.batch_size * seq_len, parts)
        with StopOnInterrupt(loop.model) as stop:
            try:
                if record.device["kind"] == "cpu" and distribution.process()[1] == 1:
                    check_memory(needs)
                loop.run(stop)
                if record.status == "trained":
                    record.status = "finished"
            except BaseException as error:
                is_stopped = isinstance(error, KeyboardInterrupt)
                record.status = "interrupted" if is_stopped else "failed"
                record.error = repr(error)
                if is_out_of_memory(error):
                    record.error = in_one_line(error, needs, self.recipe, seq_len)
                    raise click.ClickException(record.error) from error
                raise
            finally:
                self._seal(loop, begin, loop.meter.train_seconds - before)
        return stop.exit_status

    def _seal(self, loop, begin, train_seconds):
        """Writes the record as it is now."""
        record = loop.record
        record.finished = utc_now()
        record.total_seconds = round(time.perf_counter() - begin, 1)
        record.peak_memory_bytes = peak_memory()
        if keras.config.backend() == "jax":
            record.programs = compiled_programs().table()
        record.curve = thin_curve(self.folder.curve)
        record.epochs = [round(times, 4) for times in self.train_batches.epochs(record.steps)]
        self.past.end_segment(record, train_seconds)
        record.save_if_there_is_room(self.folder.results)

    def _tidy_up(self, loop, begin):
        """Leaves what a run leaves besides its results, or only these."""
        record = loop.record
        if self.options.results_only:
            if record.status in ("finished", "diverged"):  # no run goes on from there
                shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
            return
        write_artifacts(self, record, loop.model)
        record.total_seconds = round(time.perf_counter() - begin, 1)
        record.save_if_there_is_room(self.folder.results)


def extra_logs(model):
    """Returns the names of what a training step logs besides the losses and `gradient_norm`.

    Args:
        model: `Grugformer`, built and compiled.

    Returns:
        list of str: metrics, and norms by group.
    """
    groups = map(model.norms_by, model.trainable_variables) if model.norms_by else ()
    norms = [f"{norm}/{group}" for group in dict.fromkeys(groups) for norm in NORMS]
    return [*(name for name in metric_results(model) if name != "loss"), *norms]


@contextlib.contextmanager
def refusals():
    """Turns into one line what is refused before training, and a model that is too large."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise click.ClickException(
            f"out of memory before the first step: {one_line(error)}; a smaller --size helps, or "
            "--mesh over more devices"
        ) from error
