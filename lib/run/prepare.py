"""Before a run starts: its data read and checked, its examples chosen, its batches cut."""

from dataclasses import asdict, replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from lib.contamination import find_contamination
from lib.data import load_evaluation_problems, load_examples, select_examples, stratified_subset
from lib.environment import describe_environment
from lib.evaluation.engine import DTYPES, Engine, begin_vllm
from lib.evaluation.evaluate import context_lengths, encode_prompts
from lib.evaluation.form import check_form
from lib.evaluation.memory import (
    BYTES,
    ENOUGH_AT_ONCE,
    LEAST_AT_ONCE,
    SPARE,
    Savings,
    card_memory,
    engine_bytes,
    model_shape,
    plan_savings,
)
from lib.evaluation.replica import Replica, start_replicas
from lib.files import UserError, file_hashes
from lib.model_files import hub_commit
from lib.run.run import Run
from lib.settings import RunConfig
from lib.training.batching import encode, make_batches
from lib.training.policy import load_tokenizer
from lib.training.steps import check_optimizer

SUBSET_SEED = 0  # the validation subset is the same for every run, whatever its seed: runs are compared on it


def prepare(config: RunConfig, start_workers: bool = False) -> Run:
    """Read and check all data, choose the examples, and cut the batches; no model is loaded, nothing is written.

    `start_workers`: start the engine's processes on a GPU, so that they import vLLM meanwhile.
    """
    replicas = start_replicas(config.eval_device, config.train_device, config.engines) if start_workers else []
    try:
        return _prepare(config, replicas)
    except BaseException:
        for replica in replicas:
            replica.close()
        raise


def _prepare(config: RunConfig, replicas: list[Replica]) -> Run:
    data_dir = Path(config.data_dir)
    examples, template = load_examples(data_dir, config.prompt_template)
    problems = load_evaluation_problems(data_dir, config.eval_split, examples)
    # Among all traces, not only the chosen ones: runs of every n are compared on the same problems.
    contamination = find_contamination(examples, problems)
    if config.exclude_contaminated:
        problems = contamination.leave_out(problems)
    if config.n_val > len(problems):
        raise UserError(f"n_val={config.n_val}: there are only {len(problems)} problems in this split")
    problems = stratified_subset(problems, config.n_val_final, SUBSET_SEED)
    subset = stratified_subset(problems, config.n_val, SUBSET_SEED)
    shown = stratified_subset(subset, config.log_generations, SUBSET_SEED)
    kept = problems if config.keep_responses is None else stratified_subset(subset, config.keep_responses, SUBSET_SEED)
    training = select_examples(examples, config.n, config.filtered, config.seed)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code, config.revision)
    check_form(tokenizer, config.model)
    sequences = encode(training.examples, tokenizer, config.max_length)
    batches = make_batches(sequences, config.batch_size, config.epochs, config.max_steps, config.seed)
    prompts = encode_prompts(problems, template, tokenizer)
    context = context_lengths(prompts, config.max_new_tokens)["max_model_len"]
    savings = _plan_savings(config, context)
    check_optimizer(savings.optimizer)
    environment = describe_environment(config.train_device, config.eval_device) | {"memory": asdict(savings)}
    run = Run(
        config=config,
        replicas=replicas,
        tokenizer=tokenizer,
        template=template,
        environment=environment | {"model_commit": hub_commit(config.model, config.revision)},
        sizes={
            **training.sizes,
            "template": template.name,
            "contamination": contamination.to_dict(config.exclude_contaminated),
            "validation": len(problems),
            "validation_subset": len(subset),
            "train_steps": len(batches),
            "files": file_hashes(data_dir, config.prompt_template),
        },
        batches=batches,
        problems=problems,
        prompts=prompts,
        subset_ids={p.id for p in subset},
        shown_ids={p.id for p in shown},
        textless_ids={p.id for p in problems} - {p.id for p in [*kept, *shown]},
        savings=savings,
    )
    model = AutoConfig.from_pretrained(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    needed = {"max_new_tokens": context, "max_length": max(len(s.token_ids) for s in sequences)}
    for limit, what in _limits(model.get_text_config()):
        for name, tokens in needed.items():
            if tokens > limit:
                longest = f"the longest text has {tokens} tokens"
                raise UserError(f"{name}={getattr(config, name)}: {longest}, more than the model's {limit} {what}")
    return run


def _limits(model: PreTrainedConfig) -> list[tuple[int, str]]:
    """How many tokens a text may have, and by what."""
    found = [(getattr(model, "max_position_embeddings", None), "positions")]
    if "sliding_attention" in (getattr(model, "layer_types", None) or ["sliding_attention"]):
        beyond = "tokens of sliding attention (sliding_window), beyond which training on packed sequences can't go"
        found.append((getattr(model, "sliding_window", None), beyond))
    return [(limit, what) for limit, what in found if limit]


def _plan_savings(config: RunConfig, context: int) -> Savings:
    """What the training card's size makes necessary, for responses of at most `context` tokens with their prompts."""
    asked = config.model_dump(include={"microbatch_tokens", "optimizer", "recompute"})
    if config.train_device == "cpu":
        return Savings(asked["optimizer"] or "adamw", bool(asked["recompute"]), False, asked["microbatch_tokens"])
    total, _ = card_memory(config.train_device)
    shape = model_shape(config.model, config.trust_remote_code, config.revision)
    optimizer = config.optimizer or "adamw8bit"  # the smallest
    if (smallest := shape.parameters * BYTES[optimizer]) > total:
        raise UserError(
            f"train_device={config.train_device!r}: has {total / 1e9:.0f} GB, and {shape.parameters / 1e9:.1f} B "
            f"parameters with their gradients and moments take {smallest / 1e9:.0f} GB with {optimizer}"
        )
    if config.train_device != config.eval_device:
        return replace(plan_savings(total, shape, **asked), reserved=0)
    share, size = config.gpu_memory_utilization, DTYPES[config.precision].itemsize
    one = engine_bytes(shape, size, context, ENOUGH_AT_ONCE) / SPARE
    beside = int(share * total if share else one * (config.engines or 1))
    least = engine_bytes(shape, size, context, LEAST_AT_ONCE)
    return plan_savings(total, shape, **asked, engine=beside, may_sleep=not config.eval_beside_training, least=least)


def start_engine(run: Run, log_file: Path) -> Engine:
    """Begin to start an engine for the run's model, with room for its longest prompt and response."""
    config = run.config
    replicas, run.replicas = run.replicas, []  # they are the engine's from now on
    same = {"precision", "seed", "gpu_memory_utilization", "engines", "trust_remote_code", "revision"}
    return begin_vllm(
        config.model,
        config.eval_device,
        config.train_device,
        log_file=log_file,
        **context_lengths(run.prompts, config.max_new_tokens),
        reserved_bytes=run.savings.reserved,
        replicas=replicas,
        timeout=config.engine_timeout,
        **config.model_dump(include=same),
        **({"enable_sleep_mode": True} if run.savings.sleep else {}),
    )
