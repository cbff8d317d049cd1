"""Evaluation by vLLM: the engine, the way of the weights into it, and the proof that they arrived.

The assignment's two helpers can be imported from here. They are looked up late, so that an engine's process, and a
notebook that starts one, get along without what they need.
"""

PLACES = {"init_vllm": "lib.evaluation.engine", "load_policy_into_vllm_instance": "lib.evaluation.weights"}
__all__ = ["init_vllm", "load_policy_into_vllm_instance"]


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(PLACES[name]), name)
