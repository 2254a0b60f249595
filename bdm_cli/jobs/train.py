"""`bdm train` and `bdm pretrain`: batch -> noise -> student and teacher -> losses -> optimizer, surviving any kill."""

import importlib.util
import itertools
import json
import math
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bdm_cli import inputs, methods, output, places, recipe, records, runs, student, tensorfile
from bdm_cli.diffusion import conditions, data, first_stage, losses, sampling, sources, trajectories
from bdm_cli.diffusion.models import estimate_noise, load_strictly, noise_scheduler
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Batch, Forward, Method
from bdm_cli.recipe import Recipe, Training
from bdm_cli.student import Built

GRID_IMAGES = 16
LOSS_STEPS = tuple(10**i for i in range(1, 7))
"""Training steps whose loss becomes a record (Tables 8, 9, 13)."""


Batches = Callable[[int], Batch]
"""The batch of any training step, a pure function of the step: nothing to save, nothing to skip on resume."""


def run(spec: Recipe, seed: int = 0, resume: bool = False) -> Path:
    """Train a recipe's student to the end of its budget; returns the file with its (EMA) weights.

    Raises: BdmError for missing inputs, a run that exists (unless resume), a changed recipe, a loss that is not finite.
    """
    inputs.require(spec)
    run_id = spec.run_id(seed)
    with runs.claim(run_id):
        if not _unfinished(spec, run_id, resume):
            output.say(f"{run_id} is finished already: {runs.weights(run_id)}")
            return runs.weights(run_id)
        student.use_threads(spec)
        built = student.build(spec, seed)
        free = built.method.data_free
        batches, source = trajectory_batches(spec, seed, built.teacher) if free else real_batches(spec, seed)
        processes = student.processes()
        processes.wait_for_everyone()  # none may find the run begun by another
        if processes.is_main_process:
            runs.write_text(runs.recipe_copy(run_id), spec.model_dump_json(indent=2))
        return _train(spec, seed, run_id, built, batches, source).weights


def rehearse(spec: Recipe, steps: int) -> pd.DataFrame:
    """Some steps of the real network in the real loop, with random weights on random latents; nothing is kept.

    One row: parameters, batch, median seconds per step, peak memory, and the hours of the recipe's steps at that pace.
    Of a method that works after training, `steps` iterations of each of its units, with the row that it gives.
    """
    student.use_threads(spec)
    post_training = methods.build(spec).post_training
    short = {} if post_training else {"steps": steps, "checkpoint_every": steps, "grid_every": 0, "log_every": 1}
    trial = spec.model_copy(update={"train": spec.train.model_copy(update=short)})
    with tempfile.TemporaryDirectory() as folder, places.home_at(folder):
        teacher, bare, method = built = student.build(trial, seed=0, random_teacher=True)
        if post_training:
            device, batches = student.processes().device, random_batches(trial)
            calls = (_to(batches(step), device).inputs for step in itertools.count())
            measured = method.rehearse_(bare.to(device), teacher.to(device), calls, steps)
            peak_gib = _peak_gib(device)
        else:
            run_id, batches = f"rehearsal-{spec.name}", random_batches(trial, teacher if method.data_free else None)
            with runs.claim(run_id):
                done = _train(trial, 0, run_id, built, batches, "random numbers", keep=False)
            step_s, peak_gib = float(np.median(done.step_s)), done.peak_gib
            hours = {f"{spec.train.steps:,} steps (h)": round(step_s * spec.train.steps / 3600, 1)}
            measured = {"Batch": spec.train.batch, "Steps": steps, "Step (s)": round(step_s, 3)} | hours
    row = {
        "Network": spec.unet.name,
        "Parameters (M)": round(sum(p.numel() for p in teacher.parameters()) / 1e6, 2),
        "Peak memory (GiB)": round(peak_gib, 2),
    }
    return pd.DataFrame([row | measured])


def real_batches(spec: Recipe, seed: int) -> tuple[Batches, str]:
    """Noisy training images or latents, and what they are made from (sources.of_recipe's identity).

    Each process of a distributed training takes its part of the batch.
    """
    processes = student.processes()
    rank, world, device = processes.process_index, processes.num_processes, processes.device
    source, condition = sources.of_recipe(spec, device), conditions.of_recipe(spec, device)
    scheduler = noise_scheduler(spec.scheduler)

    def batch(step: int) -> Batch:
        indices = data.batch_indices(len(source), spec.train.batch * world, step, seed)[rank::world]
        random = torch.Generator().manual_seed(_step_seed(seed, step, rank))
        x = source.batch(indices, random)
        t = torch.randint(spec.scheduler.n_timesteps, (len(x),), generator=random)
        noise = torch.randn(x.shape, generator=random)
        context = condition.of_training(source.known(indices), _dropped(spec, len(x), random))
        return Batch((scheduler.add_noise(x, noise.to(x.device), t.to(x.device)), t, *context), noise, x)

    return batch, source.identity


def trajectory_batches(spec: Recipe, seed: int, teacher: nn.Module) -> tuple[Batches, str]:
    """The teacher's own calls along its sampling trajectories, one after the other: no data.

    Each process of a distributed training follows trajectories of its own.
    """
    processes = student.processes()
    calls = trajectories.Calls(
        spec, teacher.to(processes.device), seed, processes.process_index, processes.num_processes
    )
    return lambda step: Batch(*calls(step)), f"trajectories of {spec.model.pretrained}"


def random_batches(spec: Recipe, teacher: nn.Module | None = None) -> Batches:
    """Random latents of the network's input shape, for rehearsals.

    teacher: whose estimates are the targets, as along its trajectories, each of which costs one call there, too.
    """
    device = student.processes().device

    def batch(step: int) -> Batch:
        random = torch.Generator().manual_seed(step)
        inputs = student.random_inputs(spec, spec.train.batch, random)
        noise, clean = (torch.randn(inputs[0].shape, generator=random) for _ in range(2))
        if teacher is None:
            return Batch(inputs, noise, clean)
        with torch.no_grad():
            return Batch(inputs, estimate_noise(teacher.to(device), *(part.to(device) for part in inputs)))

    return batch


def _dropped(spec: Recipe, n: int, random: torch.Generator) -> Tensor:
    """Which images' conditions are hidden, bool [n]."""
    share = spec.train.drop_condition
    return torch.rand(n, generator=random) < share if share else torch.zeros(n, dtype=torch.bool)


class Done(NamedTuple):
    weights: Path
    step_s: list[float]
    peak_gib: float


def _train(
    spec: Recipe, seed: int, run_id: str, built: Built, batches: Batches, source: str, keep: bool = True
) -> Done:
    """The loop. source: what the batches are made from; keep: whether the run leaves weights and records (a rehearsal
    does not)."""
    t = spec.train
    trackers = "tensorboard" if keep and importlib.util.find_spec("tensorboard") else None
    accelerator = Accelerator(
        mixed_precision=t.precision,
        log_with=trackers,
        project_dir=runs.run_dir(run_id),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    device, main = accelerator.device, accelerator.is_main_process
    teacher, bare, method = built
    bare.to(device)
    if teacher is not None:
        teacher.to(device)
        output.say(f"{run_id}: calibrating")
        keeper = Kept(run_id, source)
        method.calibrate_(bare, teacher, (_to(batches(step), device).inputs for step in itertools.count()), keeper)
        for buffer in method.state.buffers():  # every process saw its own part of the batch
            buffer.copy_(broadcast(buffer))
    average = AveragedModel(bare, multi_avg_fn=_averaging(t.ema)) if t.ema and t.steps else None
    state = State(run_id, bare, average, method, source)
    done, wall_s, optimizer_state = state.restore(t.steps)

    named = _by_rate(method, bare)
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in group], "factor": factor} for factor, group in named.items()],
        lr=t.lr, weight_decay=t.weight_decay, betas=(t.beta1, t.beta2),
    )  # fmt: skip
    _restore_optimizer(optimizer, [name for group in named.values() for name, _ in group], optimizer_state)
    model, optimizer = accelerator.prepare(bare, optimizer)
    blocks = method.taps(bare) if teacher is not None else []
    taught = teacher is not None and (bool(blocks) or method.wants_teacher)
    taps_bi = losses.FeatureTaps(bare, blocks)
    taps_fp = losses.FeatureTaps(teacher, blocks) if blocks else None
    log = Log(run_id, t.log_every, accelerator, done, wall_s)
    accelerator.init_trackers("tensorboard")

    with StopSignal() as stop, output.progress(f"training {run_id}", t.steps, "steps", done) as advance:
        for step in range(done, t.steps):
            batch, estimate_fp = _to(batches(step), device), None
            torch.manual_seed(_step_seed(seed, step, accelerator.process_index))  # dropout
            with accelerator.autocast():
                if taught:
                    with torch.no_grad():
                        estimate_fp = estimate_noise(teacher, *batch.inputs).float()
                method.before_step_(bare, batch)
                estimate = estimate_noise(model, *batch.inputs).float()
            features = ([f.float() for f in taps.take()] if taps else [] for taps in (taps_fp, blocks and taps_bi))
            forward = Forward(bare, step, *features, batch, estimate, estimate_fp)
            parts = {"simple": losses.noise_loss(estimate, method.target(forward), t.loss)} | method.losses(forward)
            loss = torch.stack(list(parts.values())).sum()
            values = {name: part.item() for name, part in parts.items()}
            if not math.isfinite(sum(values.values())):
                raise BdmError(
                    f"{run_id}: the loss is {sum(values.values())} at step {step + 1}; the last checkpoint is kept.\n"
                    "  lower train.lr or use train.precision=no, in a run of its own (--set or --seed)"
                )
            lr = t.lr * _lr_factor(t, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            optimizer.zero_grad()
            accelerator.backward(loss)
            if t.grad_clip:
                accelerator.clip_grad_norm_(model.parameters(), t.grad_clip)
            optimizer.step()
            done = step + 1
            if average is not None:
                average.update_parameters(bare)
                method.on_step_(average.module, done, t.steps)
            method.on_step_(bare, done, t.steps)
            log(done, values, lr)
            advance(1, f"loss {values['simple']:.4f}")
            if main and t.grid_every and done % t.grid_every == 0:
                _write_grid(average.module if average is not None else bare, spec, run_id, done)
            last = done == t.steps
            if main and not last and (done % t.checkpoint_every == 0 or stop.signal):
                state.save(optimizer, done, log.wall_s)
            if stop.signal and not last:
                output.say(f"{run_id}: stopped at step {done}; go on with --resume")
                raise SystemExit(128 + stop.signal)

    accelerator.wait_for_everyone()
    accelerator.end_training()
    if main and keep:
        log.records(spec, seed, str(device))
        final = average.module if average is not None else bare
        student.save(runs.weights(run_id), final, spec, seed, t.steps)
        for path in (runs.checkpoint(run_id), runs.calibration(run_id)):
            path.unlink(missing_ok=True)
        output.say(f"{run_id}: {t.steps} steps, weights in {runs.weights(run_id)}")
    return Done(runs.weights(run_id), log.step_s, _peak_gib(device))


class State:
    """What a training needs to go on as if it had not stopped: weights, average, method, optimizer, step, time."""

    def __init__(
        self, run_id: str, bare: nn.Module, average: AveragedModel | None, method: Method, source: str
    ) -> None:
        self.source = source
        self.path = runs.checkpoint(run_id)
        self.modules = {"student": bare, "method": method.state} | ({"average": average} if average is not None else {})
        self.method = method

    def save(self, optimizer: torch.optim.Optimizer, done: int, wall_s: float) -> None:
        tensors = {f"{part}.{k}": v for part, module in self.modules.items() for k, v in module.state_dict().items()}
        names = [name for name, _ in self.method.trainable(self.modules["student"])]
        parameters = dict(self.modules["student"].named_parameters())
        for name in names:
            for key, value in optimizer.state.get(parameters[name], {}).items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        tensorfile.write(self.path, tensors, {"step": str(done), "wall_s": str(wall_s), "source": self.source})

    def restore(self, steps: int) -> tuple[int, float, dict[str, Tensor]]:
        """Load the last checkpoint, if any. Returns steps done, seconds used, the optimizer's tensors by name."""
        if not self.path.exists():
            return 0, 0.0, {}
        tensors, header = tensorfile.read(self.path)
        if header["source"] != self.source:
            raise BdmError(
                f"{self.path} was trained on {header['source']}, now there is {self.source}.\n"
                "  go on with what it was begun with (a latent cache added or removed?), or begin anew: another --seed"
            )
        done = int(header["step"])
        for part, module in self.modules.items():
            if part != "method":
                self.method.on_step_(module.module if part == "average" else module, done, steps)
            own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
            load_strictly(module, own, self.path)
        optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        return done, float(header["wall_s"]), optimizer


class Kept:
    """A methods.base.Keeper: one file of the run, bound to what the batches are made from."""

    def __init__(self, run_id: str, source: str) -> None:
        self.path, self.source = runs.calibration(run_id), source

    def read(self) -> dict[str, Tensor]:
        if not self.path.exists():
            return {}
        tensors, header = tensorfile.read(self.path)
        return tensors if header["source"] == self.source else {}

    def write(self, tensors: dict[str, Tensor]) -> None:
        tensorfile.write(self.path, tensors, {"source": self.source})


def _restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Give each named parameter its saved state; a parameter that had none yet has none now."""
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(names):
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        if keys:
            state[index] = {key: tensors[f"{name}.{key}"] for key in keys}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Log:
    """Loss lines in metrics.jsonl (means since the last line) and in the tracker; step times; the loss records."""

    def __init__(self, run_id: str, every: int, accelerator: Accelerator, done: int, wall_s: float) -> None:
        self.run_id, self.every, self.accelerator = run_id, every, accelerator
        self.start = self.last = time.monotonic()
        self.before_s = wall_s
        self.step_s: list[float] = []
        self.pending: list[dict[str, float]] = []
        if accelerator.is_main_process:  # lines after the checkpoint will be written again
            lines = [json.dumps(line) + "\n" for line in runs.read_lines(self.path) if line["step"] <= done]
            runs.write_text(self.path, "".join(lines))

    @property
    def path(self) -> Path:
        return runs.metrics_log(self.run_id)

    @property
    def wall_s(self) -> float:
        return self.before_s + time.monotonic() - self.start

    def __call__(self, done: int, parts: dict[str, float], lr: float) -> None:
        now = time.monotonic()
        self.step_s.append(now - self.last)
        self.last = now
        self.pending.append({"loss": sum(parts.values())} | {f"loss_{name}": value for name, value in parts.items()})
        if (done % self.every == 0 or done in LOSS_STEPS) and self.accelerator.is_main_process:
            means = {k: float(np.mean([p[k] for p in self.pending if k in p])) for k in self.pending[-1]}
            runs.append_line(self.path, {"step": done, **means, "lr": lr, "wall_s": round(self.wall_s, 3)})
            self.accelerator.log(means | {"lr": lr}, step=done)
            self.pending = []

    def records(self, spec: Recipe, seed: int, device: str) -> None:
        """One record per step in LOSS_STEPS: the mean over the logged lines of the last tenth of the steps up to it."""
        lines = runs.read_lines(self.path)
        for target in (n for n in LOSS_STEPS if n <= spec.train.steps):
            near = [line for line in lines if 0.9 * target < line["step"] <= target]
            if near:
                value = float(np.mean([line["loss_simple"] for line in near]))
                measured = {
                    "metric": f"loss_simple@{target}",
                    "value": value,
                    "steps": target,
                    "wall_s": near[-1]["wall_s"],
                }
                about = {"recipe": spec.train_id, "digest": spec.digest, "seed": seed, "device": device}
                records.append(records.make(run=self.run_id, **about, **measured))


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the current step; the second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


def _unfinished(spec: Recipe, run_id: str, resume: bool) -> bool:
    """Whether there is anything left to train, after checking that this recipe may go on in the directory."""
    stored = runs.recipe_copy(run_id)
    if not stored.exists():
        return True
    if not resume:
        state = "finished" if runs.weights(run_id).exists() else "not finished"
        raise BdmError(
            f"run '{run_id}' exists ({state}).\n"
            f"  go on with --resume, use another --seed, or remove {runs.run_dir(run_id)}"
        )
    changed = recipe.difference(runs.stored_recipe(run_id), spec)
    changed = [line for line in changed if recipe.of_training(line.partition(":")[0], spec.method["name"])]
    if changed:
        text = "\n".join(f"  {line}" for line in changed)
        raise BdmError(
            f"run '{run_id}' was started with another recipe (then / now):\n{text}\n"
            "  use the values it was started with, or another --seed"
        )
    return not runs.weights(run_id).exists()


def _write_grid(unet: nn.Module, spec: Recipe, run_id: str, done: int) -> None:
    """A few images of the student under training, the same noise each time."""
    training = unet.training
    stage = None if spec.first_stage is None else first_stage.load(spec.first_stage).to(next(unet.parameters()).device)
    draw = sampling.of_recipe(spec, unet.eval(), conditions.of_recipe(spec), stage, GRID_IMAGES, seed=0)
    pictures = draw(range(GRID_IMAGES))
    unet.train(training)
    path = runs.run_dir(run_id) / "grids" / f"step-{done:07d}.png"
    runs.write_whole(path, lambda temporary: sampling.grid(pictures).save(temporary))


def _lr_factor(t: Training, step: int) -> float:
    """Linear warm-up over t.warmup steps, then constant, or to 0 at the end along a cosine or a line."""
    if step < t.warmup:
        return (step + 1) / t.warmup
    progress = (step - t.warmup) / max(t.steps - t.warmup, 1)
    if t.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if t.lr_schedule == "linear" else 1.0


def _averaging(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """EMA whose first updates follow closer: decay_n = min(decay, (1 + n) / (10 + n)) (CompVis's LitEma)."""

    @torch.no_grad()
    def average(ema: list[Tensor], values: list[Tensor], n: Tensor) -> None:
        d = min(decay, (1 + int(n)) / (10 + int(n)))
        torch._foreach_lerp_(ema, values, 1 - d)

    return average


def _to(batch: Batch, device: torch.device) -> Batch:
    clean = None if batch.clean is None else batch.clean.to(device)
    return Batch(tuple(part.to(device) for part in batch.inputs), batch.noise.to(device), clean)


def _by_rate(method: Method, bare: nn.Module) -> dict[float, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters with their names, grouped by the factor of their learning rate."""
    factors, groups = method.lr_factors(bare), {}
    for name, parameter in method.trainable(bare):
        groups.setdefault(factors.get(name, 1.0), []).append((name, parameter))
    return groups


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
