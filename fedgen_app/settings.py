"""The settings of a run, typed and checked; the only reader of ``context.run_config``.

A run config is flat: dotted, kebab-case keys with plain values (``{"lora.rank": 8}``). All default values stand in
``pyproject.toml``, so a run config is always complete when it arrives here. Importing this module loads neither torch
nor Flower, so that a mistake is reported at once.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from fedgen_app.errors import SettingsError

Value = bool | int | float | str
RunConfig = Mapping[str, Value]

PACKAGE = Path(__file__).parent
PATH_KEYS = (
    *("output-dir", "resume-from", "backbone", "dataset", "lora.init", "metrics.features"),
    *("clusters.encoder", "clusters.key"),
)
ALWAYS_PATHS = ("output-dir", "resume-from", "clusters.key")
# Names that are no paths, even where a folder has them.
NAMED = ("bundled", "bundled:styles", "backbone")
FEATURES = ("auto", "bundled", "inception")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?")
PLUGIN_NAME = re.compile(r"[a-z][a-z0-9-]*")


def _split(separator: str) -> BeforeValidator:
    def split(value: object) -> object:
        return tuple(v.strip() for v in value.split(separator) if v.strip()) if isinstance(value, str) else value

    return BeforeValidator(split)


Names = Annotated[tuple[str, ...], _split(",")]
Prompts = Annotated[tuple[str, ...], _split("|")]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


Rank = Annotated[int, Field(ge=1, le=1024)]
Ranks = Annotated[tuple[Rank, ...], _split(",")]


def _zero_or_eight(value: int) -> int:
    if 0 < value < 8:
        raise PydanticCustomError("resolution", "should be 0, the backbone's own, or at least 8")
    return value


def known_bits(value: int) -> int:
    """Bits that a frozen weight can be held in; 0: as the type says."""
    if value not in (0, 4, 8):
        raise PydanticCustomError("bits", "should be 0, 4 or 8")
    return value


class Group(BaseModel):
    """Settings that share the first part of their dotted name."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """In Python True is 1: without this, ``lora.rank = true`` would be a rank of 1."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted in (int, float):
            raise PydanticCustomError("number", "should be a number")
        return value


class LoraSettings(Group):
    """``lora.*``: the adapter, as PEFT's LoraConfig names it."""

    rank: Rank
    ranks: Ranks
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Names
    rslora: bool
    init: str
    convolutions: bool
    text_encoder: bool

    @field_validator("ranks")
    @classmethod
    def _largest_first_settled(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if value and max(value) > info.data.get("rank", max(value)):
            raise PydanticCustomError("ranks", "should hold no rank above lora.rank")
        return value

    @property
    def scaling(self) -> float:
        """The factor s in W + s B A: alpha / r, with rsLoRA alpha / sqrt(r)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class PartitionSettings(Group):
    """``partition.*``: who owns which examples in a simulation."""

    by: Literal["auto", "iid", "label", "topic", "single-label"]
    alpha: Positive
    min_examples: AtLeastOne
    max_examples: AtLeastZero


class PersonalSettings(Group):
    """``personal.*``: the fine-tuning after the last round whose result never leaves the client."""

    epochs: AtLeastZero
    max_steps: AtLeastZero
    learning_rate: Positive
    proximal: NotNegative


class RoundSettings(Group):
    """``round.*``: how long the server waits, in seconds, and for which fraction of the chosen clients."""

    quorum: Fraction
    grace: NotNegative
    deadline: Positive
    roll_call: Positive


class AdmissionSettings(Group):
    """``admission.*``: what a reply may be; 0 switches a limit off."""

    max_update_norm: NotNegative
    norm_action: Literal["refuse", "clip"]
    max_weight: NotNegative


class AggregationSettings(Group):
    """``aggregation.*``: what stands beside a method's rule."""

    robust: Literal[
        "none", "norm-bound", "krum", "multi-krum", "geometric-median", "factor-median", "factor-trimmed-mean"
    ]
    attackers: Annotated[float, Field(gt=0, lt=0.5)]
    norm_bound: Positive
    layer_wise: bool
    residual_rank: Annotated[int, Field(ge=1, le=4096)]


class FedProxSettings(Group):
    """``fedprox.*``."""

    mu: Positive


class FedPerSettings(Group):
    """``fedper.*``."""

    personal_blocks: AtLeastOne


class DittoSettings(Group):
    """``ditto.*``."""

    mu: NotNegative


class ApflSettings(Group):
    """``apfl.*``."""

    mix: Annotated[float, Field(ge=0, le=1)]
    mix_learning_rate: NotNegative


class HetLoraSettings(Group):
    """``hetlora.*``."""

    gamma: Fraction
    penalty: NotNegative


class FedRotSettings(Group):
    """``fedrot.*``."""

    strength: Annotated[float, Field(ge=0, le=1)]


class FedAvgMSettings(Group):
    """``fedavgm.*``."""

    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]


class FedOptSettings(Group):
    """``fedopt.*``: of fedadam and fedyogi."""

    learning_rate: Positive
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    tau: Positive


class ClusterSettings(Group):
    """``clusters.*``: several adapters over one backbone, each for clients with like tasks."""

    by: Literal["none", "prompts", "updates", "adapters", "loss", "oracle"]
    choose: Literal["count", "threshold", "silhouette"]
    count: AtLeastOne
    threshold: Annotated[float, Field(gt=0, le=2)]
    warmup: AtLeastOne
    loss_examples: AtLeastZero
    every: AtLeastZero
    interact_every: AtLeastZero
    strength: Annotated[float, Field(ge=0, le=1)]
    temperature: Positive
    encoder: Annotated[str, Field(min_length=1)]
    key: str
    noise: NotNegative
    delta: Annotated[float, Field(gt=0, lt=1)]


class WireSettings(Group):
    """``wire.*``: how numbers travel."""

    codec: Literal["fp32", "fp16"]


class SampleSettings(Group):
    """``samples.*``: what a run generates to be looked at, and how it generates."""

    count: AtLeastZero
    per_prompt: AtLeastOne
    every: AtLeastZero
    prompts: Prompts
    length: AtLeastOne
    sampler: Literal["ddim", "dpm-solver"]
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance: NotNegative
    batch: AtLeastOne


class DiffusionSettings(Group):
    """``diffusion.*``: how an image generator learns."""

    caption: str
    caption_dropout: Annotated[float, Field(ge=0, lt=1)]
    min_snr: NotNegative

    @field_validator("caption")
    @classmethod
    def _holds_a_place(cls, value: str) -> str:
        if value.count("{}") != 1 or value.replace("{}", "").count("{") or value.replace("{}", "").count("}"):
            raise PydanticCustomError("caption", "should hold {} once, for the label")
        return value


class GanSettings(Group):
    """``gan.*``: how a generator and a discriminator learn."""

    r1: NotNegative


class MetricSettings(Group):
    """``metrics.*``: how generated images are measured."""

    samples: AtLeastZero
    personal_samples: AtLeastZero
    features: Annotated[str, Field(min_length=1)]
    classes: Names

    @field_validator("classes")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise PydanticCustomError("classes", "should name each class once")
        return value


class Settings(Group):
    """Everything that a run depends on."""

    task: str
    method: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    output_dir: str
    resume_from: str
    resume_round: AtLeastZero
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: Literal["auto", "cpu", "cuda"]
    threads: AtLeastZero
    backbone_bits: Annotated[int, AfterValidator(known_bits)]
    backbone: Annotated[str, Field(min_length=1)]
    backbone_revision: str
    dataset: str
    text_column: Annotated[str, Field(min_length=1)]
    label_column: str
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)]
    test_sequences: AtLeastZero
    num_server_rounds: AtLeastOne
    fraction_train: Fraction
    selection: Literal["uniform", "examples"]
    expected_clients: AtLeastZero
    evaluate_every: AtLeastZero
    keep_checkpoints: AtLeastOne
    local_epochs: AtLeastOne
    max_steps: AtLeastZero
    batch_size: AtLeastOne
    accumulate: AtLeastOne
    learning_rate: Positive
    weight_decay: NotNegative
    clip_norm: NotNegative
    warmup_rounds: AtLeastZero
    sequence_length: Annotated[int, Field(ge=8)]
    resolution: Annotated[int, Field(ge=0), AfterValidator(_zero_or_eight)]
    gradient_checkpointing: bool
    lora: LoraSettings
    partition: PartitionSettings
    personal: PersonalSettings
    round: RoundSettings
    admission: AdmissionSettings
    wire: WireSettings
    samples: SampleSettings
    diffusion: DiffusionSettings
    gan: GanSettings
    metrics: MetricSettings
    aggregation: AggregationSettings
    clusters: ClusterSettings
    fedprox: FedProxSettings
    fedper: FedPerSettings
    ditto: DittoSettings
    apfl: ApflSettings
    hetlora: HetLoraSettings
    fedrot: FedRotSettings
    fedavgm: FedAvgMSettings
    fedopt: FedOptSettings

    @classmethod
    def from_run_config(cls, run_config: RunConfig) -> Settings:
        """Check all values at once.

        Raises:
            SettingsError: names every wrong key with its value and what is allowed.
        """
        mistakes = list(_unknown(run_config)) + list(_unknown_plugins(run_config))
        known = {key: value for key, value in run_config.items() if key in KEYS}
        try:
            settings = cls.model_validate(_nested(known))
        except ValidationError as error:
            mistakes += [_explain(e["loc"], e["input"], e["msg"], run_config) for e in error.errors()]
        if mistakes:
            raise SettingsError("\n".join(mistakes))
        return settings

    def sampling(self, **changes: object) -> Settings:
        """The same settings with some of ``samples`` changed; the values are not checked anew."""
        return self.model_copy(update={"samples": self.samples.model_copy(update=changes)})

    def flat(self) -> dict[str, Value]:
        """The run config that these settings came from (lists joined again)."""
        return dict(_flatten(self.model_dump(by_alias=True)))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + name.replace("_", "-")
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            yield from _keys(field.annotation, key + ".")
        else:
            yield key


KEYS = frozenset(_keys(Settings))


def _nested(flat: RunConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {name: {} for name in {k.split(".")[0] for k in KEYS if "." in k}}
    for key, value in flat.items():
        group, _, leaf = key.rpartition(".")
        (tree[group] if group else tree)[leaf] = value
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, tuple):
            yield prefix + key, ("|" if key == "prompts" else ",").join(map(str, value))
        else:
            yield prefix + key, value


def _explain(location: tuple[int | str, ...], value: object, message: str, run_config: RunConfig) -> str:
    key = ".".join(part for part in location if isinstance(part, str))  # less the place in a list
    if key not in run_config:
        return f"{key} is missing"
    value = run_config[key]
    return f"{key} = {value!r}: {message.replace('Input should', 'should')}"


def _unknown(run_config: RunConfig) -> Iterator[str]:
    for key in sorted(set(run_config) - KEYS):
        near = difflib.get_close_matches(key, KEYS, n=1)
        yield f"{key} = {run_config[key]!r}: no such setting" + (f"; did you mean {near[0]}?" if near else "")


def plugins(kind: Literal["tasks", "methods"]) -> list[str]:
    """Names of the tasks or methods there are: a setting's value is the name of its file."""
    files = (PACKAGE / kind).glob("*.py")
    return sorted(f.stem.replace("_", "-") for f in files if not f.stem.startswith("_"))


def _unknown_plugins(run_config: RunConfig) -> Iterator[str]:
    kinds: tuple[tuple[str, Literal["tasks", "methods"]], ...] = (("task", "tasks"), ("method", "methods"))
    for key, kind in kinds:
        value = run_config.get(key)
        if value is not None and not (
            isinstance(value, str) and PLUGIN_NAME.fullmatch(value) and value in plugins(kind)
        ):
            yield f"{key} = {value!r}: should be one of {', '.join(plugins(kind))}"


def looks_like_path(value: str) -> bool:
    """Whether a backbone or data set is meant as a path, not as a hub id."""
    if value in NAMED:  # also where a folder has this name: ./bundled is that one
        return False
    if value.startswith((".", "/", "~")) or "\\" in value:
        return True
    try:
        return Path(value).exists()
    except OSError:  # longer than a path can be
        return False


def _expanded(value: str) -> Path:
    """The path with ~ as the home folder; as it is where there is no such user, to be reported as missing."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


def shown_source(value: str) -> str:
    """A backbone's or data set's name without the folders above it."""
    return Path(value).name if value != "bundled" and looks_like_path(value) else value


def absolute(run_config: RunConfig) -> dict[str, Value]:
    """The same run config with every path seen from the current folder made absolute.

    Needed once, where the user typed the command: the apps may run in another folder.
    """
    result = dict(run_config)
    for key in PATH_KEYS:
        value = result.get(key)
        if isinstance(value, str) and value and (key in ALWAYS_PATHS or looks_like_path(value)):
            result[key] = str(_expanded(value).resolve())
    return result


def _wrong_paths(run_config: RunConfig) -> Iterator[str]:
    """What the run config points at on this machine and is not there."""
    for key in ("backbone", "dataset", "lora.init", "clusters.encoder"):
        value = run_config.get(key, "")
        if not isinstance(value, str) or value in ("", *NAMED):
            continue
        folder = _expanded(value)
        if key == "lora.init" and folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
            yield f"lora.init = {value!r}: no adapter_model.safetensors in it"
        elif (key == "lora.init" or looks_like_path(value)) and not folder.exists():
            yield f"{key} = {value!r}: no such file or folder"
        elif not looks_like_path(value) and not HUB_ID.fullmatch(value):
            yield f"{key} = {value!r}: neither a path nor a hub id such as owner/name"
    weights = run_config.get("metrics.features", "auto")
    if isinstance(weights, str) and weights not in FEATURES and not _expanded(weights).is_file():
        yield f"metrics.features = {weights!r}: should be {', '.join(FEATURES)} or a file of Inception's weights"
    secret = run_config.get("clusters.key", "")
    if isinstance(secret, str) and secret and not _expanded(secret).is_file():
        yield f"clusters.key = {secret!r}: no such file"
    resumed = run_config.get("resume-from", "")
    if isinstance(resumed, str) and resumed and not Path(resumed).is_dir():
        yield f"resume-from = {resumed!r}: no such run folder"


def check(run_config: RunConfig) -> Settings:
    """The settings, after everything about them was checked, what they point at on this machine too.

    Raises:
        SettingsError: names every mistake at once.
    """
    mistakes = list(_wrong_paths(run_config))
    try:
        settings = Settings.from_run_config(run_config)
    except SettingsError as error:
        raise SettingsError("\n".join([str(error), *mistakes])) from None
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return settings


def flatten_toml(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Dotted keys of a nested TOML table.

    Raises:
        SettingsError: for a value that a run config cannot hold (a list, a date).
    """
    flat: dict[str, Value] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_toml(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
        else:
            raise SettingsError(f"{prefix}{key} = {value!r}: should be a number, a text, true or false")
    return flat


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as nested tables.

    Raises:
        SettingsError: names the file that is missing or not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None


def defaults(app_dir: Path) -> dict[str, Value]:
    """Every default value, from the app's ``pyproject.toml``.

    Raises:
        SettingsError: the folder holds no Flower app.
    """
    try:
        table = read_toml(app_dir / "pyproject.toml")["tool"]["flwr"]["app"]["config"]
    except (KeyError, TypeError):
        raise SettingsError(f"{app_dir}: its pyproject.toml has no [tool.flwr.app.config]") from None
    return flatten_toml(table)


def own_defaults() -> dict[str, Value]:
    """The defaults of this package itself, for a device, which has no app: in a checkout above it, installed in it."""
    return defaults(next(folder for folder in (PACKAGE.parent, PACKAGE) if (folder / "pyproject.toml").is_file()))
