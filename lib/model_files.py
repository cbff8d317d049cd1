"""A model's files: opened and checked against each other before anything starts, and told apart by what they hold."""

import hashlib
import re
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lib.files import UserError, first_line, read_json, refuse_signature, sha256, shorten_path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
OBJECTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", INDEX)
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def check_model(model: str, revision: str | None, trust_remote_code: bool, parameter: str = "model") -> None:
    """UserError where a model's configuration can't be loaded, or where a folder's files don't fit together.

    A hub model's weights come later, from a cache that checks them.
    """
    folder, what = Path(model), f"{parameter}={shorten_path(model)!r}"
    shapes = _read_shapes(folder, what) if folder.is_absolute() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm misses ipywidgets, which nothing here needs
        from transformers import AutoConfig, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model, **options)
        tokenizer = AutoTokenizer.from_pretrained(model, **options) if shapes else None
    except Exception as error:  # whatever a broken file, or the model's own code, raises
        hint = " (its code would run here: set trust_remote_code=True if you trust it)"
        hint = hint if "trust_remote_code" in str(error) else ""
        raise UserError(f"{what}: can't be loaded: {first_line(error)}{hint}") from error
    if shapes:
        _check_shapes(config.get_text_config(), tokenizer, shapes, what)
        _check_tensors(config, shapes, trust_remote_code, what)


def _read_shapes(folder: Path, what: str) -> dict[str, list[int]]:
    """The shape of each tensor, from the weights' headers. UserError for a file that is missing or broken."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{what}: no config.json in this folder, so it is no model folder")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{what}: no tokenizer in this folder")
    objects = {name: read_json(folder / name) for name in OBJECTS}
    weights = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        reason = "only pickled weights, which are not loaded because they can run code" if pickled else "no weights"
        raise UserError(f"{what}: {reason} in this folder (*.safetensors needed)")
    for path in (*weights, *folder.glob("tokenizer.model"), *folder.glob("merges.txt")):
        with open(path, "rb") as file:
            refuse_signature(file.read(64), path)
    shards = {path.name: _read_header(path, what) for path in weights}
    if WEIGHTS in shards:
        return shards[WEIGHTS]
    if not objects[INDEX]:
        raise UserError(f"{what}: {weights[0].name} is no {WEIGHTS}, and there is no {INDEX} that names it")
    places = objects[INDEX].get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{what}: {INDEX} has no weight_map")
    for name, file in places.items():
        if not isinstance(file, str):
            raise UserError(f"{what}: {INDEX} names no file for {name}")
        if file not in shards:
            raise UserError(f"{what}: {file} is missing")
        if name not in shards[file]:
            raise UserError(f"{what}: {file} lacks {name}, which {INDEX} says it holds")
    return {name: shards[file][name] for name, file in places.items()}


def _read_header(path: Path, what: str) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = f"is cut off or no safetensors file ({path.stat().st_size:,} bytes): {first_line(error)}"
        raise UserError(f"{what}: {path.name} {reason}") from error


def _check_shapes(config, tokenizer, shapes: dict[str, list[int]], what: str) -> None:
    """UserError where configuration, tokenizer and weights are not of one model; other names of tensors pass."""
    layers = {found[1] for name in shapes if (found := LAYER.search(name))}
    if layers and len(layers) < config.num_hidden_layers:
        raise UserError(f"{what}: config.json has {config.num_hidden_layers} layers, the weights {len(layers)}")
    embedding = next((name for name in shapes if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if embedding is None:
        return
    if not config.tie_word_embeddings and not any(name.endswith("lm_head.weight") for name in shapes):
        raise UserError(f"{what}: the weights lack lm_head.weight, and config.json does not tie it to the embedding")
    (rows, width), asked = shapes[embedding], getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT has both
    if (rows, width) != (config.vocab_size, asked):
        raise UserError(f"{what}: {embedding} is {rows} x {width}, {config.vocab_size} x {asked} by config.json")
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(f"{what}: the tokenizer has ids up to {largest}, the weights' embedding only {rows} rows")


def _check_tensors(config, shapes: dict[str, list[int]], trust_remote_code: bool, what: str) -> None:
    """UserError where the architecture of config.json has a tensor that the weights lack, or have in another shape.

    transformers would make up what is missing, and it would be trained from there. Weights whose tensors it renames on
    loading are left to its own report (`policy.load_policy`).
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    if getattr(config, "quantization_config", None):
        raise UserError(f"{what}: its weights are quantized (quantization_config in config.json); full ones are needed")
    if getattr(config, "auto_map", None):  # the model's own code, which says itself what it needs
        return
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a class that does not exist, numbers that don't fit each other
        reason = first_line(error).partition(" Model type should be")[0]
        raise UserError(f"{what}: no causal language model can be made of config.json: {reason[:200]}") from error
    renamed = [pattern for step in get_model_conversion_mapping(made) for pattern in step.source_patterns]
    if any(re.search(pattern, name) for pattern in renamed for name in shapes):
        return
    prefix, optional = f"{made.base_model_prefix}.", "|".join(made._keys_to_ignore_on_load_missing or ()) or "(?!)"
    for name, tensor in made.state_dict().items():
        found = next((shapes[n] for n in (name, name.removeprefix(prefix)) if n in shapes), None)
        if found is None and name not in made.all_tied_weights_keys and not re.search(optional, name):
            raise UserError(f"{what}: the weights lack {name}, which config.json asks for")
        if found is not None and list(found) != list(tensor.shape):
            sizes = " x ".join(map(str, found)), " x ".join(map(str, tensor.shape))
            raise UserError(f"{what}: {name} is {sizes[0]} in the weights, {sizes[1]} by config.json")
    kept = {found[1] for name in made.state_dict() if (found := LAYER.search(name))}
    more = [name for name in shapes if (found := LAYER.search(name)) and kept and found[1] not in kept]
    if more:
        raise UserError(f"{what}: the weights have {more[0]}, a layer that config.json does not know")


def fingerprint(folder: str | Path) -> str | None:
    """SHA-256 over all bytes of a folder's weights, about 1 GB/s; None where there are no weights."""
    digest, paths = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    for path in paths:
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest() if paths else None


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """The commit that the cache holds of a hub model, without a connection; None for a folder or an empty cache."""
    if Path(model).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache  # late: it imports tqdm, which warns (see `check_model`)

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None
