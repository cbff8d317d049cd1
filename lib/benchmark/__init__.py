"""The benchmark: what it measures (rows, training, evaluation), in processes of its own, and how it is shown."""
