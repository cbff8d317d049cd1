"""The benchmark: what is measured, and how it is shown."""
