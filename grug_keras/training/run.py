"""One training run: from data, options and a model to a folder with the record of it."""

import contextlib
import functools
import pathlib
import shutil
import time

import click
from grug_keras import distribution
from grug_keras.data import TokenBatches, load_data
from grug_keras.metrics import NORMS, metric_results
from grug_keras.optimizers import role_in, set_weight_decay
from grug_keras.tpu.flops import peak_flops
from grug_keras.training.checkpoints import Checkpoints
from grug_keras.training.folder import RunFolder, find_run, new_run_folder
from grug_keras.training.initial_values import initial_values_by_path
from grug_keras.training.loop import TrainingLoop
from grug_keras.training.meter import Meter, peak_memory
from grug_keras.training.model_config import size_config
from grug_keras.training.plots import plot_curve, thin_curve
from grug_keras.training.record import check_same_run, new_record, utc_now
from grug_keras.training.report import announce, report
from grug_keras.training.sampling import sample_validation
from grug_keras.training.sinks import SINKS
from grug_keras.training.startup import compiled_programs, process_seconds
import keras

VALIDATION_BYTES = 2**18
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
        self.script, self.recipe, self.options = pathlib.Path(script), recipe, options
        is_first = distribution.process()[0] == 0
        self.folder, self.began = None, None
        if is_first:
            arguments = (options.size, options.seed, options.resume)
            self.folder = find_run(options.out, self.script.stem, *arguments)
        tokenizer = options.tokenizer
        if self.folder is not None:
            self.began = self.folder.record()
            if self.folder.tokenizer.exists():  # a BPE is not trained again
                tokenizer = str(self.folder.tokenizer)
        self.data = load_data(options.data, tokenizer, VALIDATION_BYTES)
        self.config = size_config(
            options.size, self.data.tokenizer.vocab_size, options.seq_len, options.remat
        )
        self.train_batches, self.validation_batches = self._batches()
        self.schedule = recipe.schedule()
        self.log = options.log if is_first else ()
        for name in self.log:
            SINKS[name].require()

    def _batches(self):
        """The batches of training and of the validation slice."""
        recipe, options = self.recipe, self.options
        shape = {
            "bos_id": self.data.tokenizer.bos_id,
            "seq_len": self.config.max_seq_len,
            "batch_size": recipe.batch_size,
            "rows": distribution.local_rows(recipe.batch_size, recipe.accumulate),
        }
        train = TokenBatches(
            self.data.train,
            steps=recipe.steps,
            seed=options.seed,
            packing=options.packing,
            **shape,
        )
        return train, TokenBatches(self.data.validation, **shape)

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
        with refusals():
            model = self._compiled_model(build_model, build_optimizer)
            shared = self._open_folder()
            record = new_record(self, model)
            if self.began is not None:
                check_same_run(self.began, record, self.folder)
            sinks = [SINKS[name](self.folder.path / name, self.folder.id) for name in self.log]
            checkpoints = Checkpoints(shared.checkpoints, keep=self.options.keep)
        with contextlib.closing(checkpoints):
            with refusals():
                step, notes = checkpoints.restore(model) or (0, {})
                loop = self._loop(model, record, checkpoints, sinks, step, notes)
            self._continue(record, step, notes)
            built = process_seconds()
            record.update(import_seconds=round(imported, 2), build_seconds=round(built, 2))
            announce(self, model, record, step)
            self.data.tokenizer.save(self.folder.path)
            record.save(self.folder.results)
            self._train(loop, begin)
            return report(self, record, checkpoints)

    def _compiled_model(self, build_model, build_optimizer):
        """The model with all its variables and its optimizer's, so that what is refused is now."""
        with initial_values_by_path(self.options.seed) as seed_noise:
            model = build_model(self.config)
            model.build()
            seed_noise(model)
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

    def _open_folder(self):
        """Locks the run's folder; returns the first process's, which all processes see.

        Late, so that a run that is refused before it has a record leaves no folder.
        """
        if self.folder is None:
            name = f"{self.script.stem}-{self.options.size}-seed{self.options.seed}"
            self.folder = RunFolder(new_run_folder(self.options.out, name))
        self.folder.lock()
        return RunFolder(distribution.broadcast_text(str(self.folder.path.resolve())))

    def _continue(self, record, step, notes):
        """Takes over what the checkpoint and the record of a continued run say."""
        if self.began is not None:
            record.started = self.began["started"]
            record.resumed = [*self.began.get("resumed", []), step]
            made_by = ("source", "versions", "device")
            if step and any(self.began.get(name) != getattr(record, name) for name in made_by):
                record.identity = ""  # no single code has made it
        record.update(**notes.get("record", {}))

    def _loop(self, model, record, checkpoints, sinks, step, notes):
        mesh = record.mesh
        num_devices = mesh["data"] * mesh["model"] if mesh else 1
        meter = Meter(
            self.folder.curve,
            tokens_per_step=self.recipe.batch_size * self.config.max_seq_len,
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
        """Runs the loop, samples and draws; however it ends, the record is written."""
        record = loop.record
        try:
            loop.run()
            if record.status == "trained":
                record.status = "finished"
                if not self.options.results_only:
                    self._sample(record, loop.model)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            record.status = "interrupted" if interrupted else "failed"
            record.error = repr(error)
            raise
        finally:
            record.finished = utc_now()
            record.total_seconds = round(time.perf_counter() - begin, 1)
            record.peak_memory_bytes = peak_memory()
            if keras.config.backend() == "jax":
                record.programs = compiled_programs().table()
            for sink in loop.sinks:
                sink.close()
            record.curve = thin_curve(self.folder.curve)
            record.save_if_there_is_room(self.folder.results)
            self.folder.unlock()
        if self.options.results_only:
            if record.status in ("finished", "diverged"):  # no run goes on from there
                shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
            return
        plot_curve(
            self.folder.curve,
            self.folder.picture,
            title=f"{self.script.stem}, {self.options.size}, on {self.data.name}",
            validation=record.loss,
        )

    def _sample(self, record, model):
        with distribution.on_this_host(model) as whole_model:
            record.sample = sample_validation(whole_model, self.data, self.options.seed)


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
    """Turns a ValueError, which is what is refused before training, into one line."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error
