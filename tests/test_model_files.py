"""A model's files are opened before anything starts: each broken one is named with its cause."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lib.files import UserError, shorten_path
from lib.model_files import check_model, fingerprint, hub_commit
from lib.settings import resolve
from lib.training.policy import load_policy

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 10244312\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def split(folder, weight_map=None, drop=()):
    """Two shards and an index of them, in place of one file."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in sorted(set(places.values())):
        if shard not in drop:
            save_file({n: t for n, t in tensors.items() if places[n] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {**places, **(weight_map or {})}}))


def rename_weights(folder):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")


def index_without_map(folder):
    split(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}}))


def pointer_as_index(folder):
    split(folder)
    (folder / INDEX).write_bytes(POINTER)


def more_tokens(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"].append(first | {"id": 1536, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def change_tensors(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def smaller_embedding(folder):
    name = "model.embed_tokens.weight"
    change_tensors(folder, lambda tensors: tensors | {name: tensors[name][:1000]})


def drop(folder, name):
    change_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})


def rename(folder, old, new):
    change_tensors(folder, lambda tensors: {n.replace(old, new, 1): t for n, t in tensors.items()})


BROKEN = {
    "weights: pointer": (change_bytes(WEIGHTS, lambda b: POINTER), r"model\.safetensors: is a Git LFS pointer"),
    "weights: one byte less": (change_bytes(WEIGHTS, lambda b: b[:-1]), r"model\.safetensors is cut off"),
    "weights: one byte more": (change_bytes(WEIGHTS, lambda b: b + b"\0"), r"model\.safetensors is cut off or no"),
    "weights: half": (change_bytes(WEIGHTS, lambda b: b[: len(b) // 2]), r"model\.safetensors is cut off"),
    "weights: within the header": (change_bytes(WEIGHTS, lambda b: b[:100]), r"model\.safetensors is cut off"),
    "weights: empty": (change_bytes(WEIGHTS, lambda b: b""), r"model\.safetensors is cut off .*\(0 bytes\)"),
    "weights: zeros": (change_bytes(WEIGHTS, lambda b: bytes(len(b))), r"model\.safetensors is cut off or no"),
    "weights: web page": (change_bytes(WEIGHTS, lambda b: b"<!DOCTYPE html><p>404"), "is a web page"),
    "weights: pickle": (change_bytes(WEIGHTS, lambda b: b"PK\x03\x04" + b), "is a zip archive"),
    "weights: of another name": (rename_weights, r"weights\.safetensors is no model\.safetensors"),
    "shards: one missing": (
        lambda folder: split(folder, drop=["model-00002-of-00002.safetensors"]),
        r"model-00002-of-00002\.safetensors is missing",
    ),
    "shards: a tensor missing": (
        lambda folder: split(folder, {"model.layers.9.mlp.up_proj.weight": "model-00001-of-00002.safetensors"}),
        r"model-00001-of-00002\.safetensors lacks model\.layers\.9",
    ),
    "index: without a map": (index_without_map, "has no weight_map"),
    "index: pointer": (pointer_as_index, r"index\.json: is a Git LFS pointer"),
    "config: no JSON": (change_bytes("config.json", lambda b: b[:-20]), r"config\.json, line \d+: not valid JSON"),
    "config: pointer": (change_bytes("config.json", lambda b: POINTER), r"config\.json: is a Git LFS pointer"),
    "config: a list": (change_bytes("config.json", lambda b: b"[]"), r"config\.json: must be a JSON object"),
    "config: empty": (change_bytes("config.json", lambda b: b""), r"config\.json: not valid JSON"),
    "config: unknown kind": (lambda f: change_config(f, model_type="qwen99"), "can't be loaded: .*qwen99"),
    "config: vocabulary": (
        lambda f: change_config(f, vocab_size=1600),
        r"is 1536 x 64, 1600 x 64 by config",
    ),
    "config: width": (lambda f: change_config(f, hidden_size=128), r"is 1536 x 64, 1536 x 128 by config"),
    "config: layers": (
        lambda f: change_config(f, num_hidden_layers=4, layer_types=["full_attention"] * 4),
        "config.json has 4 layers, the weights 2",
    ),
    "config: untied": (lambda f: change_config(f, tie_word_embeddings=False), r"weights lack lm_head\.weight"),
    "tokenizer: pointer": (change_bytes("tokenizer.json", lambda b: POINTER), r"tokenizer\.json: is a Git LFS pointer"),
    "tokenizer: merges a pointer": (lambda f: (f / "merges.txt").write_bytes(POINTER), r"merges\.txt: is a Git LFS"),
    "tokenizer: none": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in this folder"),
    "tokenizer: cut off": (change_bytes("tokenizer.json", lambda b: b[:5000]), r"tokenizer\.json.*not valid JSON"),
    "tokenizer: another JSON": (change_bytes("tokenizer.json", lambda b: b'{"a": 1}'), "can't be loaded: "),
    "tokenizer: larger than the embedding": (more_tokens, "ids up to 1536, .* only 1536 rows"),
    "weights: a tensor missing": (
        lambda f: drop(f, "model.layers.0.mlp.down_proj.weight"),
        r"lack model\.layers\.0\.mlp\.d",
    ),
    "weights: all renamed": (
        lambda f: rename(f, "", "other."),
        r"the weights lack model\.layers\.0|lack model\.embed_tokens",
    ),
    "weights: a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "no weights in this folder"),
    "config: fewer layers": (
        lambda f: change_config(f, num_hidden_layers=1, layer_types=["full_attention"]),
        r"the weights have model\.layers\.1\.\S+, a layer that config.json does not know",
    ),
    "config: inner width": (
        lambda f: change_config(f, intermediate_size=64),
        r"mlp\.\S+ is \d+ x \d+ in the weights, 64 x 64",
    ),
    "config: heads": (
        lambda f: change_config(f, num_key_value_heads=2),
        r"k_proj\.weight is \d+ x 64 in the weights, \d+",
    ),
    "config: quantized": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq"}),
        "weights are quantized",
    ),
    "config: no causal model": (lambda f: change_config(f, model_type="t5"), "no causal language model can be made"),
    "index: a list as a file": (lambda f: split(f, {"model.norm.weight": ["a"]}), r"names no file for model\.norm"),
    "embedding smaller than both": (smaller_embedding, r"embed_tokens.weight is 1000 x 64, 1536 x 64 by config"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model_is_refused_with_file_and_cause(fault, model):
    damage, message = BROKEN[fault]
    damage(model)
    with pytest.raises(UserError, match=message) as found:
        check_model(str(model), None, False)
    assert "\n" not in str(found.value) and shorten_path(model) in str(found.value)


def test_nothing_is_made_for_a_broken_model(parameters, model, tmp_path):
    (model / WEIGHTS).write_bytes(POINTER)
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        resolve(parameters | {"model": str(model)})
    assert not (tmp_path / "runs").exists()


def test_whole_models_pass(model):
    check_model(str(model), None, False)
    split(model)
    check_model(str(model), None, False)


def test_weights_under_other_names_that_transformers_knows_pass(tmp_path):
    """Without the prefix of a base model, and in the names of an older version."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, Qwen2Config

    shape = {"vocab_size": 1536, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    for config, old, new in [
        (Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True), "model.", ""),
        (GPTNeoXConfig(**shape, num_attention_heads=2), "lm_head.", "embed_out."),
    ]:
        folder = tmp_path / config.model_type
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained("lib/mini/model").save_pretrained(folder)
        rename(folder, old, new)
        check_model(str(folder), None, False)
        load_policy(str(folder), "cpu")


def test_weights_that_are_no_numbers_are_refused(model):
    name = "model.norm.weight"
    change_tensors(model, lambda tensors: tensors | {name: np.full_like(tensors[name], np.nan)})
    with pytest.raises(UserError, match=r"model='\S+': model\.norm\.weight holds numbers that are not finite"):
        load_policy(str(model), "cpu")


def test_an_error_without_text_is_told_by_its_kind(model, monkeypatch):
    from transformers import AutoConfig

    def fail(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(UserError, match="can't be loaded: NotImplementedError"):
        check_model(str(model), None, False)


def test_a_folder_has_no_revision(parameters):
    with pytest.raises(UserError, match=r"^revision='main': only a hub model has revisions"):
        resolve(parameters | {"revision": "main"})


def test_any_changed_value_changes_the_fingerprint(model):
    before = fingerprint(model)
    assert fingerprint(model) == before and len(before) == 64
    tensors, seen = load_file(model / WEIGHTS), {before}
    for name in sorted(tensors)[:6]:
        changed = {n: np.array(t) for n, t in tensors.items()}
        changed[name].reshape(-1)[changed[name].size // 2] += 1  # one value in the middle
        save_file(changed, model / WEIGHTS, {"format": "pt"})
        seen.add(fingerprint(model))
    assert len(seen) == 7
    save_file(tensors, model / "more.safetensors")
    assert fingerprint(model) not in seen
    assert fingerprint(model.parent) is None


def test_the_order_of_the_bytes_counts(model):
    content = (model / WEIGHTS).read_bytes()
    before = fingerprint(model)
    (model / WEIGHTS).write_bytes(content[:-2000] + content[-1000:] + content[-2000:-1000])
    assert fingerprint(model) != before


def test_the_commit_of_a_hub_model_is_what_the_cache_holds(model, tmp_path, monkeypatch):
    import huggingface_hub

    commit = "4a83ca6e4526a4f2da3aa259ec36c259f66b2ab2"
    cached = tmp_path / "hub" / "models--someone--some-model"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    find = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda *args, **options: find(*args, cache_dir=tmp_path / "hub", **options),
    )
    assert hub_commit("someone/some-model") == hub_commit("someone/some-model", "main") == commit
    assert hub_commit("someone/some-model", commit) == commit
    assert hub_commit("someone/some-model", "v2") is None and hub_commit("someone/other") is None
    assert hub_commit(str(model)) is None
