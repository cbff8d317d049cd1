"""Many runs: the command `python -m lib.study`, the execution of notebooks, and tuning."""
