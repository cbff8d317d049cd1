"""Supervised fine-tuning on MATH reasoning traces: the library behind the notebooks."""

import logging
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in any kernel without ipywidgets
for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed, which tells much
    logging.getLogger(name).setLevel(logging.ERROR)
