"""Real vLLM on the CPU: the engine holds the weights that were sent, and forgets what it computed with the old ones."""

import math
import threading
import time
from collections import deque

import pytest
import torch

from lib.data import Problem, Template, load_examples, load_problems
from lib.evaluation import engine as engines
from lib.evaluation import worker
from lib.evaluation.engine import EngineError, Sampling, generate
from lib.evaluation.evaluate import encode_prompts, evaluate, log_generations
from lib.evaluation.weights import load_policy_into_vllm_instance, prove_sync
from lib.grading import stop_workers
from lib.training.policy import load_policy, load_tokenizer


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("log") / "engine.log"
    threads = torch.get_num_threads()
    engine = engines.init_vllm(
        str(tiny_model), "cpu", "cpu", log_file=log_file, precision="fp32", seed=0, max_model_len=512
    )
    assert torch.get_num_threads() == threads  # vLLM binds the process to one core and keeps another back
    torch.set_num_threads(threads)
    yield engine
    engines.shutdown(engine)
    engines.shutdown(engine)  # twice is fine
    stop_workers()


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), "cpu")


@pytest.fixture
def prompts(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    # Longer than two blocks of the key/value cache, so that the prefix cache holds something.
    return [tokenizer(f"Find the sum of {i} and {i + 1}. " * 32)["input_ids"][:300] for i in range(4)]


def perturb(policy, seed, which=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if which in name:
                p += 0.3 * p.std() * torch.randn(p.shape, generator=generator)


def reference(policy, prompt, new_tokens):
    output = policy.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("which", ["", "embed_tokens", "layers.1.self_attn", "layers.0.mlp", "norm"])
def test_the_engine_generates_what_the_policy_generates(engine, policy, prompts, which):
    """Each kind of weight arrives. Guards against a tied output projection that keeps the old embedding."""
    perturb(policy, seed=1, which=which)
    load_policy_into_vllm_instance(policy, engine)
    proof = prove_sync(policy, engine, prompts)
    assert proof["mean_abs_difference"] < 1e-4 and proof["tokens"] > 0
    for prompt, (generation,) in zip(prompts, generate(engine, prompts, Sampling(0.0, 1.0, 12)), strict=True):
        expected = reference(policy, prompt, 12)
        assert generation.token_ids == expected[: len(generation.token_ids)]


def test_weights_that_were_not_sent_are_found_out(engine, policy, prompts):
    load_policy_into_vllm_instance(policy, engine)
    perturb(policy, seed=2)
    with pytest.raises(EngineError, match="does not hold the policy's weights"):
        prove_sync(policy, engine, prompts)


def test_a_policy_that_has_diverged_is_not_taken_for_a_failed_sync(engine, policy, prompts):
    norm = policy.get_decoder().norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
        with pytest.raises(EngineError, match="log-probabilities are no numbers any more; a lower learning_rate"):
            prove_sync(policy, engine, prompts)
        norm.copy_(kept)


def test_a_stale_prefix_cache_is_found_out(engine, policy, prompts, monkeypatch):
    """vLLM keeps key/value blocks over a weight update: without the reset the old policy answers in part."""
    load_policy_into_vllm_instance(policy, engine)
    generate(engine, prompts, Sampling(0.0, 1.0, 4))  # fills the cache with blocks of these weights
    perturb(policy, seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(engine.replicas[0].server.llm, "reset_prefix_cache", lambda: True)
        load_policy_into_vllm_instance(policy, engine)
        with pytest.raises(EngineError, match="does not hold the policy's weights"):
            prove_sync(policy, engine, prompts)
    load_policy_into_vllm_instance(policy, engine)
    prove_sync(policy, engine, prompts)


def test_sampling_hangs_on_the_seed(engine, policy, prompts):
    load_policy_into_vllm_instance(policy, engine)
    first, again, other = ([g.token_ids for (g,) in generate(engine, prompts, Sampling(), seed=s)] for s in (5, 5, 6))
    assert first == again != other


def test_places_are_refilled_in_waves_and_the_answers_are_the_same(engine, policy, prompts, monkeypatch):
    load_policy_into_vllm_instance(policy, engine)
    questions = [prompts[0][:length] for length in range(20, 60)]
    asked = Sampling(0.0, 1.0, 12)
    together, take, seen = generate(engine, questions, asked), worker.next_wave, []

    def take_beside(waiting, running, _places):
        wave = take(waiting, running, 8)
        seen.append((running, len(wave)))
        return wave

    monkeypatch.setattr(worker, "next_wave", take_beside)
    monkeypatch.setattr(worker, "WAVE", 0.5)
    in_waves = generate(engine, questions, asked)
    assert [g.token_ids for (g,) in in_waves] == [g.token_ids for (g,) in together]
    assert sum(new for _, new in seen) == 40 and all(running + new <= 8 for running, new in seen)
    assert all(running <= 4 for running, new in seen if new)


def test_a_wave_waits_for_its_share_of_the_places():
    def requests(count, samples=1):
        return deque([([number], Sampling(samples=samples), 0) for number in range(count)])

    waiting = requests(100)
    assert len(worker.next_wave(waiting, 0, 64)) == 64 and len(waiting) == 36
    assert worker.next_wave(waiting, 57, 64) == []  # an eighth of the places is not free yet
    assert [prompt for prompt, _, _ in worker.next_wave(waiting, 56, 64)] == [[n] for n in range(64, 72)]
    assert len(worker.next_wave(waiting, 0, math.inf)) == 28 and not waiting
    assert len(worker.next_wave(requests(9, samples=3), 0, 8)) == 2
    assert len(worker.next_wave(requests(2, samples=12), 0, 8)) == 1  # more than there are places, and nothing runs
    assert worker.next_wave(requests(2, samples=12), 1, 8) == []


def test_samples_of_a_problem_differ(engine, policy, prompts):
    load_policy_into_vllm_instance(policy, engine)
    answers = generate(engine, prompts, Sampling(1.0, 1.0, 12, samples=3), seed=5)
    assert [len(samples) for samples in answers] == [3] * len(prompts)
    assert all(len({tuple(g.token_ids) for g in samples}) == 3 for samples in answers)


def test_the_stop_string_ends_a_response_and_is_kept(engine, policy, tiny_model, monkeypatch):
    """vLLM drops it by default, and then no response has the form."""
    tokenizer = load_tokenizer(str(tiny_model))
    load_policy_into_vllm_instance(policy, engine)
    prompt = tokenizer("Which number? ")["input_ids"]
    ((whole,),) = generate(engine, [prompt], Sampling(0.0, 1.0, 40))
    assert whole.finish_reason == "length" and len(whole.token_ids) == 40
    # A random model never says </answer>: stop at something that it does say.
    stop = tokenizer.decode(whole.token_ids[:8])[-3:]
    monkeypatch.setattr(worker, "STOP", stop)
    ((stopped,),) = generate(engine, [prompt], Sampling(0.0, 1.0, 40))
    assert stopped.finish_reason == "stop" and stopped.text.endswith(stop)
    assert whole.text.startswith(stopped.text) and len(stopped.token_ids) <= 8


def test_the_end_of_sequence_is_no_text(engine, tiny_model):
    """Special tokens are kept in the text, but for the one that ends it: it would stand behind every answer."""
    tokenizer = load_tokenizer(str(tiny_model))
    (responses,) = generate(engine, [tokenizer("Add.")["input_ids"]], Sampling(2.0, 1.0, 300, samples=32))
    ended = [response for response in responses if response.token_ids[-1] == tokenizer.eos_token_id]
    assert ended and all(response.finish_reason == "stop" for response in ended)
    assert [response.text for response in ended] == [tokenizer.decode(response.token_ids[:-1]) for response in ended]


def test_an_evaluation_gives_a_record_a_response(engine, policy, tiny_model, data_dir):
    tokenizer = load_tokenizer(str(tiny_model))
    load_policy_into_vllm_instance(policy, engine)
    template = load_examples(data_dir)[1]
    problems = load_problems(data_dir / "validation.jsonl")[:6]
    prompts = encode_prompts(problems, template, tokenizer)
    samplings = {"sampled": Sampling(1.0, 1.0, 10, samples=2), "greedy": Sampling(0.0, 1.0, 10)}
    results = evaluate(engine, problems, prompts, samplings, seed=1)
    assert [(r["id"], r["sample"]) for r in results["sampled"].records] == [(p.id, k) for p in problems for k in (0, 1)]
    assert [(r["id"], r["sample"]) for r in results["greedy"].records] == [(p.id, 0) for p in problems]
    # One decoding does not change what another draws.
    alone = evaluate(engine, problems, prompts, {"sampled": samplings["sampled"]}, seed=1)["sampled"]
    assert alone.records == results["sampled"].records
    result = results["greedy"]
    assert all(
        r["verdict"] == "truncated" and r["tokens"] == 10 for r in result.records if r["finish_reason"] == "length"
    )
    shown = log_generations(policy, result, [1, 4], "cpu", "fp32")
    assert [r["id"] for r in shown] == [problems[1].id, problems[4].id]
    # second route: the entropy of the policy's own distributions, position by position
    ids = torch.tensor([prompts[1] + result.generations[1].token_ids])
    logits = policy(ids).logits[0, len(prompts[1]) - 1 : -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert shown[0]["token_entropy"] == pytest.approx(entropy, rel=1e-3)
    assert result.records[0]["token_entropy"] is None


def test_prompts_of_an_evaluation_are_those_of_training(tiny_model, data_dir):
    tokenizer = load_tokenizer(str(tiny_model))
    examples, template = load_examples(data_dir)
    problem = Problem("x", examples[0].problem, "1", "Level 1", "Algebra")
    expected = tokenizer(examples[0].prompt, add_special_tokens=False)["input_ids"]
    assert encode_prompts([problem], template, tokenizer) == [expected]
    assert Template("t", "a{question}b").question_in("a{question}b") == "{question}"


# --- An engine that fails in this process. test_processes.py has those with processes of their own.


def test_an_error_in_the_engine_comes_through_with_its_reason(engine):
    with pytest.raises(EngineError, match=r"AttributeError: .*no_such_call"):
        engine.replicas[0].call("no_such_call")


def test_an_engine_without_a_sign_of_life_counts_as_hung(engine, prompts, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(engine.replicas[0].server.llm.llm_engine, "step", lambda: [stop.wait()] * 0)
    monkeypatch.setattr(engine.replicas[0], "timeout", 0.5)
    with pytest.raises(EngineError, match=r"no sign of life for .*engine_timeout=0.5"):
        generate(engine, prompts, Sampling())
    monkeypatch.undo()
    stop.set()
    assert len(engine.replicas[0].result()) == len(prompts)  # it answers after all, and can be asked again


def test_a_slow_engine_that_goes_on_does_not(engine, prompts, monkeypatch):
    real_engine, steps = engine.replicas[0].server.llm.llm_engine, []
    step = real_engine.step

    def slow_step():
        steps.append(time.sleep(1.1))
        return step()

    monkeypatch.setattr(real_engine, "step", slow_step)
    monkeypatch.setattr(engine.replicas[0], "timeout", 2.0)
    generate(engine, prompts[:1], Sampling(0.0, 1.0, 4))
    assert len(steps) >= 4  # longer than the time-out as a whole


def test_an_engine_that_can_not_start_says_why(tiny_model, tmp_path):
    """vLLM hides the cause behind 'Engine core initialization failed'."""
    settings = {"log_file": tmp_path / "engine.log", "precision": "fp32", "max_model_len": 100_000}
    with pytest.raises(EngineError, match=r"vLLM did not start on cpu: .*max_model_len \(100000\) is greater than"):
        engines.init_vllm(str(tiny_model), "cpu", "cpu", **settings)
