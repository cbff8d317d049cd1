"""Pre-training of `mini`'s base model from scratch: a flat loop, and two looks at what came out."""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from lib.mini.textbook import DRILLS

MODEL = Path(__file__).parent / "model"


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Qwen2's architecture at about five million parameters."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True)
class Step:
    """One line of the training curve."""

    step: int
    loss: float  # nats a token
    learning_rate: float
    tokens: int  # seen so far
    seconds: float


def learning_rate_at(progress: float, peak: float, warmup: float = 0.03) -> float:
    """A linear warm-up, then a half cosine down to zero; `progress` runs from 0 to 1."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def pretrain(
    model: Qwen2ForCausalLM,
    tokens: np.ndarray,
    *,
    context: int,
    batch_size: int,
    peak_learning_rate: float,
    passes: int,
    max_seconds: float,
    seed: int,
    log_every: int = 20,
) -> list[Step]:
    """Passes over `tokens` (uint16, documents end to end), each in its own random order; changes `model` in place.

    A window of `context` tokens may hold several documents and cut one. Weights are fp32, the arithmetic is bf16
    where the device likes it. The learning rate is zero when the tokens or `max_seconds` run out, whichever is first.
    """
    device = model.device
    windows = torch.from_numpy(tokens.astype(np.int32))[: len(tokens) // context * context].view(-1, context)
    shuffle = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(windows), generator=shuffle) for _ in range(passes)]).to(device)
    windows = windows.to(device)  # on the device as a whole: a batch is then a lookup
    total_steps = len(order) // batch_size
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )

    def batch_loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    if device.type == "cuda":
        batch_loss = torch.compile(batch_loss)
    curve, start = [], None
    model.train()
    for step in range(total_steps):
        elapsed = 0.0 if start is None else time.perf_counter() - start
        progress = max(step / total_steps, elapsed / max_seconds)
        if progress >= 1:
            break
        learning_rate = learning_rate_at(progress, peak_learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = batch_loss(windows[order[step * batch_size : (step + 1) * batch_size]].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if start is None:  # the first step compiles
            loss.item()
            start = time.perf_counter()
        if step % log_every == 0 or step == total_steps - 1:
            value = loss.item()
            seen = (step + 1) * batch_size * context
            curve.append(Step(step, value, learning_rate, seen, time.perf_counter() - start))
    model.eval()
    return curve


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The folder that `AutoModelForCausalLM.from_pretrained` loads: bf16 weights in one safetensors file."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=1024,
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def complete(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    max_new_tokens: int,
    sample: bool,
) -> list[str]:
    """What the model writes after each prompt, up to the end-of-text token; at temperature 1.0 or greedy."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    decoding = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    written = model.generate(**inputs, max_new_tokens=max_new_tokens, **decoding)
    return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def drill_accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> dict[str, float]:
    """Kind of drill -> share of `count` fresh lines whose end the model writes correctly, greedily.

    The model reads four lines of the kind and a fifth up to its last ` = `, ` is `, ` share ` or ` printed `.
    """
    shares = {}
    for kind, make_line in DRILLS.items():
        rng = random.Random(f"{seed} {kind}")
        prompts, ends = [], []
        for _ in range(count):
            lines = [make_line(rng) for _ in range(5)]
            words = lines[-1].split(" ")
            marks = [at for at, word in enumerate(words[:-1]) if word in ("=", "is", "share", "printed", "stays")]
            cut = (marks[0] if kind in ("root", "remainder") else marks[-1]) + 1 if marks else len(words) - 1
            prompts.append("\n".join([*lines[:-1], " ".join(words[:cut])]))
            ends.append(" " + " ".join(words[cut:]))
        written = complete(model, tokenizer, prompts, max_new_tokens=24, sample=False)
        right = [text.split("\n")[0] == end for text, end in zip(written, ends, strict=True)]
        shares[kind] = sum(right) / count
    return shares
