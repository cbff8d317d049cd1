"""Before a run starts: its data read and checked, its examples chosen, its batches cut."""

from pathlib import Path

from transformers import AutoConfig

from lib.data import load_evaluation_problems, load_examples, select_examples, stratified_subset
from lib.evaluation import engine as engines
from lib.evaluation import evaluate as evaluation
from lib.files import UserError
from lib.run.run import Run
from lib.settings import RunConfig
from lib.training.batching import encode, make_batches
from lib.training.policy import load_tokenizer

SUBSET_SEED = 0  # the validation subset is the same for every run, whatever its seed: runs are compared on it


def prepare(config: RunConfig) -> Run:
    """Read and check all data, choose the examples, and cut the batches; no model is loaded, nothing is written."""
    data_dir = Path(config.data_dir)
    examples, template = load_examples(data_dir, config.prompt_template)
    problems = load_evaluation_problems(data_dir, config.eval_split, examples)
    if config.n_val > len(problems):
        raise UserError(f"n_val={config.n_val}: there are only {len(problems)} problems in this split")
    problems = stratified_subset(problems, config.n_val_final, SUBSET_SEED)
    subset = stratified_subset(problems, config.n_val, SUBSET_SEED)
    training = select_examples(examples, config.n, config.filtered, config.seed)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    sequences = encode(training.examples, tokenizer, config.max_length)
    batches = make_batches(sequences, config.batch_size, config.epochs, config.max_steps, config.seed)
    run = Run(
        config=config,
        tokenizer=tokenizer,
        template=template,
        sizes={
            **training.sizes,
            "template": template.name,
            "validation": len(problems),
            "validation_subset": len(subset),
            "train_steps": len(batches),
            "train_tokens_per_epoch": sum(len(s.token_ids) for s in sequences),
            "longest_example": max(len(s.token_ids) for s in sequences),
        },
        batches=batches,
        problems=problems,
        prompts=evaluation.encode_prompts(problems, template, tokenizer),
        subset_ids={p.id for p in subset},
        shown_ids={p.id for p in stratified_subset(subset, config.log_generations, SUBSET_SEED)}
        if config.log_generations
        else set(),
    )
    _check_context_length(run)
    return run


def _check_context_length(run: Run) -> None:
    model = AutoConfig.from_pretrained(run.config.model, trust_remote_code=run.config.trust_remote_code)
    limit = getattr(model, "max_position_embeddings", None)
    if limit is None:
        return
    if longest_evaluation(run) > limit:
        longest_prompt = max(map(len, run.prompts))
        raise UserError(
            f"max_new_tokens={run.config.max_new_tokens}: with the longest prompt ({longest_prompt} tokens) "
            f"more than the model's {limit} positions"
        )
    if run.sizes["longest_example"] > limit:
        raise UserError(
            f"max_length={run.config.max_length}: the longest example has {run.sizes['longest_example']} tokens, "
            f"more than the model's {limit} positions"
        )


def longest_evaluation(run: Run) -> int:
    """Tokens of the longest prompt and response together: the context that the engine must hold."""
    return max(map(len, run.prompts)) + run.config.max_new_tokens


def start_engine(run: Run, log_file: Path, init=engines.init_vllm):
    """What `init` makes of the run's model and devices, with room for its longest prompt and response: an engine."""
    config = run.config
    return init(
        config.model,
        config.eval_device,
        config.train_device,
        log_file=log_file,
        precision=config.precision,
        seed=config.seed,
        max_model_len=longest_evaluation(run),
        gpu_memory_utilization=config.gpu_memory_utilization,
        timeout=config.engine_timeout,
        trust_remote_code=config.trust_remote_code,
    )
