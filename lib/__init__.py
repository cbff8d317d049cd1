"""Supervised fine-tuning on MATH reasoning traces: the library behind the notebooks."""
