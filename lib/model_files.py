"""A model's files: opened and checked against each other before anything starts, and told apart by what they hold."""

import hashlib
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lib.files import UserError, first_line, read_json, refuse_signature, shorten_path

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
OBJECTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", INDEX)
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|output|embed_out)\.weight$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
BLOCK = 1 << 26  # bytes that a thread hashes at once


def check_model(model: str, revision: str | None, trust_remote_code: bool) -> None:
    """UserError where the model's configuration can't be loaded, or where weights, tokenizer and configuration of a
    folder are not whole or don't fit together. A hub model's weights come later, from a cache that checks them."""
    folder, what = Path(model), f"model={shorten_path(model)!r}"
    is_folder = folder.is_absolute()
    if is_folder:
        _check_names(folder, what)
        shapes = _read_shapes(folder, what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm misses ipywidgets, which nothing here needs
        from transformers import AutoConfig, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model, **options)
        tokenizer = AutoTokenizer.from_pretrained(model, **options) if is_folder else None
    except Exception as error:  # whatever a broken file, or the model's own code, raises
        hint = ""
        if "trust_remote_code" in str(error):
            hint = " (its code would run here: set trust_remote_code=True if you trust it)"
        raise UserError(f"{what}: can't be loaded: {first_line(error)}{hint}") from error
    if is_folder:
        _check_shapes(config.get_text_config(), tokenizer, shapes, what)


def _check_names(folder: Path, what: str) -> None:
    """UserError where the folder lacks a file, or has one that is no JSON or no more than a pointer."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{what}: no config.json in this folder, so it is no model folder")
    if not any(folder.glob("*.safetensors")):
        other = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        reason = "only pickled weights, which are not loaded because they can run code" if other else "no weights"
        raise UserError(f"{what}: {reason} in this folder (*.safetensors needed)")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{what}: no tokenizer in this folder")
    for name in OBJECTS:
        read_json(folder / name)
    for path in (folder / "tokenizer.model", folder / "merges.txt", *folder.glob("*.safetensors")):
        if path.is_file():
            with open(path, "rb") as file:
                refuse_signature(file.read(64), path)


def _read_shapes(folder: Path, what: str) -> dict[str, list[int]]:
    """The shape of each tensor, from the files' headers. UserError where a file is not whole or missing."""
    shards: dict[str, dict] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as tensors:
                shards[path.name] = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            size = path.stat().st_size
            reason = f"is cut off or no safetensors file ({size:,} bytes): {first_line(error)}"
            raise UserError(f"{what}: {path.name} {reason}") from error
    if (folder / "model.safetensors").is_file():
        return shards["model.safetensors"]
    if not (folder / INDEX).is_file():
        raise UserError(f"{what}: {next(iter(shards))} is no model.safetensors, and there is no {INDEX} that names it")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{what}: {INDEX} has no weight_map")
    for name, file in places.items():
        if name not in shards.get(file, {}):
            lacks = f"{file} lacks {name}, which {INDEX} says it holds" if file in shards else f"{file} is missing"
            raise UserError(f"{what}: {lacks}")
    return {name: shards[file][name] for name, file in places.items()}


def _check_shapes(config, tokenizer, shapes: dict[str, list[int]], what: str) -> None:
    """UserError where configuration, tokenizer and weights are not of one model."""
    layers = {int(found[1]) for name in shapes if (found := LAYER.search(name))}
    if layers and len(layers) < getattr(config, "num_hidden_layers", 0):
        raise UserError(f"{what}: config.json has {config.num_hidden_layers} layers, the weights {len(layers)}")
    embedding = next((name for name in shapes if EMBEDDING.search(name)), None)
    if embedding is None:
        return  # an architecture of other names
    if not (config.tie_word_embeddings or any(HEAD.search(name) for name in shapes)):
        raise UserError(f"{what}: the weights lack lm_head.weight, and config.json does not tie it to the embedding")
    rows, *width = shapes[embedding]
    widths = [[getattr(config, name, None)] for name in ("hidden_size", "word_embed_proj_dim", "embedding_size")]
    if rows != config.vocab_size or width not in widths:
        asked = f"{config.vocab_size} x {config.hidden_size}"
        raise UserError(f"{what}: {embedding} is {' x '.join(map(str, shapes[embedding]))}, {asked} by config.json")
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise UserError(f"{what}: the tokenizer has ids up to {largest}, the weights' embedding only {rows} rows")


def fingerprint(folder: str | Path) -> str | None:
    """SHA-256 over all bytes of a folder's weights, in parallel blocks; None where there are no weights.

    About 1 GB/s a core: 3 GB take 2 s on two cores, once they are in memory.
    """
    digest, paths = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:
        for path in paths:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for part in pool.map(
                lambda start, path=path: _hash_block(path, start), range(0, path.stat().st_size, BLOCK)
            ):
                digest.update(part)
    return digest.hexdigest() if paths else None


def _hash_block(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(BLOCK)).digest()


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """The commit that the cache holds of a hub model, without a connection; None for a folder or an empty cache."""
    if Path(model).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache  # late: it imports tqdm, which warns (see `check_model`)

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None
