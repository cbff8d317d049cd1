"""Every mistake in a parameter is named before anything is loaded or written."""

import ast
import json
import re
import shutil

import pytest
from pydantic import ValidationError

from lib import settings as configs
from lib.files import PROJECT_ROOT, UserError
from lib.run.prepare import prepare
from lib.settings import PARAMETERS, PROFILES, Optimization, RunConfig, resolve


def test_the_parameters_cell_says_what_the_model_says():
    """Names, order, defaults and comments stand in `RunConfig`; the notebook shows the same."""
    cells = json.loads((PROJECT_ROOT / "notebooks/train.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    shown = [re.fullmatch(r"(\w+) = (.+?) +# (.+)", line).groups() for line in cell.splitlines() if line]
    fields = [(name, field.default, field.description) for name, field in RunConfig.model_fields.items()]
    assert [(name, ast.literal_eval(default), meaning) for name, default, meaning in shown] == fields


def test_defaults_of_the_profile_fill_what_is_none(parameters):
    config = resolve(parameters | {"epochs": None, "batch_size": 4})
    assert config.epochs == PROFILES["mini"]["epochs"]
    assert config.batch_size == 4  # a given value wins


def test_auto_takes_mini_where_the_course_data_is_missing(parameters, tmp_path):
    assert resolve(parameters | {"profile": "auto", "data_dir": None}).profile == "mini"


def test_auto_takes_math_where_data_and_a_gpu_are_there(parameters, monkeypatch):
    monkeypatch.setattr(configs, "count_gpus", lambda: 2)
    config = resolve(parameters | {"profile": "auto"})
    assert (config.profile, config.train_device, config.eval_device) == ("math", "cuda:0", "cuda:1")


def test_one_gpu_is_shared(parameters, monkeypatch):
    monkeypatch.setattr(configs, "count_gpus", lambda: 1)
    config = resolve(parameters)
    assert (config.train_device, config.eval_device) == ("cuda:0", "cuda:0")


def test_a_gpu_without_a_number_is_the_first(parameters, monkeypatch):
    monkeypatch.setattr(configs, "count_gpus", lambda: 2)
    config = resolve(parameters | {"train_device": "cuda"})
    assert (config.train_device, config.eval_device, config.eval_beside_training) == ("cuda:0", "cuda:1", True)


@pytest.mark.parametrize(
    ("n", "filtered", "seed", "name"),
    [(256, False, 0, "n256"), ("all", False, 0, "full"), ("all", True, 0, "filtered"), (128, False, 2, "n128-seed2")],
)
def test_run_names(parameters, n, filtered, seed, name):
    assert resolve(parameters | {"n": n, "filtered": filtered, "seed": seed}).run_name == name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"n": -5}, "n=-5"),
        ({"n": True}, "n=True"),
        ({"n": "many"}, "n='many'"),
        ({"n": 2.5}, "n=2.5"),
        ({"filtered": "yes"}, "filtered="),
        ({"profile": "maths"}, "profile='maths'"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"microbatch_tokens": 1.5}, "microbatch_tokens=1.5"),
        ({"eval_beside_training": 1}, "eval_beside_training=1"),
        ({"epochs": -1}, "epochs=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"greedy": "sometimes"}, "greedy='sometimes'"),
        ({"eval_split": "test"}, "eval_split='test'"),
        ({"wandb_mode": "on"}, "wandb_mode='on'"),
        ({"run_name": "../elsewhere"}, "run_name='../elsewhere'"),
        ({"run_name": 0}, "run_name=0: must be a"),
        ({"run_name": ""}, "run_name='': must be a plain folder name"),
        ({"runs_dir": 0}, "runs_dir=0: must be a"),
        ({"runs_dir": ""}, "runs_dir='': "),
        ({"train_device": 0}, "train_device=0: must be 'cpu', 'cuda:0'"),
        ({"eval_device": 0}, "eval_device=0: must be 'cpu', 'cuda:0'"),
        ({"eval_device": ""}, "eval_device='': must be 'cpu', 'cuda:0'"),
        ({"train_device": "cuda:7"}, "train_device='cuda:7'"),
        ({"eval_device": "gpu"}, "eval_device='gpu'"),
        ({"n_val": 10, "n_val_final": 5}, "n_val_final=5"),
        ({"data_dir": "/nowhere/at/all"}, "data_dir="),
        ({"model": "./no-such-folder"}, "model="),
        # the whole sentence
        ({"learning_rate": -1}, "learning_rate=-1: must be above 0"),
        ({"batch_size": "8"}, "batch_size='8': must be an integer"),
        ({"batch_size": 8.0}, "batch_size=8.0: must be an integer"),
        ({"seed": True}, "seed=True: must be an integer"),
        ({"epochs": True}, "epochs=True: must be a number"),
        ({"epochs": "3"}, "epochs='3': must be a number"),
        ({"temperature": float("inf")}, "temperature=inf: must be a finite number"),
        ({"warmup_ratio": 1.01}, "warmup_ratio=1.01: must be at most 1"),
        ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1: must be at least 0"),
        ({"weight_decay": None}, "weight_decay=None: must be a number"),
        ({"n": "12"}, "n='12': must be an integer or 'all'"),
        ({"n": None}, "n=None: must be an integer or 'all'"),
        ({"precision": "fp16"}, "precision='fp16': must be 'bf16' or 'fp32'"),
        ({"greedy": ["final"]}, "greedy=['final']: must be 'never', 'final' or 'always'"),
        ({"overwrite": 1}, "overwrite=1: must be a boolean"),
        ({"profile": None}, "profile=None: must be 'auto', 'math' or 'mini'"),
        ({"revision": 3}, "revision=3: must be a string"),
        ({"samples_per_problem": 0}, "samples_per_problem=0: must be at least 1"),
        ({"exclude_contaminated": "no"}, "exclude_contaminated='no': must be a boolean"),
        ({"engines": 0}, "engines=0: must be at least 1"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization=1.2: must be at most 1"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0: must be above 0"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1"),
        ({"data_dir": 5}, "data_dir=5: must be a string"),
        ({"data_dir": "~nobody-here/x"}, "data_dir='~nobody-here/x': ~nobody-here/x: there is no such user"),
        ({"runs_dir": "a\0b"}, "runs_dir='a\\x00b': embedded null byte"),
        ({"run_name": ".."}, "run_name='..': must be a plain folder name"),
        ({"run_name": "a\0b"}, "run_name='a\\x00b': must be a plain folder name"),
        ({"wandb_project": None}, "wandb_project=None: must be a string"),
        ({"seed": 1 << 32}, "seed=4294967296: must be below 4294967296"),
        ({"temperature": 0.001}, "temperature=0.001: must be 0, or at least 0.01"),
        ({"temperature": 0.0, "samples_per_problem": 2}, "samples_per_problem=2: at temperature=0 all samples"),
        ({"run_name": "x" * 300}, "run_name='xxx"),
        ({"data_dir": "/tmp/" + "x" * 300}, "data_dir="),
        ({"model": "/tmp/" + "x" * 300}, "model="),
    ],
)
def test_wrong_values_are_named(parameters, wrong, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        resolve(parameters | wrong)


def test_settings_stay_as_they_were_resolved(parameters):
    config = resolve(parameters | {"epochs": 2, "learning_rate": 1e-3})
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3
    assert json.dumps(config.to_dict()["epochs"]) == "2"  # an integer for a float stays as it was given
    assert tuple(config.to_dict()) == PARAMETERS == tuple(RunConfig.model_fields)
    other = config.model_copy(update={"learning_rate": 5e-4})
    assert (other.optimization.learning_rate, config.optimization.learning_rate) == (5e-4, 1e-3)
    shown = {name: getattr(config.optimization, name) for name in Optimization.__dataclass_fields__}
    assert shown.items() <= dict(config).items() and "microbatch_tokens" in shown


def test_unknown_parameter_is_refused_with_the_name_that_was_meant(parameters):
    # papermill itself only warns about it and runs with the default.
    injected = ["", "n = 256", "# Parameters\nepoch = 3\n"]
    with pytest.raises(UserError, match="unknown parameter 'epoch'; did you mean 'epochs'"):
        resolve(parameters | {"epoch": 3, "In": injected})


def test_a_parameter_that_a_notebook_of_an_earlier_version_lacks_has_its_default(parameters):
    for name in ("engines", "warmup_ratio"):
        del parameters[name]
    config = resolve(parameters)
    assert (config.engines, config.warmup_ratio) == (None, 0.03)


def test_variables_of_the_user_are_no_parameters(parameters):
    resolve(parameters | {"my_variable": 1, "In": ["", "my_variable = 1"]})


def test_model_folder_without_weights(parameters, tiny_model, tmp_path):
    folder = tmp_path / "empty-model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"model=.*no weights"):
        resolve(parameters | {"model": str(folder)})
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"model=.*only pickled weights"):
        resolve(parameters | {"model": str(folder)})


def test_a_model_s_own_code_runs_where_it_is_trusted(parameters, tiny_model, tmp_path):
    folder = tmp_path / "own-model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"})
    )
    (folder / "own.py").write_text(
        "from transformers import Qwen2Config\n\n\nclass Own(Qwen2Config):\n    model_type = 'own'\n"
    )
    with pytest.raises(UserError, match="set trust_remote_code=True if you trust it"):
        resolve(parameters | {"model": str(folder)})
    assert prepare(resolve(parameters | {"model": str(folder), "trust_remote_code": True})).batches


def test_missing_vllm_is_said(parameters, monkeypatch):
    real = configs.importlib.util.find_spec
    monkeypatch.setattr(configs.importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    with pytest.raises(UserError, match="vLLM is not installed"):
        resolve(parameters)


def test_a_finished_run_is_not_overwritten_unasked(parameters, tmp_path):
    folder = tmp_path / "runs" / "n16"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="finished run"):
        resolve(parameters)
    assert (folder / "summary.json").read_text() == "{}"
    resolve(parameters | {"overwrite": True})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 4000}, r"n=4000: there are only 40 distinct"),
        ({"n": 39, "filtered": True}, r"n=39: there are only \d+ correct"),
        ({"max_length": 100}, r"max_length=100: \d+ of 16 examples are longer"),
        ({"n_val": 25}, r"n_val=25: there are only 24"),
        ({"max_new_tokens": 500}, r"max_new_tokens=500: .*512 positions"),
    ],
)
def test_what_the_data_refuses_is_said_before_a_model_is_loaded(parameters, wrong, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(resolve(parameters | wrong))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("used", [True, False])
def test_texts_longer_than_a_sliding_window_are_refused_before_a_model_is_loaded(parameters, used, tmp_path):
    model = tmp_path / "sliding"
    shutil.copytree(parameters["model"], model)
    config = json.loads((model / "config.json").read_text())
    config |= {"use_sliding_window": used, "sliding_window": 48, "max_window_layers": 0}
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "layer_types"}))
    settings = resolve(parameters | {"model": str(model)})
    if not used:
        prepare(settings)
        return
    with pytest.raises(UserError, match=r"max_new_tokens=\d+: .* 48 tokens of sliding attention"):
        prepare(settings)
