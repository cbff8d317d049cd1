"""Pre-training text as token ids, made in many processes.

Apart from `pretrain.py` because its workers must start fast: nothing here imports torch.
"""

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lib.mini import textbook

SHARD = 20_000  # documents a worker makes at a time


def make_shard(tokenizer_file: Path, seed: int, documents: int) -> np.ndarray:
    """Token ids (uint16) of `documents` documents, each ending in the end-of-text token."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already fill the cores
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    end = tokenizer.token_to_id("<|endoftext|>")
    rng = random.Random(seed)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast([textbook.document(rng) for _ in range(documents)]):
        ids += encoding.ids
        ids.append(end)
    return np.array(ids, dtype=np.uint16)


def make_tokens(tokenizer_file: Path, documents: int, seed: int, workers: int | None = None) -> np.ndarray:
    """Token ids of at least `documents` documents, end to end. `workers=None` means one for each core.

    Shard number i has the seed `seed * 1_000_003 + i`, so the text does not depend on the number of workers.
    """
    shards = -(-documents // SHARD)
    size = min(SHARD, documents)
    seeds = [seed * 1_000_003 + number for number in range(shards)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        return np.concatenate(list(pool.map(make_shard, [tokenizer_file] * shards, seeds, [size] * shards)))
