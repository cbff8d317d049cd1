"""The settings of a run: every parameter of `notebooks/train.ipynb`, resolved and checked before a model is loaded."""

import ast
import difflib
import importlib.util
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lib.environment import count_gpus
from lib.files import PROJECT_ROOT, UserError, absolute, shorten_path

DATA_FILES = ("sft.jsonl", "train.jsonl", "validation.jsonl")
MATH_DATA_DIR = Path("/data/a5-alignment/MATH")  # where the course's machines keep it


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run, none of them left open. The notebook's parameters cell explains each."""

    n: int | str
    filtered: bool
    profile: str
    model: str
    data_dir: str
    prompt_template: str | None
    trust_remote_code: bool
    seed: int
    learning_rate: float
    batch_size: int
    microbatch_tokens: int
    epochs: float
    max_steps: int | None
    warmup_ratio: float
    weight_decay: float
    gradient_clip: float
    max_length: int
    precision: str
    eval_split: str
    n_val: int
    n_val_final: int | None
    eval_interval: int | None
    temperature: float
    top_p: float
    max_new_tokens: int
    greedy: str
    eval_beside_training: bool
    log_generations: int
    verify_sync: str
    train_device: str
    eval_device: str
    gpu_memory_utilization: float
    engine_timeout: float
    runs_dir: str
    run_name: str
    overwrite: bool
    resume: bool
    checkpoint_interval: int | None
    keep_checkpoint: bool
    keep_model: bool
    wandb_mode: str
    wandb_project: str

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_name

    def to_dict(self) -> dict:
        """Settings as JSON-ready values; paths inside the project are written relative to its root."""
        return {k: shorten_path(v) if isinstance(v, str) else v for k, v in asdict(self).items()}


PARAMETERS = tuple(field.name for field in fields(RunConfig))
# Where and how a run is made, not what it is: its numbers do not depend on these.
INCIDENTAL = {
    *("runs_dir", "run_name", "overwrite", "resume", "checkpoint_interval", "keep_checkpoint", "keep_model"),
    *("microbatch_tokens", "trust_remote_code", "log_generations", "verify_sync", "wandb_mode", "wandb_project"),
    *("train_device", "eval_device", "gpu_memory_utilization", "engine_timeout", "eval_beside_training"),
}


def changed_settings(made: Mapping, asked: Mapping) -> list[str]:
    """In words, the settings of something `made` earlier that its numbers depend on and that are `asked` otherwise."""
    return [
        f"{name} is {value!r} there, {asked[name]!r} is asked for"
        for name, value in made.items()
        if name in asked and name not in INCIDENTAL and asked[name] != value
    ]


# The one place where a profile matters: what `None` in the parameters cell stands for.
PROFILES = {
    "math": {
        "model": "Qwen/Qwen2.5-Math-1.5B",
        "data_dir": str(MATH_DATA_DIR),
        "learning_rate": 4e-5,
        "batch_size": 64,
        "microbatch_tokens": 16384,
        "epochs": 5,
        "max_length": 2048,
        "n_val": 1000,
        "max_new_tokens": 1024,
    },
    "mini": {
        "model": str(PROJECT_ROOT / "lib/mini/model"),
        "data_dir": str(PROJECT_ROOT / "lib/mini/data"),
        "learning_rate": 1e-3,
        "batch_size": 8,
        "microbatch_tokens": 4096,
        "epochs": 3,
        "max_length": 512,
        "n_val": 250,
        "max_new_tokens": 128,
    },
}


def resolve(namespace: Mapping) -> RunConfig:
    """Turn the notebook's parameters (`resolve(globals())`) into a checked `RunConfig`.

    `None` takes the profile's value. Raises `UserError` naming the parameter; writes nothing and loads no model.
    """
    refuse_unknown_parameters(namespace, PARAMETERS)
    missing = [name for name in PARAMETERS if name not in namespace]
    if missing:
        raise UserError(f"parameters missing from the notebook's parameters cell: {', '.join(missing)}")
    values = {name: namespace[name] for name in PARAMETERS}
    _choose_profile(values)
    for name, default in PROFILES[values["profile"]].items():
        if values[name] is None:
            values[name] = default
    _check_values(values)
    values["data_dir"] = str(absolute(values["data_dir"]))
    values["runs_dir"] = str(absolute(values["runs_dir"] or PROJECT_ROOT / "runs"))
    if _looks_like_folder(values["model"]):
        values["model"] = str(absolute(values["model"]))
    values["run_name"] = values["run_name"] or default_run_name(values["n"], values["filtered"], values["seed"])
    _choose_devices(values)
    config = RunConfig(**values)
    _check_data_dir(config)
    _check_model(config)
    check_run_dir(config)
    return config


def default_run_name(n: int | str, filtered: bool, seed: int) -> str:
    """`n256`, `full` or `filtered`, with `-seed1` and so on for seeds other than 0."""
    name = "filtered" if filtered else "full" if n == "all" else f"n{n}"
    if filtered and n != "all":
        name += f"-n{n}"
    return name if seed == 0 else f"{name}-seed{seed}"


def refuse_unknown_parameters(namespace: Mapping, known: Collection[str]) -> None:
    """UserError for a name that a notebook (`globals()`) does not know: papermill, which injects a cell, only warns."""
    for source in namespace.get("In", []):
        if not source.startswith("# Parameters"):
            continue
        assigned = [
            target.id
            for statement in ast.parse(source).body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
        ]
        for name in assigned:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise UserError(f"unknown parameter {name!r}{hint}")


def _choose_profile(values: dict) -> None:
    profile = values["profile"]
    if profile not in ("auto", *PROFILES):
        raise UserError(f"profile={profile!r}: must be 'auto', 'math' or 'mini'")
    if profile == "auto":
        data_dir = absolute(values["data_dir"] or MATH_DATA_DIR)
        has_data = all((data_dir / name).is_file() for name in DATA_FILES)
        values["profile"] = "math" if has_data and count_gpus() > 0 else "mini"


def _check_values(values: dict) -> None:
    n = values["n"]
    if n != "all" and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise UserError(f"n={n!r}: must be a positive integer or 'all'")
    _check_type(values, bool, "filtered", "trust_remote_code", "overwrite", "resume", "keep_checkpoint", "keep_model")
    if values["eval_beside_training"] is not None:
        _check_type(values, bool, "eval_beside_training")
    _check_type(values, str, "model", "data_dir", "wandb_project")
    _check_range(values, int, 0, None, "seed", "log_generations")
    _check_range(values, int, 1, None, "batch_size", "microbatch_tokens", "max_length", "n_val", "max_new_tokens")
    _check_range(values, int, 1, None, "max_steps", "n_val_final", "eval_interval", optional=True)
    _check_range(values, int, 0, None, "checkpoint_interval", optional=True)
    _check_range(values, float, 0, None, "temperature", "weight_decay")
    _check_range(values, float, 0, None, "learning_rate", "epochs", "gradient_clip", "engine_timeout", above=True)
    _check_range(values, float, 0, 1, "top_p", "gpu_memory_utilization", above=True)
    _check_range(values, float, 0, 1, "warmup_ratio")
    for name, choices in {
        "precision": ("bf16", "fp32"),
        "eval_split": ("validation", "tuning"),
        "greedy": ("never", "final", "always"),
        "verify_sync": ("first", "always"),
        "wandb_mode": ("auto", "online", "offline", "disabled"),
    }.items():
        if values[name] not in choices:
            raise UserError(f"{name}={values[name]!r}: must be one of {', '.join(map(repr, choices))}")
    if values["run_name"] is not None and (
        not isinstance(values["run_name"], str) or Path(values["run_name"]).name != values["run_name"]
    ):
        raise UserError(f"run_name={values['run_name']!r}: must be a plain folder name")
    if values["n_val_final"] is not None and values["n_val_final"] < values["n_val"]:
        raise UserError(f"n_val_final={values['n_val_final']}: must not be less than n_val={values['n_val']}")


def _check_type(values: dict, kind: type, *names: str) -> None:
    for name in names:
        if not isinstance(values[name], kind):
            raise UserError(f"{name}={values[name]!r}: must be of type {kind.__name__}")


def _check_range(values: dict, kind: type, low, high, *names: str, above: bool = False, optional: bool = False) -> None:
    """Numbers within [low, high], or (low, high] with `above`; an integer serves as a float."""
    for name in names:
        value = values[name]
        if optional and value is None:
            continue
        allowed = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise UserError(f"{name}={value!r}: must be a number of type {kind.__name__}")
        if not (value > low if above else value >= low) or (high is not None and value > high) or value == float("inf"):
            bound = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high is not None else "")
            raise UserError(f"{name}={value!r}: must be {bound}")


def _choose_devices(values: dict) -> None:
    """Resolve None: training on the first GPU and the engine on the second, or both on one, or both on the CPU.

    An engine with a device of its own answers beside training.
    """
    gpus = count_gpus()
    train, evaluate = values["train_device"], values["eval_device"]
    train, evaluate = ("cuda:0" if device == "cuda" else device for device in (train, evaluate))
    train = train or ("cuda:0" if gpus else "cpu")
    evaluate = evaluate or (train if gpus < 2 or train == "cpu" else "cuda:1" if train == "cuda:0" else "cuda:0")
    for name, device in (("train_device", train), ("eval_device", evaluate)):
        kind, _, index = str(device).partition(":")
        if (kind == "cpu" and index) or (kind == "cuda" and not index.isdigit()) or kind not in ("cpu", "cuda"):
            raise UserError(f"{name}={device!r}: must be 'cpu', 'cuda:0', 'cuda:1', ...")
        if kind == "cuda" and int(index) >= gpus:
            raise UserError(f"{name}={device!r}: this machine has {gpus} NVIDIA GPU(s) that PyTorch can use")
    if (train == "cpu") != (evaluate == "cpu"):
        raise UserError(f"train_device={train!r} and eval_device={evaluate!r}: both on the CPU, or both on GPUs")
    values["train_device"], values["eval_device"] = train, evaluate
    if values["eval_beside_training"] is None:
        values["eval_beside_training"] = values["train_device"] != values["eval_device"]
    if importlib.util.find_spec("vllm") is None:
        raise UserError("eval_device: vLLM is not installed in this environment; `make run` sets it up (see README)")


def _looks_like_folder(model: str) -> bool:
    return model.startswith((".", "/", "~")) or absolute(model).is_dir()


def _check_data_dir(config: RunConfig) -> None:
    folder = Path(config.data_dir)
    if not folder.is_dir():
        raise UserError(
            f"data_dir={shorten_path(str(folder))!r}: no such folder (it should hold {', '.join(DATA_FILES)})"
        )
    for name in ("sft.jsonl", "validation.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"data_dir: {shorten_path(str(folder / name))} is missing")


def _check_model(config: RunConfig) -> None:
    if _looks_like_folder(config.model):
        folder = Path(config.model)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model={shorten_path(config.model)!r}: no config.json in this folder, so it is no model folder"
            )
        if not any(folder.glob("*.safetensors")):
            other = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            reason = "only pickled weights, which are not loaded because they can run code" if other else "no weights"
            raise UserError(f"model={shorten_path(config.model)!r}: {reason} in this folder (*.safetensors needed)")
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
            raise UserError(f"model={shorten_path(config.model)!r}: no tokenizer in this folder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm wants ipywidgets in a notebook; no bar of its is ever shown
        from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        hint = ""
        if "trust_remote_code" in str(error):
            hint = " (its code would run here: set trust_remote_code=True if you trust it)"
        raise UserError(f"model={shorten_path(config.model)!r}: can't be loaded: {reason}{hint}") from error


def check_run_dir(config: RunConfig) -> None:
    """UserError where the run's folder holds a finished run that is not to be overwritten."""
    if (config.run_dir / "summary.json").exists() and not config.overwrite:
        raise UserError(
            f"run_name={config.run_name!r}: {shorten_path(str(config.run_dir))} holds a finished run; "
            "choose another run_name, or overwrite=True to replace it"
        )
