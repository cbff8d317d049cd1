"""One run, put together: what `notebooks/train.ipynb` calls, in the order in which it calls it."""

import contextlib
import errno
import hashlib
import json
import math
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from lib.data import Problem, Template, load_evaluation_problems, load_examples, select_examples, stratified_subset
from lib.environment import describe_environment
from lib.evaluation import engine as engines
from lib.evaluation import evaluate as evaluation
from lib.evaluation.form import check_form
from lib.evaluation.memory import model_shape, policy_bytes
from lib.evaluation.weights import load_policy_into_vllm_instance, prove_sync
from lib.files import UserError, read_lines, shorten_path, write_json, write_lines
from lib.grading import stop_workers
from lib.logs import captured, quiet_libraries
from lib.run import lock as locks
from lib.run.resume import hash_batches, read_past
from lib.run.tracker import Tracker
from lib.settings import RunConfig, check_run_dir
from lib.training import checkpoint
from lib.training.batching import Sequence, encode, make_batches
from lib.training.policy import load_policy, load_tokenizer
from lib.training.steps import evaluation_steps, make_optimizer, out_of_memory, train_steps

BASE = {"train_step": 0, "epoch": 0.0, "examples_seen": 0}  # the position of the untrained model
PROOF_PROMPTS = 8
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
SUBSET_SEED = 0  # the validation subset is the same for every run, whatever its seed: runs are compared on it


# --- A run and what can end it ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that a run works with; `prepare` fills the upper part, `start` the lower one."""

    config: RunConfig
    tokenizer: object
    template: Template
    sizes: dict
    batches: list[list[Sequence]]
    problems: list[Problem]
    prompts: list[list[int]]
    subset_ids: set[str]
    shown_ids: set[str]
    log_file: Path
    tracker: Tracker | None = None
    policy: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    engine: engines.Engine | None = None
    seconds: dict = field(default_factory=dict)
    proven: bool = False  # whether an evaluation has recorded its proof of sync
    pending: "Pending | None" = None  # the evaluation that goes on beside training
    note: str = ""  # what the reader should know beside the numbers

    @property
    def evaluation_steps(self) -> set[int]:
        return evaluation_steps(len(self.batches), self.config.eval_interval)

    @contextlib.contextmanager
    def recorded(self, part: str):
        """Count the seconds of a part of the run; an error in it ends what the run started and leaves `failed.json`."""
        started = time.perf_counter()
        try:
            yield
        except BaseException as error:
            explained = _explain(error, self.config)
            _end(self, explained or error)
            if explained is not None:
                raise explained from error
            raise
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Pending:
    """An evaluation under way: which weights were sent, how, and what will come of it."""

    position: dict
    sync: dict
    results: Future  # decoding -> Evaluation


class RunError(RuntimeError):
    """The run can't go on; the message says why and what to do. What it measured is in its folder."""


def _explain(error: BaseException, config: RunConfig) -> RunError | None:
    """A sentence for the errors of a machine at its limits, which say nothing about this run by themselves."""
    folder = shorten_path(str(config.run_dir))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return RunError(
            f"the disk is full ({error.strerror}: {shorten_path(str(error.filename or folder))}). What was measured is "
            f"in {folder}; free some space and run the same again: it goes on from its last checkpoint."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(out_of_memory(config))
    return None


def _end(run: Run, error: BaseException) -> None:
    """Shut down what the run started, note the error in its folder, and give the folder back."""
    if run.engine is not None:
        engines.shutdown(run.engine)
    stop_workers()
    if run.tracker is not None:
        run.tracker.fail(error)
    locks.release(run.config.run_dir)


# --- Before training -------------------------------------------------------------------------------------------------


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
    check_form(tokenizer, config.model)
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
        log_file=config.run_dir / "run.log",
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


def start(run: Run) -> str:
    """Open the run's folder, load the policy, and start the engine; returns a sentence on how the run begins.

    A stopped run of the same name and settings is taken up where its last checkpoint left it (`resume`).
    """
    config = run.config
    locks.hold(config.run_dir, f"run_name={config.run_name!r}:")
    try:
        check_run_dir(config)  # again: another process may have finished the run meanwhile
        finished = (config.run_dir / "summary.json").exists()  # and to be replaced, whatever checkpoint it kept
        found = checkpoint.latest(config.run_dir) if config.resume and not finished else None
        past = None if found is None else read_past(config, run.batches, found)
        quiet_libraries(run.log_file)
        run.tracker = Tracker(config, describe_environment(config.train_device, config.eval_device), run.sizes, past)
        run.seconds.update(past.seconds if past else {})
    except BaseException:
        locks.release(config.run_dir)
        raise
    torch.manual_seed(config.seed)
    with run.recorded("setup"):
        if config.eval_device != config.train_device:
            run.engine = start_engine(run, run.log_file)  # while the policy is loaded
        with captured(run.log_file):
            run.policy = load_policy(config.model, config.train_device, config.trust_remote_code)
        run.optimizer, run.scheduler = make_optimizer(run.policy, config, len(run.batches))
        checkpoint.remove_partial(config.run_dir)
        if found is not None:
            checkpoint.restore(found, run.policy, run.optimizer, run.scheduler, config.train_device)
        elif config.checkpoint_interval:
            checkpoint.check_space(config.run_dir, run.policy)
    with run.recorded("engine_start"):
        run.engine = run.engine or start_engine(run, run.log_file)
        if config.eval_device != "cpu":
            engines.wait_until_ready(run.engine)
    if config.eval_device != "cpu":
        # The first weights open the way (NCCL) and warm up what proves it: a second that training would wait for later.
        _send_weights(run, prove=True)
    if found is None:
        return "A new run."
    return f"Resumed after step {len(past.metrics)} of {len(run.batches)}, where a stopped run had its last checkpoint."


def start_engine(run: Run, log_file: Path) -> engines.Engine:
    """Begin to start an engine for the run's model, with room for its longest prompt and response."""
    config, reserved = run.config, 0
    if config.eval_device == config.train_device != "cpu":
        reserved = policy_bytes(model_shape(config.model, config.trust_remote_code), config.microbatch_tokens)
    return engines.begin_vllm(
        config.model,
        config.eval_device,
        config.train_device,
        log_file=log_file,
        precision=config.precision,
        seed=config.seed,
        max_model_len=longest_evaluation(run),
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=reserved,
        timeout=config.engine_timeout,
        trust_remote_code=config.trust_remote_code,
    )


# --- Training --------------------------------------------------------------------------------------------------------


def train(run: Run) -> Iterator[dict]:
    """Train step by step: yields the metrics of each step, logged, and with a checkpoint where one is due.

    A resumed run first yields its last step again, because its evaluation may not have been made.
    """
    config, tracker, done = run.config, run.tracker, len(run.tracker.metrics)
    if done:
        yield tracker.metrics[-1]
    data = hash_batches(run.batches)
    cost, last = checkpoint.size(run.policy) / checkpoint.BYTES_PER_SECOND, time.perf_counter()
    models, n = (run.policy, run.optimizer, run.scheduler), run.sizes["selected"]
    for metrics in train_steps(*models, run.batches, config, n, done):
        tracker.log_train(metrics)
        step = metrics["train_step"]
        if config.checkpoint_interval is None:
            affordable = cost <= checkpoint.SHARE_OF_TIME * (time.perf_counter() - last)
            due = step in run.evaluation_steps and affordable
        else:
            due = config.checkpoint_interval > 0 and step % config.checkpoint_interval == 0
        if run.pending is not None and (due or run.pending.results.done()):
            finish_evaluation(run)  # a checkpoint has all evaluations of the weights before it
        if due:
            elapsed = time.time() - tracker.started
            state = {"train_step": step, "seconds": run.seconds, "elapsed": elapsed, "data": data}
            try:
                cost = checkpoint.save(config.run_dir, step, *models, config.train_device, state)
            except OSError as error:
                if config.checkpoint_interval is not None or error.errno not in DISK_FULL:
                    raise
                cost, run.note = math.inf, f"No checkpoint since step {step}: {error.strerror}."
            last = time.perf_counter()
        yield metrics


def evaluation_due(run: Run, step: int) -> bool:
    """Whether the policy is to be evaluated after this step, and was not by a run that this one resumes."""
    return step in run.evaluation_steps and not any(e["train_step"] == step for e in run.tracker.evaluations)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def evaluate_policy(run: Run, position: dict) -> list[dict]:
    """Send the policy's weights to the engine, prove that they arrived, evaluate, and log.

    `position` holds `train_step`, `epoch` and `examples_seen`. At the last step all problems are evaluated (and, by
    `greedy`, once more greedily), and the line of the subset is taken from these records.
    Returns the lines written to `evaluations.jsonl`; none yet with `eval_beside_training`, where training goes on and
    the lines are written once the engine has answered, before it gets other weights.
    """
    finish_evaluation(run)
    config, random_state = run.config, torch.get_rng_state()
    sync = _send_weights(run, prove=config.verify_sync == "always" or not run.proven)
    run.proven = True
    final = position["train_step"] in (0, len(run.batches))
    future = engines.in_background(partial(_generate, run, position["train_step"], final))
    run.pending = Pending(position, sync, future)
    if config.eval_beside_training and not final:
        return []
    lines = finish_evaluation(run)
    torch.set_rng_state(random_state)  # training draws its random numbers as if nothing had been evaluated
    return lines


def _send_weights(run: Run, prove: bool) -> dict:
    """Send the policy's weights to the engine: the seconds that took (`sync`), and its proof or None."""
    with run.recorded("sync"):
        seconds = load_policy_into_vllm_instance(run.policy, run.engine)
        prompts = run.prompts[:: len(run.prompts) // PROOF_PROMPTS or 1]
        return {"sync": seconds, "proof": prove_sync(run.policy, run.engine, prompts) if prove else None}


def finish_evaluation(run: Run) -> list[dict]:
    """Wait for the evaluation that is under way, if there is one, and log it: the lines written."""
    if run.pending is None:
        return []
    pending, config = run.pending, run.config
    with run.recorded("evaluate"):
        results = pending.results.result()
        run.pending = None
    position, final = pending.position, pending.position["train_step"] in (0, len(run.batches))
    parts = []
    for decoding, result in results.items():
        if not config.eval_beside_training or final:  # otherwise the policy has moved on
            shown = [i for i, record in enumerate(result.records) if record["id"] in run.shown_ids]
            evaluation.log_generations(run.policy, result, shown, config.train_device, config.precision)
        settings = {
            **{key: position[key] for key in BASE},
            "decoding": decoding,
            "temperature": config.temperature if decoding == "sampled" else 0.0,
            "top_p": config.top_p if decoding == "sampled" else 1.0,
            "max_new_tokens": config.max_new_tokens,
            "seconds": {"sync": pending.sync["sync"], **result.seconds},
            "sync_proof": pending.sync["proof"],
        }
        if final:
            parts.append((settings | {"split": "full"}, result.records))
        subset = [r for r in result.records if r["id"] in run.subset_ids]
        parts.append((settings | {"split": "subset"}, subset))
    with run.recorded("evaluate"):
        lines = run.tracker.log_evaluation([(s | evaluation.summarize(records), records) for s, records in parts])
        if final and (failed := max(line["failed"] for line in lines)):
            raise RunError(
                f"{failed} of {lines[0]['n']} responses of the evaluation at step {position['train_step']} failed in "
                "the engine; it does not count. Run the same again: it is repeated from the last checkpoint"
            )
    return lines


def _generate(run: Run, step: int, final: bool) -> dict[str, evaluation.Evaluation]:
    """Have the engine answer with the weights that it holds, and grade: decoding -> Evaluation."""
    config = run.config
    chosen = [i for i, p in enumerate(run.problems) if final or p.id in run.subset_ids]
    problems, prompts = [run.problems[i] for i in chosen], [run.prompts[i] for i in chosen]
    samplings = {}
    for _, decoding in evaluation.parts(config.greedy, final):
        samplings[decoding] = engines.Sampling(config.temperature, config.top_p, config.max_new_tokens)
        if decoding == "greedy":
            samplings[decoding] = engines.Sampling(0.0, 1.0, config.max_new_tokens)
    return evaluation.evaluate(run.engine, problems, prompts, samplings, config.seed + step)


# --- The untrained base ----------------------------------------------------------------------------------------------


def evaluate_base(run: Run) -> tuple[list[dict], str]:
    """Evaluate the untrained model, or reuse what an earlier run measured with the same model, data and sampling.

    An untrained base runs most responses to their limit, so this can take longer than the training. Returns the lines
    of `evaluations.jsonl` and a sentence that says which of the two happened.
    """
    if measured := [line for line in run.tracker.evaluations if line["train_step"] == 0]:
        return measured, "Taken from the stopped run that this one goes on with."
    settings = _base_settings(run)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(run.config.runs_dir) / f"base-{key}"
    stored = folder / "evaluations.jsonl"
    if stored.exists() and (folder / "settings.json").exists():
        parts = []
        for line in read_lines(stored):
            elsewhere = {"reused_from": folder.name, "records": f"../{folder.name}/{line['records']}"}
            parts.append((line | elsewhere, None))
        lines = run.tracker.log_evaluation(parts)
        return lines, f"Reused from {shorten_path(str(folder))}, measured by run {read_measured_by(folder)}."
    with run.recorded("base_evaluation"):
        lines = evaluate_policy(run, BASE)
    partial_folder = folder.with_name(f".{folder.name}-{run.config.run_name}")
    shutil.rmtree(partial_folder, ignore_errors=True)
    (partial_folder / "evaluations").mkdir(parents=True)
    for line in lines:
        (partial_folder / line["records"]).write_bytes((run.config.run_dir / line["records"]).read_bytes())
    write_lines(partial_folder / stored.name, lines)
    write_json(partial_folder / "settings.json", settings | {"measured_by": run.config.run_name})
    _publish_base(partial_folder, folder)
    return lines, f"Measured now, and kept in {shorten_path(str(folder))} for later runs."


def _publish_base(partial_folder: Path, folder: Path) -> None:
    """Give a base its name in one step; where a run beside this one was faster, its base stays: it says the same."""
    try:
        partial_folder.rename(folder)
    except OSError:
        if (folder / "settings.json").exists():
            shutil.rmtree(partial_folder)
            return
        shutil.rmtree(folder, ignore_errors=True)  # half of one, which nobody reuses
        partial_folder.rename(folder)


def read_measured_by(folder: Path) -> str:
    return json.loads((folder / "settings.json").read_text(encoding="utf-8"))["measured_by"]


def _base_settings(run: Run) -> dict:
    """All that the base's numbers depend on; the seed is left out, so that runs of several seeds share them."""
    config = run.config
    problems = json.dumps([(p.id, p.problem, p.answer) for p in run.problems]).encode()
    return {
        "model": shorten_path(config.model),
        "weights": _fingerprint(config.model),
        "problems": hashlib.sha256(problems).hexdigest(),
        "subset": hashlib.sha256(json.dumps(sorted(run.subset_ids)).encode()).hexdigest(),
        "template": hashlib.sha256(run.template.text.encode()).hexdigest(),
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
        "greedy": config.greedy,
        "precision": config.precision,
        "device": config.eval_device.split(":")[0],
    }


def _fingerprint(model: str) -> list | None:
    """Sizes and first MiB of a model folder's weight files; None for a hub id, which names its weights."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    marks = []
    for path in files:
        with open(path, "rb") as file:
            marks.append([path.name, path.stat().st_size, hashlib.sha256(file.read(1 << 20)).hexdigest()])
    return marks or None


# --- The end ---------------------------------------------------------------------------------------------------------


def final_evaluation(run: Run) -> dict:
    """The line that counts: all problems, sampled, after the last step."""
    lines = [line for line in run.tracker.evaluations if line["train_step"] == len(run.batches)]
    return next(line for line in lines if (line["split"], line["decoding"]) == ("full", "sampled"))


def finish(run: Run) -> dict:
    """Shut the engine down, keep the model if asked, and write `summary.json`, which marks the run as finished.

    Its checkpoints are deleted then, unless `keep_checkpoint`.
    """
    metrics, final = run.tracker.metrics, final_evaluation(run)
    with run.recorded("shutdown"):
        engines.shutdown(run.engine)
        stop_workers()
        if run.config.keep_model:
            run.policy.save_pretrained(run.config.run_dir / "model")
            run.tokenizer.save_pretrained(run.config.run_dir / "model")
    tokens, train_seconds = sum(m["tokens"] for m in metrics), sum(m["seconds"] for m in metrics)
    with run.recorded("finish"):
        summary = run.tracker.finish(
            {
                "seconds": run.seconds | {"train": train_seconds},
                "train_tokens": tokens,
                "train_tokens_per_second": tokens / train_seconds,
                "train_wait_share": _wait_share(metrics),
                "peak_train_memory_bytes": _peak_memory(run.config.train_device),
                "final_accuracy": final["accuracy"],
                "final_accuracy_low": final["accuracy_low"],
                "final_accuracy_high": final["accuracy_high"],
            }
        )
    if not run.config.keep_checkpoint:
        checkpoint.delete_all(run.config.run_dir)
    locks.release(run.config.run_dir)
    return summary


def _wait_share(metrics: list[dict]) -> float:
    """Share of training's time that passed between two steps; the first, which may compile, is left out."""
    waited, trained = (sum(m.get(key, 0.0) for m in metrics[1:]) for key in ("wait_seconds", "seconds"))
    return waited / (waited + trained) if trained else 0.0


def _peak_memory(device: str) -> int:
    """Most bytes ever allocated by PyTorch on a GPU; on the CPU most resident memory of this process."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)
