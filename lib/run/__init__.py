"""One run, from its settings to its summary: what `notebooks/train.ipynb` calls."""
