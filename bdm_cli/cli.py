"""The `bdm` command: one function per subcommand that loads the recipe, calls one job, prints. No logic."""

import enum
import sys
from pathlib import Path
from typing import Annotated

import typer

from bdm_cli.errors import BdmError
from bdm_cli.output import Format, console, say, show

app = typer.Typer(
    name="bdm",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, sample, score and compare 1-bit diffusion models: BinaryDM (ICLR 2025) and its baselines. "
    "Begin with `bdm demo`: handwritten digits, no GPU, no download.",
)

data = typer.Typer(no_args_is_help=True, help="Training images: what is there, and latents encoded once.")
app.add_typer(data, name="data")

bench = typer.Typer(no_args_is_help=True, help="Speed and memory beside other code, measured on this machine.")
app.add_typer(bench, name="bench")


class Shapes(enum.StrEnum):
    main = "main"
    all = "all"


class Weights(enum.StrEnum):
    ema = "ema"
    raw = "raw"


RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Recipe name (`bdm recipes`) or a .toml file.")]
AnyRecipe = Annotated[str | None, typer.Option("--recipe", "-r", help="Recipe of the run, with --seed.")]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help="Method in place of the recipe's own.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value (TOML value); repeatable.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of batches, noise and initialisation.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that exists.")]
RunId = Annotated[str | None, typer.Option("--run", help="Id of a finished run, a folder below runs/.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes at a time; 0 = what the cores allow.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write; default: where the recipes look.")]
Form = Annotated[Format, typer.Option("--format", "-f", help="Form of the table on stdout.")]


@app.command()
def demo(jobs: Jobs = 0, form: Form = Format.table) -> None:
    """The paper in miniature on handwritten digits: teacher, baseline, +EBB, +EBB+LRM at W1A4 (twin of Table 7).

    Example: `bdm demo`
    """
    from bdm_cli.jobs import demo

    table, page = demo.run(jobs)
    show(table, form, "Components on digits, W1A4, beside the paper's Table 7 (LSUN-Bedrooms)")
    say(f"report: {page}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe with every key resolved.")] = None,
    overrides: Overrides = None,
    form: Form = Format.table,
) -> None:
    """List the recipes, or show one with every key resolved and checked.

    Example: `bdm recipes digits-w1a4`
    """
    from bdm_cli.jobs import recipes

    show(recipes.run(name, overrides or []), form, name or "Recipes")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method: what it is, its fields, its recipes.")] = None,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Count size and operations, ask whether it packs (seconds).")
    ] = True,
    form: Form = Format.table,
) -> None:
    """List the methods: paper, bits, size and operations on LDM-4, tables, whether they pack; or explain one.

    Size and operations are those of the network that the method's recipe builds, as `bdm efficiency --method` counts.

    Example: `bdm methods bidm`
    """
    from bdm_cli.jobs import methods

    if name is not None:
        show(methods.one(name), form, name)
        return
    table = methods.run(cost)
    show(methods.narrow(table) if form == Format.table else table, form, "Methods")


@app.command()
def doctor(form: Form = Format.table) -> None:
    """Say what this machine has, and what each data set's recipes still miss.

    Example: `bdm doctor`
    """
    from bdm_cli.jobs import doctor

    show(doctor.run(), form, "Doctor")


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="An original .ckpt of latent-diffusion or ddim.")],
    model: Annotated[str, typer.Option("--model", help="cifar10, bedrooms, churches, ffhq, imagenet, vq-f4 or kl-f8")],
    weights: Annotated[
        Weights, typer.Option("--weights", help="The moving average, or the raw weights.")
    ] = Weights.ema,
    out: Out = None,
    form: Form = Format.table,
) -> None:
    """Convert an original checkpoint, strictly and without running its code, into a diffusers folder.

    Example: `bdm import model.ckpt --model churches`
    """
    from bdm_cli.jobs import import_checkpoint

    show(import_checkpoint.run(checkpoint, model, weights.value, out), form, f"Imported: {model}")


@data.command()
def check(recipe: RecipeName, overrides: Overrides = None, form: Form = Format.table) -> None:
    """Look at a recipe's training images: how many, which sizes, which cannot be decoded; a grid of prepared ones.

    Example: `bdm data check --recipe churches`
    """
    from bdm_cli.recipe import load

    spec = load(recipe, overrides or [])
    from bdm_cli.jobs import data

    show(data.check(spec), form, f"Images of {recipe}")


@data.command()
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    crops: Annotated[
        int | None, typer.Option("--crops", min=1, help="Random crops per image (data.crop = random).")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store 16-bit floats: half the room, rounded.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per run of the first stage.")] = 16,
    form: Form = Format.table,
) -> None:
    """Encode a latent model's training images once, so that training does not run the first stage again.

    What is encoded is not encoded again: after an interruption the same command goes on.

    Example: `bdm data prepare --recipe churches`
    """
    from bdm_cli.recipe import load

    spec = load(recipe, overrides or [])
    from bdm_cli.jobs import data

    show(data.prepare(spec, crops, half, batch), form, f"Latents of {recipe}")


@app.command("first-stage")
def first_stage(
    recipe: RecipeName,
    overrides: Overrides = None,
    seed: Seed = 0,
    out: Out = None,
    form: Form = Format.table,
) -> None:
    """Train a miniature's first stage (autoencoder) from scratch, with its `[first_stage.train]` budget.

    Example: `bdm first-stage --recipe digits-ldm`
    """
    from bdm_cli.recipe import load

    spec = load(recipe, overrides or [])
    from bdm_cli.jobs import first_stage

    show(first_stage.run(spec, seed, out), form, f"First stage of {recipe}")


@app.command()
def pretrain(recipe: RecipeName, overrides: Overrides = None, seed: Seed = 0, resume: Resume = False) -> None:
    """Train the full-precision teacher of a recipe from scratch, with its `[pretrain]` budget.

    Example: `bdm pretrain --recipe digits`
    """
    from bdm_cli import inputs
    from bdm_cli.recipe import load

    spec = load(recipe, overrides or []).pretraining()
    inputs.require(spec)  # before torch is imported
    from bdm_cli.jobs import train

    print(train.run(spec, seed, resume))


@app.command()
def train(
    recipe: RecipeName,
    method: MethodName = None,
    overrides: Overrides = None,
    seed: Seed = 0,
    resume: Resume = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="A few steps of the real network on random weights and data.")
    ] = False,
    steps: Annotated[int, typer.Option("--rehearse-steps", min=1, help="Steps of a rehearsal.")] = 3,
    form: Form = Format.table,
) -> None:
    """Train a student: quantized from the teacher, then trained with the recipe's method and budget.

    Example: `bdm train --recipe digits-w1a4 --method baseline --seed 1`
    """
    from bdm_cli import inputs
    from bdm_cli.recipe import load

    spec = load(recipe, overrides or [], method)

    if not rehearse:
        inputs.require(spec)  # before torch is imported
    from bdm_cli.jobs import train

    if rehearse:
        show(train.rehearse(spec, steps), form, f"Rehearsal of {spec.id} (random weights and data; nothing is kept)")
    else:
        print(train.run(spec, seed, resume))


@app.command()
def sample(
    run: RunId = None,
    recipe: AnyRecipe = None,
    method: MethodName = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="ddim, plms or dpm-solver")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Scale of guidance; 1 = none.")] = None,
    classes: Annotated[str | None, typer.Option("--classes", help="Comma-separated class ids, drawn equally.")] = None,
    images: Annotated[int | None, typer.Option("--images", "-n", help="How many images.")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed; default: 0, or the packed model's.")] = None,
    packed: Annotated[Path | None, typer.Option("--packed", help="A file of `bdm export`, in place of a run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for --packed; default: the file's.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="With --packed: fused blocks; images that are as good, not all the same.")
    ] = False,
) -> None:
    """Make the images of a finished run, or of a packed model: shards, then one ADM-style npz and a PNG grid.

    The options are short for `--set sample.sampler=...` and so on: they name the same samples. Several processes
    (`accelerate launch -m bdm_cli sample ...`) make the same images as one.

    Example: `bdm sample --recipe digits-cond-w1a4 --sampler plms --steps 20 --guidance 3.0 --classes 3,7`, or
    `bdm sample --packed model.safetensors --images 64`
    """
    from bdm_cli import runs

    given = {"sampler": sampler, "steps": steps, "guidance": guidance, "n_images": images}
    short = [f"sample.{key}={value}" for key, value in given.items() if value is not None]
    short += [f"sample.classes=[{classes}]"] if classes else []
    asked = [*(overrides or []), *short]
    if packed is None:
        if out is not None:
            raise BdmError("--out is for --packed; a run's images lie in its folder.\n  leave out --out")
        if fast:
            raise BdmError("--fast is for --packed: a run simulates its bits.\n  export it first: bdm export")
        spec, run_id = runs.target(run, recipe, method, asked, seed or 0)
        from bdm_cli.jobs import sample

        print(sample.run(spec, run_id))
        return
    if run or recipe or method:
        raise BdmError("--packed is a model of its own.\n  leave out --run, --recipe and --method")
    from bdm_cli.jobs import sample

    print(sample.run_packed(packed, asked, seed, out, fast))


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    run: Annotated[str | None, typer.Argument(help="Id of a finished run, or the path of its weights.")] = None,
    recipe: AnyRecipe = None,
    method: MethodName = None,
    overrides: Overrides = None,
    seed: Seed = 0,
    half: Annotated[bool, typer.Option("--half", help="16-bit floats for scales, biases and norms.")] = False,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights, to measure size and speed without a checkpoint.")
    ] = False,
    form: Form = Format.table,
) -> None:
    """Pack a student: one file with 1 bit per weight and all that draws images from it, measured beside its fp32 form.

    Example: `bdm export digits-w1a4-s0 -o model.safetensors`, or
    `bdm export --recipe bedrooms-w1a4 --random -o ldm4.safetensors`
    """
    from bdm_cli import inputs

    asked = inputs.exported(run, recipe, method, overrides or [], seed, random)
    from bdm_cli.jobs import export

    show(export.run(asked, out, half), form, "Packed")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A file of `bdm export`.")],
    by_layer: Annotated[bool, typer.Option("--layers", help="One row per quantized layer.")] = False,
    form: Form = Format.table,
) -> None:
    """Explain a packed model: where it comes from, what its bytes hold, whether it is whole.

    Example: `bdm inspect model.safetensors --layers`
    """
    from bdm_cli.jobs import inspect

    show(inspect.layers(file) if by_layer else inspect.run(file), form, str(file))


@app.command()
def evaluate(
    samples: Annotated[
        list[str] | None,
        typer.Argument(help="Finished runs, npz files, folders or tars of images, recipes (their data sets)."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="What to compare with: as SAMPLES; default: the recipe's.")
    ] = None,
    recipe: AnyRecipe = None,
    method: MethodName = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the run of --recipe; default: 0.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="adm, clean or torch-fidelity")] = None,
    features: Annotated[str | None, typer.Option("--features", help="inception, cifar10 or digits")] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="Of fid,sfid,is,precision,recall,kid; comma-separated.")
    ] = None,
    prepare: Annotated[
        str | None, typer.Option("--prepare", help="How a reference of raw image files becomes squares.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--inception-weights", help="Inception's file, in place of its own place.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time through the feature network.")] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="Side by side, with 95 % bootstrap intervals.")] = False,
    resamples: Annotated[
        int | None, typer.Option("--resamples", min=10, help="Resamples of --compare; default: 100.")
    ] = None,
    form: Form = Format.table,
) -> None:
    """Score images with FID, sFID, IS, precision, recall and KID, by ADM's, clean-fid's or torch-fidelity's protocol.

    A run (or --recipe with --seed) is scored by its own recipe, which leaves a record. Features of images are kept, so
    that a second time costs seconds; an interrupted pass goes on where it was.

    Example: `bdm evaluate samples.npz --reference VIRTUAL_lsun_bedroom256.npz`, or
    `bdm evaluate --compare digits-w1a4-s0 digits-w1a4-baseline-s0`
    """
    from bdm_cli import inputs
    from bdm_cli.recipe import ASKED_FOR

    if resamples and not compare:
        raise BdmError("--resamples is for --compare, which draws the samples again.\n  add --compare, or leave it out")
    given = {"protocol": protocol, "features": features, "prepare": prepare}
    short = [f'evaluate.{key}="{value}"' for key, value in given.items() if value is not None]
    short += [f"evaluate.metrics={metrics.replace(' ', '').split(',')}"] if metrics else []
    usual = [f"evaluate.metrics={list(ASKED_FOR[protocol])}"] if protocol in ASKED_FOR else []
    asked = inputs.evaluation(samples or [], reference, recipe, method, seed, [*usual, *(overrides or []), *short])
    from bdm_cli.jobs import evaluate

    table = evaluate.run(asked, weights, batch, (resamples or 100) if compare else 0)
    wide = compare and form in (Format.table, Format.md, Format.latex)
    show(
        evaluate.side_by_side(table) if wide else table, form, "Metrics, with 95 % intervals" if compare else "Metrics"
    )


@app.command()
def ablate(
    name: Annotated[str, typer.Argument(help="tau, lrm-k, ebb-scope, transition, lrm-update or components")],
    values: Annotated[str | None, typer.Option("--values", help="Comma-separated; default: the paper's.")] = None,
    recipe: RecipeName = "digits-w1a32",
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0..N-1 of every cell.")] = 1,
    jobs: Jobs = 0,
    form: Form = Format.table,
) -> None:
    """Train, sample and evaluate what an ablation table lacks, and print it beside the paper's.

    Example: `bdm ablate lrm-k --values 2,4,8`
    """
    from bdm_cli.jobs import ablate

    show(ablate.run(name, values, recipe, seeds, overrides or [], jobs), form, f"Ablation: {name} ({recipe})")


@app.command()
def efficiency(
    bits: Annotated[str | None, typer.Option("--bits", "-b", help="Weight / activation bits; default: all.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Network name, a miniature's too; default: all of the paper.")
    ] = None,
    edges: Annotated[str | None, typer.Option("--edges", help="Bits next to input and output: 8, 32 or both.")] = None,
    structure: Annotated[
        str | None, typer.Option("--structure", help="plain, high-order, lmb, bidm, bidm-paper; default: as printed.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Count this recipe's network, as its method builds it.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Count the recipes of these methods: comma-separated, or all.")
    ] = None,
    overrides: Overrides = None,
    scales: Annotated[
        str, typer.Option("--scales", help="Scales that count: none, paper (as printed sizes), all.")
    ] = "paper",
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Count the attentions' products (the papers do not).")
    ] = False,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="One row per layer of one network.")] = False,
    by_block: Annotated[bool, typer.Option("--by-block", help="One row per timestep block of one network.")] = False,
    form: Form = Format.table,
) -> None:
    """Model size and operations (Eqs. 16-17), counted on the real network definition, beside the papers' numbers.

    %: difference from the paper's number beside it. x: saving against full precision (in brackets the paper's). +: what
    a recipe's method has beyond layers of its bits. json and csv hold more columns than the table.

    Example: `bdm efficiency --bits 1/4 --model ldm4-bedrooms`, or
    `bdm efficiency --recipe bedrooms-w1a1-bidm --by-block`, or `bdm efficiency --method reactnet,bidiffsr`
    """
    if by_layer and by_block:
        raise BdmError("--by-layer and --by-block are two tables.\n  give one of them")
    from bdm_cli.jobs import efficiency

    asked = efficiency.Asked(bits, model, edges, structure, recipe, method, overrides or [])
    if by_layer or by_block:
        title, table = efficiency.taken_apart("layer" if by_layer else "block", asked, scales, attention)
        show(efficiency.narrow(table, form), form, title)
        return
    table, notes = efficiency.counted(asked, scales, attention)
    for title, sheet in efficiency.sheets(table, form):
        show(sheet, form, title)
    for note in notes:
        say(note)


@bench.command("evaluate")
def bench_evaluate(
    images: Annotated[int, typer.Option("--images", min=16, help="Images in each of two sets.")] = 256,
    size: Annotated[int, typer.Option("--size", min=8, help="Their height and width.")] = 256,
    samples: Annotated[int, typer.Option("--samples", min=10, help="Samples of precision and recall.")] = 10_000,
    reference: Annotated[int, typer.Option("--reference", min=10, help="Reference images of these.")] = 10_000,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each; the median counts.")] = 3,
    weights: Annotated[Path | None, typer.Option("--inception-weights", help="Default: at hand, or random.")] = None,
    form: Form = Format.table,
) -> None:
    """Time the evaluator beside torch-fidelity (same images, weights and cores) and torch.cdist, with peak memory.

    Example: `bdm bench evaluate --images 256`
    """
    from bdm_cli.jobs import bench

    show(bench.evaluate(images, size, samples, reference, rounds, weights), form, "The evaluator beside others")


@bench.command("inference")
def bench_inference(
    activations: Annotated[str, typer.Option("--activations", help="Bits of 1..8 or 32; comma-separated.")] = "4,8,1",
    shapes: Annotated[Shapes, typer.Option("--shapes", help="Five main layers of LDM-4, or all.")] = Shapes.main,
    high_order: Annotated[bool, typer.Option("--high-order", help="Two binary bases per weight, too.")] = False,
    step: Annotated[bool, typer.Option("--step/--no-step", help="The whole U-Net step at W1A4.")] = True,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: as many as torch takes.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each contender; medians count.")] = 15,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="ONNX Runtime, too, if it is installed.")] = True,
    form: Form = Format.table,
) -> None:
    """Time packed layers and the whole step of LDM-4 beside fp32 (PyTorch, ONNX Runtime) and int8: Table 16's twin.

    Example: `bdm bench inference --activations 4 --rounds 5`
    """
    bits = _bits_list(activations)
    from bdm_cli.jobs import bench_inference as job

    table = job.layers(bits, job.chosen(shapes), rounds, threads, (1, 2) if high_order else (1,), onnx)
    show(table, form, "Layers, batch 1")
    if step:
        whole, split = job.step(4, rounds, threads)
        show(whole, form, "Whole step, batch 1")
        show(split, form, "Where the packed step's time goes")


def _bits_list(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and (1 <= int(part) <= 8 or int(part) == 32) for part in parts):
        raise BdmError(f"cannot read --activations '{text}'.\n  allowed: 1..8 or 32, comma-separated; e.g. 4,8,1")
    return [int(part) for part in parts]


@app.command()
def report(
    table: Annotated[
        str | None, typer.Option("--table", "-t", help="Print this table: 1..16, P1, P2, B4, BA, BC.")
    ] = None,
    form: Form = Format.table,
) -> None:
    """Lay our records beside the paper's tables: results/tables/ and results/report.html.

    Example: `bdm report --table 7`
    """
    from bdm_cli.jobs import report

    show(report.run(table), form, f"Table {table}" if table else "Tables")


@app.command()
def features(
    dataset: Annotated[str, typer.Option("--dataset", help="digits or cifar10")],
    path: Annotated[str, typer.Option("--path", help="Where the data set lies (cifar10).")] = "",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps; default: the network's.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="File to write.")] = None,
) -> None:
    """Train the small classifier whose features score images offline (`evaluate.features`).

    Example: `bdm features --dataset digits`
    """
    from bdm_cli.jobs import features

    say(f"held-out accuracy {features.run(dataset, path, steps, seed, out):.2f} %")


def entry() -> None:
    """The `bdm` script: a user's mistake is one message on stderr and exit code 2, without traceback."""
    try:
        app()
    except BdmError as error:
        console.print(f"bdm: {error}", markup=False, style=None)
        sys.exit(2)
    except KeyboardInterrupt:
        say("bdm: stopped; what was finished is kept, the same command (with --resume for train) goes on")
        sys.exit(130)
