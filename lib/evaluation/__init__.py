"""Evaluation by vLLM: the engine, the way of the weights into it, and the proof that they arrived."""

from lib.evaluation.engine import init_vllm, load_policy_into_vllm_instance

__all__ = ["init_vllm", "load_policy_into_vllm_instance"]
