"""The settings of a run: every parameter of `notebooks/train.ipynb`, resolved and checked before a model is loaded."""

import ast
import difflib
import importlib.util
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator

from lib.environment import count_gpus
from lib.files import DATA_FILES, LONGEST_NAME, PROJECT_ROOT, UserError, absolute, shorten_path
from lib.model_files import check_model

MATH_DATA_DIR = Path("/data/a5-alignment/MATH")  # where the course's machines keep it


@dataclass(frozen=True)
class Optimization:
    """What a training step depends on."""

    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    gradient_clip: float
    microbatch_tokens: int
    precision: str
    train_device: str


LEAST_TEMPERATURE = 0.01  # vLLM would take a lower one for this


def model_path(model: str) -> str:
    """The whole path where `model` names a folder; a hub id as it is."""
    names_a_folder = model.startswith((".", "/", "~")) or absolute(model).is_dir()
    return str(absolute(model)) if names_a_folder else model


def _plain_name(name: str) -> str:
    if not name or Path(name).name != name or name == ".." or "\0" in name:
        raise ValueError("must be a plain folder name")
    if len(name.encode()) > LONGEST_NAME - 30:  # a notebook's name is made of it, too
        raise ValueError("is too long for a folder name")
    return name


def _as_given(number: float, check):
    """An integer serves as a float and stays one: 5 epochs are written as 5."""
    check(number)
    return number


def parameter(default, meaning: str):
    """A field of `RunConfig`: the default and the comment of its line in the notebook's parameters cell."""
    return Field(default, description=meaning)


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
SEEDS = 1 << 32  # vLLM takes no larger ones
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Positive = Annotated[float, Field(gt=0), WrapValidator(_as_given)]
NotNegative = Annotated[float, Field(ge=0), WrapValidator(_as_given)]
Share = Annotated[float, Field(gt=0, le=1), WrapValidator(_as_given)]
FolderPath = Annotated[str, Field(min_length=1), AfterValidator(lambda text: str(absolute(text)))]
Model = Annotated[str, AfterValidator(model_path)]


class RunConfig(BaseModel):
    """All settings of one run. A default of None that the type doesn't allow is one that `resolve` replaces."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="forbid")

    n: Count | Literal["all"] = parameter(256, 'distinct training examples: an integer, or "all"')
    filtered: bool = parameter(False, "draw only from examples whose response is graded correct")
    profile: Literal["auto", "math", "mini"] = parameter(
        "auto", '"math", "mini", or "auto": math where an NVIDIA GPU and the course\'s data are there'
    )
    model: Model = parameter(None, "hub id or folder of a causal language model (safetensors)")
    revision: str | None = parameter(None, "branch, tag or commit of a hub model; None: the newest")
    data_dir: FolderPath = parameter(None, "folder with sft.jsonl, train.jsonl, validation.jsonl")
    prompt_template: FolderPath | None = parameter(None, "file with {question}; None: the one of lib/prompts that fits")
    trust_remote_code: bool = parameter(False, "allow a model's own Python code to run")
    seed: Seed = parameter(0, "subset, order of examples, sampling")

    learning_rate: Positive = parameter(None, "peak of AdamW's learning rate")
    batch_size: Count = parameter(None, "examples an optimizer step")
    microbatch_tokens: Count = parameter(None, "tokens a forward pass, at most; changes memory and speed, not results")
    epochs: Positive = parameter(None, "passes over the training set; fractions are fine")
    max_steps: Count | None = parameter(None, "stop after so many optimizer steps; None: no limit")
    warmup_ratio: Annotated[NotNegative, Field(le=1)] = parameter(
        0.03, "share of the steps with a rising learning rate, before cosine decay to 0"
    )
    weight_decay: NotNegative = parameter(0.0, "AdamW's decoupled weight decay")
    gradient_clip: Positive = parameter(1.0, "largest norm of the gradient")
    max_length: Count = parameter(None, "tokens of prompt and response; longer examples are an error")
    precision: Literal["bf16", "fp32"] = parameter("bf16", '"bf16": autocast over fp32 weights; "fp32": nothing else')
    optimizer: Literal["adamw", "adamw8bit"] | None = parameter(
        None, '"adamw", or "adamw8bit" with moments of 8 bits; None: as the card\'s memory allows'
    )
    recompute: bool | None = parameter(
        None, "compute activations again for the gradient; None: where the card can't hold them"
    )

    eval_split: Literal["validation", "tuning"] = parameter(
        "validation", '"validation", or "tuning": problems of train.jsonl that no trace is about'
    )
    exclude_contaminated: bool = parameter(False, "leave out problems that have a near duplicate among the traces")
    n_val: Count = parameter(None, "problems evaluated while training, stratified by subject and level")
    n_val_final: Count | None = parameter(None, "problems evaluated at the start and the end; None: all")
    eval_interval: Count | None = parameter(
        None, "optimizer steps between evaluations; None: 5, 10, 20, 40, 70, 100 % of a run"
    )
    samples_per_problem: Count = parameter(1, "sampled responses a problem at the start and the end")
    temperature: NotNegative = parameter(1.0, "of sampling")
    top_p: Share = parameter(1.0, "of sampling")
    max_new_tokens: Count = parameter(None, "longest response")
    greedy: Literal["never", "final", "always"] = parameter(
        "final", 'also decode greedily: "never", "final" (start and end), "always"'
    )
    eval_beside_training: bool = parameter(None, "go on training while the engine answers; None: if it has its own GPU")
    log_generations: CountOrZero = parameter(6, "responses kept with token entropy, and shown below")
    keep_responses: CountOrZero | None = parameter(None, "problems whose responses' text is written; None: all")
    verify_sync: Literal["first", "always"] = parameter(
        "always", 'prove that the engine holds the policy\'s weights: "first" sync only, or "always"'
    )

    train_device: str = parameter(None, '"cuda:0", "cpu"; None: the first GPU, or the CPU')
    eval_device: str = parameter(None, '"cuda:1", ...; None: the second GPU, or the training device')
    gpu_memory_utilization: Share | None = parameter(None, "share of the engine's GPU; None: planned beside the policy")
    engines: Count | None = parameter(None, "vLLM engines there; None: 3 if they have the GPU alone and cores, else 1")
    engine_timeout: Positive = parameter(600, "seconds without a finished response until the engine counts as hung")

    runs_dir: FolderPath = parameter(None, "where the run's folder goes; None: runs/ of the project")
    run_name: Annotated[str, AfterValidator(_plain_name)] = parameter(
        None, "folder name; None: n256, full, filtered, with -seed1 and so on"
    )
    overwrite: bool = parameter(False, "replace a finished run of this name")
    resume: bool = parameter(True, "go on with a stopped run of this name from its last checkpoint")
    checkpoint_interval: CountOrZero | None = parameter(
        None, "steps between checkpoints, 0: none; None: every 10 min and at evaluations, if cheap"
    )
    keep_checkpoint: bool = parameter(False, "keep the last checkpoint of a finished run")
    keep_model: bool = parameter(False, "save the trained model in the run's folder")
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = parameter(
        "auto", '"online", "offline", "disabled"; "auto": as WANDB_MODE says, else online if logged in'
    )
    wandb_project: str = parameter("sft-math", "wandb project")

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_name

    @property
    def optimization(self) -> Optimization:
        return Optimization(**{field.name: getattr(self, field.name) for field in fields(Optimization)})

    def to_dict(self) -> dict:
        """Settings as JSON-ready values; paths inside the project are written relative to its root."""
        return {name: shorten_path(v) if isinstance(v, str) else v for name, v in self.model_dump().items()}


PARAMETERS = tuple(RunConfig.model_fields)
# Where and how a run is made, not what it is: its numbers do not depend on these.
INCIDENTAL = {
    *("runs_dir", "run_name", "overwrite", "resume", "checkpoint_interval", "keep_checkpoint", "keep_model"),
    *("microbatch_tokens", "recompute", "trust_remote_code", "log_generations", "verify_sync"),
    "keep_responses",
    *("wandb_mode", "wandb_project", "train_device", "eval_device", "gpu_memory_utilization", "engines"),
    *("engine_timeout", "eval_beside_training"),
}


def changed_settings(made: Mapping, asked: Mapping) -> list[str]:
    """In words, the settings of something `made` earlier that its numbers depend on and that are `asked` otherwise."""
    return [
        f"{name} is {value!r} there, {asked[name]!r} is asked for"
        for name, value in made.items()
        if name in asked and name not in INCIDENTAL and asked[name] != value
    ]


# The one place where a profile matters: what `None` in the parameters cell stands for, with "math" and with "mini".
_PROFILE_VALUES = [
    ("model", "Qwen/Qwen2.5-Math-1.5B", str(PROJECT_ROOT / "lib/mini/model")),
    ("data_dir", str(MATH_DATA_DIR), str(PROJECT_ROOT / "lib/mini/data")),
    ("learning_rate", 4e-5, 1e-3),
    ("batch_size", 64, 8),
    ("microbatch_tokens", 16384, 4096),
    ("epochs", 5, 3),
    ("max_length", 2048, 512),
    ("n_val", 1000, 250),
    ("max_new_tokens", 1024, 128),
]
PROFILES = {
    "math": {name: value for name, value, _ in _PROFILE_VALUES},
    "mini": {name: value for name, _, value in _PROFILE_VALUES},
}


def resolve(namespace: Mapping) -> RunConfig:
    """Turn the notebook's parameters (`resolve(globals())`) into a checked `RunConfig`.

    `None` takes the profile's value. Raises `UserError` naming the parameter; writes nothing and loads no model.
    """
    refuse_unknown_parameters(namespace, PARAMETERS)
    values = {name: namespace.get(name, field.default) for name, field in RunConfig.model_fields.items()}
    _choose_profile(values)
    if values["runs_dir"] is None:
        values["runs_dir"] = str(PROJECT_ROOT / "runs")
    if values["run_name"] is None:
        values["run_name"] = default_run_name(values["n"], values["filtered"], values["seed"])
    _choose_devices(values)
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        raise UserError(_in_words(error)) from None
    if config.n_val_final is not None and config.n_val_final < config.n_val:
        raise UserError(f"n_val_final={config.n_val_final}: must not be less than n_val={config.n_val}")
    if 0 < config.temperature < LEAST_TEMPERATURE:
        raise UserError(f"temperature={config.temperature}: must be 0, or at least {LEAST_TEMPERATURE} (vLLM)")
    if config.temperature == 0 and config.samples_per_problem > 1:
        raise UserError(
            f"samples_per_problem={config.samples_per_problem}: at temperature=0 all samples of a problem are the same"
        )
    for name in ("sft.jsonl", "validation.jsonl"):
        if not Path(config.data_dir, name).is_file():
            folder = shorten_path(config.data_dir)
            raise UserError(f"data_dir={folder!r}: no {name} there (the folder should hold {', '.join(DATA_FILES)})")
    if config.revision is not None and Path(config.model).is_absolute():
        raise UserError(f"revision={config.revision!r}: only a hub model has revisions, and model is a folder")
    check_model(config.model, config.revision, config.trust_remote_code)
    if importlib.util.find_spec("vllm") is None:
        raise UserError("eval_device: vLLM is not installed in this environment; `make run` sets it up (see README)")
    check_run_dir(config)
    return config


WORDS = {
    "Input should be": "must be",
    "greater than or equal to": "at least",
    "greater than": "above",
    "less than or equal to": "at most",
    "less than": "below",
    "a valid ": "a ",
    "a integer": "an integer",
    "Value error, ": "",
    " or must be ": " or ",
}


def _in_words(error: ValidationError) -> str:
    """The first wrong parameter and what it must be: `learning_rate=-1: must be above 0`."""
    found = error.errors(include_url=False)
    name = found[0]["loc"][0]
    # A parameter of two types, an integer or "all", has a reason for each.
    reason = " or ".join(one["msg"] for one in found if one["loc"][0] == name)
    for words, ours in WORDS.items():
        reason = reason.replace(words, ours)
    return f"{name}={found[0]['input']!r}: {reason}"


def default_run_name(n: int | str, filtered: bool, seed: int) -> str:
    name = "filtered" if filtered else "full" if n == "all" else f"n{n}"
    if filtered and n != "all":
        name += f"-n{n}"
    return name if seed == 0 else f"{name}-seed{seed}"


def refuse_unknown_parameters(namespace: Mapping, known: Collection[str], fixed: Collection[str] = ()) -> None:
    """UserError for a name that a notebook (`globals()`) does not know, or that it sets itself (`fixed`): papermill,
    which injects a cell, only warns."""
    injected = [source for source in namespace.get("In", []) if source.startswith("# Parameters")]
    nodes = itertools.chain.from_iterable(ast.walk(ast.parse(source)) for source in injected)
    for name in (node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
        if name in fixed:
            raise UserError(f"{name}: not a parameter here, since this notebook sets it itself")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise UserError(f"unknown parameter {name!r}{hint}")


def _choose_profile(values: dict) -> None:
    if values["profile"] == "auto":
        folder = absolute(str(values["data_dir"] or MATH_DATA_DIR))
        has_data = all((folder / name).is_file() for name in DATA_FILES)
        values["profile"] = "math" if has_data and count_gpus() > 0 else "mini"
    for name, default in PROFILES.get(str(values["profile"]), {}).items():
        values[name] = default if values[name] is None else values[name]


def _choose_devices(values: dict) -> None:
    gpus = count_gpus()
    train, evaluate = values["train_device"], values["eval_device"]
    train, evaluate = ("cuda:0" if device == "cuda" else device for device in (train, evaluate))
    if train is None:
        train = "cuda:0" if gpus else "cpu"
    if evaluate is None:
        evaluate = train if gpus < 2 or train == "cpu" else "cuda:1" if train == "cuda:0" else "cuda:0"
    for name, device in (("train_device", train), ("eval_device", evaluate)):
        if not re.fullmatch(r"cpu|cuda:[0-9]+", str(device)):
            raise UserError(f"{name}={device!r}: must be 'cpu', 'cuda:0', 'cuda:1', ...")
        if device != "cpu" and int(device.removeprefix("cuda:")) >= gpus:
            raise UserError(f"{name}={device!r}: this machine has {gpus} NVIDIA GPU(s) that PyTorch can use")
    if (train == "cpu") != (evaluate == "cpu"):
        raise UserError(f"train_device={train!r} and eval_device={evaluate!r}: both on the CPU, or both on GPUs")
    values["train_device"], values["eval_device"] = train, evaluate
    if values["eval_beside_training"] is None:
        values["eval_beside_training"] = values["train_device"] != values["eval_device"]


def check_run_dir(config: RunConfig) -> None:
    if (config.run_dir / "summary.json").exists() and not config.overwrite:
        raise UserError(
            f"run_name={config.run_name!r}: {shorten_path(str(config.run_dir))} holds a finished run; "
            "choose another run_name, or overwrite=True to replace it"
        )
