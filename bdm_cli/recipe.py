"""A recipe: everything that can change a result, as TOML, closed and frozen.

`load` reads recipes/**/<name>.toml (or a path), merges it over its parent (`extends`), applies `--set key=value`, and
checks every key. The `[method]` table is checked by the method it names (methods.build), since a method's fields live
in the method's own file.
"""

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from bdm_cli import pretrained
from bdm_cli.errors import BdmError, nearest, unknown

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

PLACES = {"data.path", "data.latents", "first_stage.path"}
"""Keys that say where an input lies whose content the data set's name fixes."""

MOVABLE = PLACES | {"model.pretrained"}
"""Keys that may change after training: where inputs of the sampling lie (a text encoder, with its model)."""

FILES = {"model.pretrained", "evaluate.reference"}
"""Keys that name a file whose content changes results: part of the id when overridden (by the file's name and a hash of
its path), but not of the digest, since the same file may lie elsewhere on another machine."""

NEUTRAL = (
    PLACES
    | {
        "summary",
        "evaluate.get_it",
        "evaluate.metrics",
        "data.get_it",
        "model.get_it",
        "first_stage.get_it",
        "sample.batch",
        "sample.shard",
    }
    | {
        f"{section}.{key}"
        for section in ("train", "pretrain")
        for key in ("log_every", "grid_every", "checkpoint_every")
    }
)
"""Keys that do not change what is computed: no part of a recipe's id, and free to change on --resume."""


def neutral(dataset: str) -> set[str]:
    """NEUTRAL for a data set: of a folder of one's own, the path is what is computed with."""
    return NEUTRAL - {"data.path"} if dataset == "folder" else NEUTRAL


SHARED_METHOD_KEYS = ("activation_bits", "edge_bits", "attention_matmul", "real_skips")
"""Fields that every method has (methods/base.py), kept when `--method` or a child recipe changes the method."""

DATA_FREE = ("qdiffusion", "efficientdm")
"""Methods that need no training images: theirs come from the teacher's own sampling (methods/base.py, data_free)."""

AFTER_TRAINING = {"sample", "evaluate"}
"""Sections that act after training: one trained run serves all their values, but for what of_training says."""

TRAJECTORY = {f"sample.{key}" for key in ("sampler", "steps", "spacing", "eta", "guidance", "classes", "prompts")}
"""Keys that decide the sampling trajectories of the teacher, along which DATA_FREE methods train."""

DRAWN = "drawn"
"""Stands for [sample] in the id of images that a DATA_FREE method drew in another way than it was trained for."""


def of_training(key: str, method: str) -> bool:
    """Whether the trained weights depend on a dotted key."""
    return key.split(".")[0] not in AFTER_TRAINING | {DRAWN} or (method in DATA_FREE and key in TRAJECTORY)


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Preparation = Literal["none", "square-bicubic", "box-crop", "adm-crop", "bilinear-crop"]
"""How an image of any size becomes a square one (images/prepare.py); none: it must have the right size already."""


class Data(Section):
    """Training images. `path` is looked for below the home directory unless absolute; '' = embedded in the package.

    prepare, crop: how an image becomes image_size x image_size; a random crop is drawn anew at every use.
    flip: half of the uses mirror the image.
    corrupt: what to do with an image that cannot be decoded; 'skip' names each and goes on without it.
    latents: where `bdm data prepare` puts the encoded images of a latent model; training uses them if they are there.
    """

    dataset: Literal["digits", "cifar10", "bedrooms", "churches", "ffhq", "imagenet", "folder"]
    path: str = ""
    image_size: Positive
    channels: Positive
    prepare: Preparation = "none"
    crop: Literal["centre", "random"] = "centre"
    flip: bool = False
    corrupt: Literal["error", "skip"] = "error"
    latents: str = ""
    get_it: str = ""


class Unet(Section):
    """A diffusers U-Net by its constructor's arguments (reference: diffusers UNet2DModel, UNet2DConditionModel).

    heads: where the network fixes the number of attention heads rather than their width (LDM-8), that number.
    n_classes: size of the class embedding, unconditional class included; 0 = unconditional model.
    """

    name: str
    kind: Literal["UNet2DModel", "UNet2DConditionModel"] = "UNet2DModel"
    heads: NonNegative = 0
    n_classes: NonNegative = 0
    arguments: dict[str, Any]

    @property
    def condition(self) -> Literal["none", "classes", "text"]:
        """What the network is told beside x_t and t."""
        if self.n_classes:
            return "classes"
        return "text" if self.kind == "UNet2DConditionModel" else "none"


class FirstStageTraining(Section):
    """Budget of a first stage trained from scratch (`bdm first-stage`): AdamW, cosine, squared error.

    prior: weight of the posterior's divergence from N(0, 1) per latent number (AutoencoderKL), or of the codebook's
        loss (VQModel).
    """

    steps: Positive
    batch: Positive
    lr: Annotated[float, Field(gt=0)]
    prior: Annotated[float, Field(ge=0)]
    threads: NonNegative = 0


class FirstStage(Section):
    """The autoencoder of a latent diffusion model, by its diffusers constructor's arguments; it is never quantized.

    path: a diffusers folder (config.json and weights), whose config holds the scaling factor.
    """

    kind: Literal["VQModel", "AutoencoderKL"]
    path: str
    get_it: str = ""
    arguments: dict[str, Any]
    train: FirstStageTraining | None = None

    @property
    def factor(self) -> int:
        """Side of an image / side of its latent."""
        return 2 ** (len(self.arguments.get("block_out_channels", (0,))) - 1)

    @property
    def channels(self) -> int:
        return self.arguments.get("vq_embed_dim") or self.arguments.get("latent_channels", 0)


class Scheduler(Section):
    """The noise schedule, in diffusers' terms (DDIMScheduler)."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    beta_start: float
    beta_end: float
    n_timesteps: Positive = 1000
    set_alpha_to_one: bool
    steps_offset: Annotated[int, Field(ge=0, le=1)]
    clip_sample: bool = False


class Model(Section):
    """The full-precision model (teacher, and the student's start).

    pretrained: a file that `bdm pretrain` wrote, a diffusers folder (of `bdm import` or any other), or a hub id
        (owner/name). 'package:...' lies inside the package, else below the home; '' = none: training from scratch.
    """

    pretrained: str
    get_it: str = ""


class Training(Section):
    """Budget and optimizer of one training: AdamW, gradient clipping, warm-up then constant or cosine, EMA.

    ema: decay of the weight average; its first steps use min(ema, (1 + n) / (10 + n)). 0 = no average.
    drop_condition: share of training images whose class or caption is hidden, for classifier-free guidance.
    loss: of the noise estimate; `sum` adds over pixels and averages over the batch, `mean` averages over both (Eq. 4).
    threads: CPU threads of torch; 0 leaves torch's default. A fixed number makes a CPU result independent of the cores.
    """

    steps: NonNegative
    batch: Positive
    lr: Annotated[float, Field(gt=0)]
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: NonNegative = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    ema: Fraction = 0.9999
    loss: Literal["mse", "mse-sum", "l1"] = "mse"
    drop_condition: Fraction = 0.0
    precision: Literal["no", "bf16"] = "no"
    threads: NonNegative = 0
    log_every: Positive = 10
    grid_every: NonNegative = 0
    checkpoint_every: Positive = 1000


class Sample(Section):
    """How images are made (diffusion/sampling.py).

    spacing: of DDIM's times; 'quad' is ermongroup's quadratic list. eta: 0 = deterministic DDIM.
    guidance: scale of classifier-free guidance; 1 = none.
    classes: which classes to draw, in equal shares; empty = all. prompts: the same for text-conditional networks.
    to_bytes: how [-1, 1] becomes 0..255 (both are in use).
    """

    sampler: Literal["ddim", "plms", "dpm-solver"] = "ddim"
    steps: Positive = 100
    spacing: Literal["uniform", "quad"] = "uniform"
    eta: Fraction = 0.0
    guidance: Annotated[float, Field(ge=0)] = 1.0
    classes: tuple[NonNegative, ...] = ()
    prompts: tuple[str, ...] = ()
    n_images: Positive = 50_000
    batch: Positive = 64
    shard: Positive = 1000
    to_bytes: Literal["round", "truncate"]


ASKED_FOR = {
    "adm": ("fid", "sfid", "is", "precision", "recall"),
    "clean": ("fid", "kid"),
    "torch-fidelity": ("fid", "is", "precision", "recall"),
}
"""The metrics of `bdm evaluate --protocol` where none are named."""


class Evaluate(Section):
    """features: whose features serve the metrics. n_reference: real images for precision, recall and KID; 0 = all.

    protocol: whose suite is followed: ADM's, clean-fid's, torch-fidelity's with its defaults.
    reference: an ADM-style npz or a folder or tar of images in place of the training images; '' = the training images.
    prepare: how the training images become the reference; it may differ from data.prepare, which serves training.
    distances: of precision and recall; "float16" rounds them as ADM's code does.
    """

    features: Literal["digits", "cifar10", "inception"]
    protocol: Literal["adm", "clean", "torch-fidelity"] = "adm"
    metrics: tuple[str, ...] = ASKED_FOR["adm"]
    distances: Literal["exact", "float16"] = "exact"
    reference: str = ""
    prepare: Preparation = "none"
    n_reference: NonNegative = 10_000
    get_it: str = ""

    @property
    def compares(self) -> bool:
        """Whether any of its metrics needs a reference; the Inception Score does not."""
        return bool(set(self.metrics) - {"is"})


class Recipe(Section):
    """One fully resolved recipe. `overrides` are the keys that differ from the file of that name."""

    name: str
    summary: str
    data: Data
    unet: Unet
    scheduler: Scheduler
    first_stage: FirstStage | None = None
    model: Model
    method: dict[str, Any]
    pretrain: Training | None = None
    train: Training
    sample: Sample
    evaluate: Evaluate
    overrides: dict[str, Any] = {}

    @pydantic.field_validator("method")
    @classmethod
    def _has_name(cls, method: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(method.get("name"), str):
            raise ValueError('needs a name, e.g. name = "binarydm"')
        return method

    @pydantic.model_validator(mode="after")
    def _parts_fit_each_other(self) -> "Recipe":
        faults = [*self._sampler_faults(), *self._condition_faults(), *self._shape_faults()]
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    def _sampler_faults(self) -> list[str]:
        s, found = self.sample, []
        n = self.scheduler.n_timesteps
        stride = n // s.steps  # 0 if there are too many steps
        last = stride and (n - 1) // stride * stride + self.scheduler.steps_offset
        if s.steps > n:
            found.append(f"sample.steps: at most {n} (given {s.steps})")
        elif s.sampler != "dpm-solver" and s.spacing == "uniform" and last >= n:
            found.append(
                f"sample.steps: the original step list for {s.steps} contains time {n}, which the network does not "
                "know (the original code fails there, too); use e.g. 20, 50, 100, 200, 250"
            )
        if s.sampler != "ddim" and s.eta:
            found.append(f"sample.eta: is DDIM's; with {s.sampler} it must be 0 (given {s.eta:g}): --set sample.eta=0")
        if s.sampler != "ddim" and s.steps < 2:
            found.append(f"sample.steps: {s.sampler} takes at least 2 (given {s.steps})")
        if s.sampler != "ddim" and self.scheduler.clip_sample:
            found.append(f"scheduler.clip_sample: is DDIM's; with {s.sampler} it must be false")
        if s.sampler != "ddim" and s.spacing != "uniform":
            found.append(f"sample.spacing: '{s.spacing}' is for ddim; with {s.sampler} it must be 'uniform'")
        return found

    def _condition_faults(self) -> list[str]:
        s, unet, found = self.sample, self.unet, []
        if unet.condition != "classes" and s.classes:
            found.append(f"sample.classes: the network '{unet.name}' knows no classes (given {list(s.classes)})")
        if unet.condition != "text" and s.prompts:
            found.append(f"sample.prompts: the network '{unet.name}' reads no text (given {list(s.prompts)})")
        if unet.condition == "none" and s.guidance != 1:
            found.append(
                f"sample.guidance: the network '{unet.name}' is unconditional, nothing can guide it; "
                f"it must be 1 (given {s.guidance:g})"
            )
        if unet.condition == "none" and any(budget and budget.drop_condition for budget in (self.train, self.pretrain)):
            found.append(f"drop_condition: the network '{unet.name}' is unconditional; it must be 0")
        if unet.condition == "text" and not isinstance(unet.arguments.get("cross_attention_dim"), int):
            found.append("unet.arguments.cross_attention_dim: is missing; give the width of the text's rows")
        bad = [c for c in s.classes if c >= unet.n_classes - 1]
        if unet.condition == "classes" and bad:
            found.append(
                f"sample.classes: {bad} are out of range; '{unet.name}' has the classes 0..{unet.n_classes - 2} "
                f"({unet.n_classes - 1} stands for no class)"
            )
        return found

    def _shape_faults(self) -> list[str]:
        arguments, data, first = self.unet.arguments, self.data, self.first_stage
        found = []
        if arguments.get("out_channels") not in (None, arguments.get("in_channels")):
            found.append(
                f"unet.arguments: {arguments['out_channels']} output channels for {arguments.get('in_channels')} input "
                "channels; only networks that predict the noise alone can be trained (no learned variance)"
            )
        given = tuple(arguments.get(key) for key in ("sample_size", "in_channels"))
        if first is None and given != (data.image_size, data.channels):
            found.append(
                f"unet.arguments sample_size, in_channels = {given} must be data's image_size, channels = "
                f"{(data.image_size, data.channels)}"
            )
        if first is not None and given != (data.image_size // first.factor, first.channels):
            found.append(
                f"unet.arguments sample_size, in_channels = {given} must be the first stage's latents: data.image_size "
                f"{data.image_size} / {first.factor}, {first.channels} channels"
            )
        return found

    def pretraining(self) -> "Recipe":
        """The recipe that makes this one's teacher: the same network and data, from scratch, with its [pretrain].

        Raises: BdmError for overrides that it would ignore.
        """
        ignored = [key for key in self.overrides if key.split(".")[0] in ("train", "method", "model")]
        if ignored:
            raise BdmError(f"pretraining takes no {ignored[0]}.\n  its budget is [pretrain]: --set pretrain.steps=...")
        if self.pretrain is None:
            raise BdmError(
                f"recipe '{self.name}' has no [pretrain] budget.\n  give one, or start from model.pretrained"
            )
        changes = {
            "name": f"{self.name}-teacher",
            "train": self.pretrain,
            "method": {"name": "fp"},
            "model": Model(pretrained=""),
        }
        return self.model_copy(update=changes)

    @property
    def id(self) -> str:
        """Name and every override that changes results: what records and paper/cells.csv call this recipe."""
        return self.name + _suffix(self.overrides)

    @property
    def train_id(self) -> str:
        """As id, without what acts only after training."""
        return self.name + _suffix({k: v for k, v in self.overrides.items() if of_training(k, self.method["name"])})

    @property
    def digest(self) -> str:
        """Fingerprint of every value that can change a result: two recipes with one id may differ in their files.

        Values equal to the schema's default are left out, so that a new key does not make old records strangers.
        """
        values = _flatten(self.model_dump(mode="json", exclude_defaults=True, exclude={"name", "overrides"}))
        told = {k: _printed(v) for k, v in values.items() if k not in neutral(self.data.dataset) | FILES}
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def run_id(self, seed: int) -> str:
        return f"{self.train_id}-s{seed}"


def _suffix(overrides: dict[str, Any]) -> str:
    return "".join(
        sorted(
            f"+{key}={_file(value) if key in FILES | PLACES else _printed(value)}" for key, value in overrides.items()
        )
    )


def _file(path: Any) -> str:
    """A path, short and fit for a file name."""
    return f"{Path(str(path)).stem[:24]}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def _printed(value: Any) -> str:
    """One spelling per value, fit for a file name: 9e-3 and 0.009 are '0.009', 0.0 is '0'."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value)
    short = text.replace("/", "_").replace(" ", "").replace('"', "")
    words = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(word, str) and set(word) & set(' /",[]') for word in words):  # prompts: two may shorten to one
        return f"{short[:24]}~{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return short


def roots() -> list[Path]:
    """Where recipes lie: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    return [root for root in (package.parent / "recipes", package / "recipes") if root.is_dir()]


def names() -> dict[str, Path]:
    """All known recipes and their files."""
    return {path.stem: path for root in roots() for path in sorted(root.rglob("*.toml"))}


def load(name: str, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """The recipe called `name` (or at that path), with `--set` overrides, each 'section.key=TOML value'.

    method: the method to use in place of the recipe's own: the sibling recipe of that method if there is one, else this
        recipe with the method's defaults.
    Raises: BdmError that lists every fault, with its dotted key and the value given.
    """
    known = names()
    if method is not None and sibling(name, method) in known:
        name, method = sibling(name, method), None
    table = _read(name, known)
    given = dict(_parse(text) for text in overrides)
    switched = {}
    if method is not None and method != table.get("method", {}).get("name"):
        table["method"] = _of_method(method, table.get("method", {}))
        switched = {"method.name": method}
    file, table = table, copy.deepcopy(table)
    for key, value in given.items():
        _assign(table, key, value)
    found = _of_pretrained(table)
    table, base = _merge(found, table), _flatten(_merge(found, file))
    free = neutral(base.get("data.dataset"))
    changed = switched | {k: v for k, v in given.items() if k not in free and not (k in base and base[k] == v)}
    return _check({**table, "name": Path(name).stem, "overrides": changed})


def _of_pretrained(table: dict[str, Any]) -> dict[str, Any]:
    """What the pretrained folder of a recipe without a network of its own says; it stands below the recipe's values."""
    model, unet = table.get("model"), table.get("unet", {})
    source = model.get("pretrained") if isinstance(model, dict) else None
    if not isinstance(source, str) or not isinstance(unet, dict) or "name" in unet:
        return {}
    if source and not pretrained.is_folder(source):
        raise BdmError(
            f"model.pretrained: {source} says nothing about its network, and the recipe has no [unet].\n"
            "  give a diffusers folder (bdm import makes one of an original checkpoint), or the network: [unet]"
        )
    found = pretrained.sections(source) if source else {}
    if found and "scheduler" not in found and "scheduler" not in table:
        raise BdmError(
            f"{source} has no scheduler/scheduler_config.json.\n  give the noise schedule in the recipe: [scheduler]"
        )
    return found


def evaluation(overrides: Sequence[str]) -> Evaluate:
    """The [evaluate] section for images of no recipe: ADM's protocol on Inception's features, under `--set` overrides.

    Raises: BdmError that lists every fault.
    """
    table: dict[str, Any] = {"evaluate": {"features": "inception", "n_reference": 0}}
    for key, value in map(_parse, overrides):
        if not key.startswith("evaluate."):
            raise BdmError(f"'{key}' says nothing about images of no recipe.\n  allowed here: evaluate.*")
        _assign(table, key, value)
    try:
        return Evaluate.model_validate_json(json.dumps(table["evaluate"], default=str), strict=True)
    except pydantic.ValidationError as error:
        raise faults("the evaluation", error, Evaluate, "evaluate.") from None


def sibling(name: str, method: str) -> str:
    """The name of the recipe for the same data set and activation bits with another method, by the naming rule."""
    found = re.fullmatch(r"([\w-]+?)-w\d+a(\d+)(-\w+)?", name)
    if not found:
        return f"{name}-{method}"
    dataset, bits = found[1], found[2]
    special = {"fp": f"{dataset}-fp", "binarydm": f"{dataset}-w1a{bits}", "lsq": f"{dataset}-w2a{bits}-lsq"}
    if bits != "1" and method in ("qdiffusion", "efficientdm"):
        return f"{dataset}-w4a{bits}-{method}"
    return special.get(method, f"{dataset}-w1a{bits}-{method}")


def from_json(text: str, where: str = "the text") -> Recipe:
    """The recipe stored in a checkpoint's header or a run directory (`where`). Raises: BdmError if it is none."""
    try:
        return Recipe.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise BdmError(
            f"{where} holds no recipe of this version ({error.error_count()} faults).\n  make it again"
        ) from None


def resolved(spec: Recipe) -> dict[str, Any]:
    """Every key of a recipe with its value, dotted."""
    return {k: v for k, v in _flatten(spec.model_dump(mode="json")).items() if not k.startswith("overrides")}


def of_run(stored: Recipe, overrides: Sequence[str], like: Recipe | None = None, plain: Recipe | None = None) -> Recipe:
    """The recipe of a finished run with other [sample] and [evaluate] values: those of `like`, then `overrides`.

    plain: the recipe's file without overrides, against which the id is told; None = the known recipe of that name.
    Where [sample] was part of the training, what differs from it is told in the id as `drawn.*`.
    Raises: BdmError if an override concerns what was already fixed by the training.
    """
    table = stored.model_dump(mode="json")
    if like is not None:
        now = like.model_dump(mode="json")
        table |= {section: now[section] for section in AFTER_TRAINING}
        for key in PLACES:
            section, _, place = key.partition(".")
            if table[section] is not None and now[section] is not None:
                table[section][place] = now[section][place]
    for text in overrides:
        key, value = _parse(text)
        if key.split(".")[0] not in AFTER_TRAINING and key not in MOVABLE:
            allowed = ", ".join(sorted(MOVABLE))
            raise BdmError(
                f"'{key}' was fixed when the run was trained.\n  allowed here: sample.*, evaluate.*, {allowed}"
            )
        _assign(table, key, value)
    spec = _check({**table, "overrides": {}})
    if plain is None:
        plain = load(stored.name) if stored.name in names() else stored
    kind, fixed, was, now = stored.method["name"], resolved(stored), resolved(plain), resolved(spec)
    told = {k: v for k, v in stored.overrides.items() if of_training(k, kind)}
    for key in (k for k in now if k.split(".")[0] in AFTER_TRAINING and k not in NEUTRAL):
        trained = of_training(key, kind)
        if now[key] != (fixed if trained else was).get(key):
            told[key.replace("sample", DRAWN, 1) if trained else key] = now[key]
    return spec.model_copy(update={"overrides": told})


def difference(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ, with both values; neutral keys are not compared."""
    left, right, free = resolved(a), resolved(b), neutral(a.data.dataset)
    keys = sorted(k for k in left.keys() | right.keys() if k not in free and left.get(k) != right.get(k))
    return [f"{key}: {left.get(key)!r} / {right.get(key)!r}" for key in keys]


def _read(name: str, known: dict[str, Path], children: tuple[str, ...] = ()) -> dict[str, Any]:
    """The TOML table of a recipe merged over its parents. A parent's .toml path is relative to the child's folder."""
    path = Path(name) if name.endswith(".toml") else known.get(name)
    if path is None:
        raise unknown("recipe", name, known, "or give the path of a .toml file")
    if name in children:
        raise BdmError(f"recipe '{name}' extends itself: {' -> '.join((*children, name))}.\n  remove one 'extends'")
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise BdmError(f"cannot read recipe {path} ({error.strerror}).\n  known: {', '.join(sorted(known))}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BdmError(f"recipe {path} is not valid TOML: {error}") from None
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise BdmError(f"recipe {path}: extends is {parent!r}.\n  give a recipe's name or the path of a .toml file")
    if parent.endswith(".toml"):
        parent = str(path.parent / parent)
    return _merge(_read(parent, known, (*children, name)), table)


def _merge(parent: dict, child: dict) -> dict:
    """child over parent, table by table. A `[method]` of another name keeps only the parent's shared keys."""
    merged = dict(parent)
    for key, value in child.items():
        if key == "method" and isinstance(value, dict) and value.get("name") not in (None, _method_name(parent)):
            merged[key] = _of_method(value["name"], parent.get("method", {})) | value
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _method_name(table: dict) -> str | None:
    return table.get("method", {}).get("name")


def _of_method(name: str, other: dict) -> dict:
    """The `[method]` table of `name` with what it shares with another method's (full precision shares nothing)."""
    return {"name": name} | {k: v for k, v in other.items() if k in SHARED_METHOD_KEYS and name != "fp"}


def _parse(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise BdmError(f"cannot read --set '{text}'.\n  give section.key=value, e.g. --set train.lr=1e-4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()  # a bare word is a string


def _assign(table: dict, dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if dotted.split(".")[0] in ("name", "overrides"):
        raise BdmError(f"'{dotted}' cannot be set: it is what the recipe is called.\n  give section.key=value")
    for section in sections:
        inner = table.get(section)
        table[section] = dict(inner) if isinstance(inner, dict) else {}
        table = table[section]
    table[key] = value


def _flatten(table: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check(table: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate_json(json.dumps(table, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise faults(f"recipe '{table['name']}'", error, Recipe) from None


def faults(what: str, error: pydantic.ValidationError, model: type, prefix: str = "") -> BdmError:
    """One message for all faults of a closed table: each dotted key, the value given, and what is allowed."""
    lines = []
    for fault in error.errors():
        key = prefix + ".".join(str(part) for part in fault["loc"])
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _known_keys(model, [str(part) for part in fault["loc"][:-1]])
            hint = nearest(str(fault["loc"][-1]), known)
            lines.append(f"  {key}: unknown key (given {fault['input']!r}).{hint} known: {', '.join(known)}")
        elif fault["type"] == "missing":
            lines.append(f"  {key}: is missing")
        elif fault["type"] == "value_error":  # our own validators say what was given
            lines.append("  " + ": ".join(part for part in (key, str(fault["ctx"]["error"])) if part))
        else:
            lines.append(f"  {key}: {fault['msg'][:1].lower()}{fault['msg'][1:]} (given {fault['input']!r})")
    count = f"{len(lines)} faults" if len(lines) > 1 else "a fault"
    return BdmError("\n".join([f"{what} has {count}:", *lines]))


def _known_keys(model: type, path: list[str]) -> list[str]:
    """Field names of the section at `path` below a pydantic model or dataclass."""
    for part in path:
        hint = model.model_fields[part].annotation
        model = next((a for a in getattr(hint, "__args__", ()) if isinstance(a, type) and a is not type(None)), hint)
    fields = getattr(model, "model_fields", None) or getattr(model, "__pydantic_fields__", {})
    return sorted(name for name in fields if name != "overrides")
