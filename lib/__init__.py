"""Supervised fine-tuning on MATH reasoning traces: the library behind the notebooks."""

import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in any kernel without ipywidgets
