"""The course's functions against a second route, and the training path against them: loss and gradients."""

import importlib.util
import json
import math
import shutil
import time
import weakref

import pytest
import torch
import transformers
from conftest import mini_rows
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lib.data import Example, load_examples
from lib.files import UserError
from lib.model_files import check_model
from lib.settings import resolve
from lib.training import checkpoint
from lib.training import policy as policy_module
from lib.training import reference as losses
from lib.training.batching import (
    Sequence,
    encode,
    make_batches,
    make_microbatches,
    number_of_steps,
    pack,
    pad,
    shared_prefix_length,
)
from lib.training.policy import (
    backward,
    forward,
    load_policy,
    load_tokenizer,
    named_weights,
    response_log_probs,
    save_policy,
)
from lib.training.steps import (
    TrainingError,
    check_optimizer,
    evaluation_steps,
    learning_rates,
    make_optimizer,
    set_learning_rate,
    train_steps,
)

PROMPTS, OUTPUTS = ["What is 2 + 3?", "Compute 12."], [" 5", " 12 = 3 \\cdot 4 </answer>"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_prompt_and_output_are_tokenized_apart_and_joined(tokenizer):
    batch = losses.tokenize_prompt_and_output(PROMPTS, OUTPUTS, tokenizer)
    expected = [tokenizer(p)["input_ids"] + tokenizer(o)["input_ids"] for p, o in zip(PROMPTS, OUTPUTS, strict=True)]
    longest = max(map(len, expected))
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(batch, (2, longest - 1))
    for row, (ids, prompt) in enumerate(zip(expected, PROMPTS, strict=True)):
        padded = ids + [tokenizer.pad_token_id] * (longest - len(ids))
        assert batch["input_ids"][row].tolist() == padded[:-1]
        assert batch["labels"][row].tolist() == padded[1:]
        # the mask stands on the labels: the last prompt token predicts the first output token
        first = len(tokenizer(prompt)["input_ids"]) - 1
        assert batch["response_mask"][row].nonzero()[:, 0].tolist() == list(range(first, len(ids) - 1))


def test_entropy_of_known_distributions():
    assert losses.compute_entropy(torch.zeros(3, 5, 8)).allclose(torch.full((3, 5), math.log(8)))
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    assert losses.compute_entropy(logits).item() == pytest.approx(1.5 * math.log(2))
    assert losses.compute_entropy(torch.tensor([1e4, 0.0])).item() == 0  # a naive exp would overflow


def test_masked_normalize_sums_the_mask_and_divides_by_the_constant():
    tensor = torch.arange(6.0).reshape(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert losses.masked_normalize(tensor, mask, 7.0).item() == pytest.approx((0 + 2 + 4 + 5) / 7)
    assert losses.masked_normalize(tensor, mask, 7.0, dim=0).tolist() == pytest.approx([0, 4 / 7, 7 / 7])
    assert losses.masked_normalize(tensor, mask, 7.0, dim=1).tolist() == pytest.approx([2 / 7, 9 / 7])


def test_microbatch_step_equals_cross_entropy_in_loss_and_gradient(model, tokenizer):
    batch = losses.tokenize_prompt_and_output(PROMPTS, OUTPUTS, tokenizer)
    result = losses.get_response_log_probs(model, batch["input_ids"], batch["labels"], return_token_entropy=True)
    loss, _ = losses.sft_microbatch_train_step(result["log_probs"], batch["response_mask"], 3, 5.0)
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    logits = model(batch["input_ids"]).logits
    labels = batch["labels"].masked_fill(~batch["response_mask"], -100)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (5.0 * 2 * 3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(result["token_entropy"], entropy, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def sequences(tokenizer):
    """Ten traces of uneven lengths whose prompts begin with the same tokens."""
    rows = mini_rows("sft.jsonl", 10)
    examples = [Example(f"sft/{i}", row["prompt"], row["response"], None, "") for i, row in enumerate(rows)]
    return encode(examples, tokenizer, 512)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_packed_sequences_equal_the_reference(tiny_model, tokenizer, sequences, share_prefix):
    """Log-probs, entropies and gradients, every token with a weight of its own: none may see another sequence, lose
    a gradient in the prefix that all share, or stand at another position."""
    prefix = shared_prefix_length(sequences) if share_prefix else 0
    assert prefix > 90 or not share_prefix
    policy = load_policy(str(tiny_model), "cpu")
    log_probs, entropy = response_log_probs(policy, pack(sequences, prefix))
    weights = torch.arange(len(log_probs)) / len(log_probs)
    (log_probs * weights).sum().backward()

    reference = load_reference(tiny_model)
    batch = pad(sequences, tokenizer.pad_token_id)
    result = losses.get_response_log_probs(reference, batch["input_ids"], batch["labels"], return_token_entropy=True)
    expected = result["log_probs"][batch["response_mask"]]
    (expected * weights).sum().backward()
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, result["token_entropy"][batch["response_mask"]], rtol=1e-4, atol=1e-4)
    assert_same_gradients(policy, reference)


def load_reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_gradients(policy, reference):
    expected = dict(reference.named_parameters())
    for name, ours in policy.named_parameters():
        largest = expected[name].grad.abs().max().item()
        torch.testing.assert_close(ours.grad, expected[name].grad, rtol=1e-3, atol=1e-4 * largest)


def test_logits_made_part_by_part_have_the_same_gradients(tiny_model, tokenizer, sequences, monkeypatch):
    vocabulary = len(tokenizer)
    monkeypatch.setattr(policy_module, "LOGITS_AT_ONCE", 7 * vocabulary)  # seven tokens at a time
    policy, reference = load_policy(str(tiny_model), "cpu"), load_reference(tiny_model)
    for microbatch in make_microbatches(sequences, 600):
        backward(policy, forward(policy, microbatch, "fp32"), microbatch, 50.0, "fp32")
    batch = pad(sequences, tokenizer.pad_token_id)
    result = losses.get_response_log_probs(reference, batch["input_ids"], batch["labels"])
    (-losses.masked_normalize(result["log_probs"], batch["response_mask"], 50.0)).backward()
    assert_same_gradients(policy, reference)


def test_bf16_copies_of_the_weights_do_not_gather(tiny_model, sequences):
    """torch's cache would keep one of every weight until the forward pass ends: 3 GB of 24 at 1.5 B parameters."""
    policy, alive = load_policy(tiny_model, "cpu"), []
    copies = weakref.WeakSet()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            made = call(*args, **(kwargs or {}))
            if call is torch.ops.aten._to_copy.default and made.dtype is torch.bfloat16 and args[0].ndim == 2:
                copies.add(made)
                alive.append(len(copies))
            return made

    with torch.no_grad(), Watch(), policy_module.autocast("cpu", "bf16"):
        response_log_probs(policy, pack(sequences[:2]))
    assert len(alive) > 10 and max(alive) <= 4


def test_attention_that_is_more_than_causal_is_refused(tiny_model, sequences):
    """Left out in silence, a window or a dropout would make training one of another model."""
    policy, microbatch = load_policy(str(tiny_model), "cpu"), pack(sequences[:2])
    layer = policy.get_decoder().layers[0].self_attn
    layer.sliding_window = microbatch.packing.longest_key  # wide enough to change nothing
    response_log_probs(policy, microbatch)
    layer.sliding_window = 16
    with pytest.raises(UserError, match="model: its attention has sliding_window"):
        response_log_probs(policy, microbatch)


@pytest.mark.parametrize("architecture", ["GraniteConfig", "StableLmConfig"])
def test_an_architecture_that_packing_would_change_is_refused(tokenizer, tmp_path, architecture):
    """Granite scales its logits outside of the decoder; StableLM's layers don't hand `packing` on to attention."""
    torch.manual_seed(0)
    own = {"logits_scaling": 8.0} if architecture == "GraniteConfig" else {}
    config = getattr(transformers, architecture)(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, **own,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't be trained on packed sequences"):
        load_policy(str(tmp_path), "cpu")


def test_prompts_without_a_common_beginning_share_nothing(sequences):
    same = Sequence("a", list(range(40)), 30)
    assert shared_prefix_length([same, same]) == 29  # the last prompt token predicts the first of the response
    assert shared_prefix_length([same]) == 0  # one sequence has nothing to share with
    other = Sequence("b", [*range(10), 99, *range(11, 40)], 30)
    assert shared_prefix_length([same, other]) == 0  # too short to pay


@pytest.fixture
def config(parameters):
    settings = {"precision": "fp32", "learning_rate": 1e-3, "epochs": 2, "batch_size": 6, "microbatch_tokens": 500}
    return resolve(parameters | settings)


def train(config, data_dir, model_folder, n=10):
    tokenizer = load_tokenizer(str(model_folder))
    sequences = encode(load_examples(data_dir)[0][:n], tokenizer, config.max_length)
    batches = make_batches(sequences, config.batch_size, config.epochs, config.max_steps, config.seed)
    policy = load_policy(str(model_folder), "cpu")
    return policy, batches, list(steps_of(policy, batches, config, n))


def steps_of(policy, batches, config, n, **others):
    """`train_steps` by the settings of a run."""
    optimizer = make_optimizer(policy, config.weight_decay)
    return train_steps(policy, optimizer, batches, config.optimization, n, **others)


def test_a_step_equals_the_course_functions(config, data_dir, tiny_model):
    """Loss, gradient norm and entropy of the first step, recomputed with the course's functions over one padded batch.

    Guards against a mean of microbatch means: the loss is normalized over all response tokens of the batch.
    """
    _, batches, metrics = train(config, data_dir, tiny_model)
    tokenizer, model = load_tokenizer(str(tiny_model)), load_reference(tiny_model)
    batch = pad(batches[0], tokenizer.pad_token_id)
    result = losses.get_response_log_probs(model, batch["input_ids"], batch["labels"], return_token_entropy=True)
    tokens = batch["response_mask"].sum()
    loss, _ = losses.sft_microbatch_train_step(
        result["log_probs"], batch["response_mask"], 1, normalize_constant=tokens / len(batches[0])
    )
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert metrics[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    entropy = losses.masked_normalize(result["token_entropy"], batch["response_mask"], tokens)
    assert metrics[0]["token_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    assert metrics[0]["response_tokens"] == tokens
    written = [repr(value) for row in metrics for value in row.values() if isinstance(value, float)]
    assert max(len(text.partition("e")[0].replace(".", "").strip("0")) for text in written) == 9  # digits


def test_the_cut_into_microbatches_changes_nothing(config, data_dir, tiny_model, parameters):
    whole = resolve(parameters | {**config.to_dict(), "microbatch_tokens": 10_000})
    single = resolve(parameters | {**config.to_dict(), "microbatch_tokens": 1})
    curves = [[m["loss"] for m in train(c, data_dir, tiny_model)[2]] for c in (config, whole, single)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_the_same_seed_gives_the_same_curve_and_another_does_not(config, data_dir, tiny_model, parameters):
    first, again = (train(config, data_dir, tiny_model)[2] for _ in range(2))
    assert [m["loss"] for m in first] == [m["loss"] for m in again]
    other = train(resolve(parameters | {**config.to_dict(), "seed": 1}), data_dir, tiny_model)[2]
    assert [m["loss"] for m in first] != [m["loss"] for m in other]


def test_training_learns_and_the_schedule_ends_near_zero(parameters, data_dir, tiny_model):
    config = resolve(parameters | {"precision": "fp32", "learning_rate": 5e-3, "epochs": 15, "batch_size": 5})
    _, _, metrics = train(config, data_dir, tiny_model)
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    rates = [m["learning_rate"] for m in metrics]
    assert max(rates) == pytest.approx(5e-3, rel=0.05) and rates[0] > 0 and rates[-1] < 0.05 * max(rates)
    assert metrics[-1]["examples_seen"] == 150 and metrics[-1]["epoch"] == 15


def test_what_training_waits_between_two_steps_is_counted_apart(config, data_dir, tiny_model):
    tokenizer, policy = load_tokenizer(str(tiny_model)), load_policy(str(tiny_model), "cpu")
    sequences = encode(load_examples(data_dir)[0][:6], tokenizer, 512)
    metrics = []
    for step in steps_of(policy, [sequences] * 3, config, 6):
        metrics.append(step)
        time.sleep(0.5 if len(metrics) == 1 else 0)
    assert metrics[0]["wait_seconds"] == 0 and 0.5 <= metrics[1]["wait_seconds"] < 0.7
    assert metrics[2]["wait_seconds"] < 0.1


def test_a_loss_that_is_not_finite_stops_before_the_update(config, data_dir, tiny_model):
    tokenizer, policy = load_tokenizer(str(tiny_model)), load_policy(str(tiny_model), "cpu")
    sequences = encode(load_examples(data_dir)[0][:6], tokenizer, 512)
    with torch.no_grad():
        policy.model.norm.weight[0] = float("nan")
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*sft/\d+"):
        list(steps_of(policy, [sequences], config, 6))
    for old, new in zip(before, policy.parameters(), strict=True):
        torch.testing.assert_close(old, new, equal_nan=True)


def test_the_schedule_is_that_of_torch():
    """A second route: torch's own linear and cosine schedules, one after the other."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 4, 1.0, 3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17)
    schedule, expected = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [3]), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert learning_rates(20, 0.3, warmup_ratio=0.11) == pytest.approx(expected)
    assert learning_rates(1, 0.3) == [0.3] and len(learning_rates(3, 0.3, warmup_ratio=1.0)) == 3


def test_the_benchmark_can_replace_backward_and_cut(config, data_dir, tiny_model):
    """A step calls what it is given, once for each microbatch of the given cut, with the states and the constant."""
    tokenizer, policy = load_tokenizer(str(tiny_model)), load_policy(str(tiny_model), "cpu")
    sequences = encode(load_examples(data_dir)[0][:6], tokenizer, 512)
    seen = []

    def spy(policy, states, microbatch, constant, precision):
        seen.append((states.shape[0], microbatch.input_ids.numel(), constant))
        return backward(policy, states, microbatch, constant, precision)

    def one_each(batch, microbatch_tokens):
        return [pack([sequence]) for sequence in batch]

    (ours,) = steps_of(policy, [sequences], config, 6, backward=spy, cut=one_each)
    tokens = sum(s.response_length for s in sequences)
    assert seen == [(len(s.token_ids) - 1, len(s.token_ids) - 1, tokens) for s in sequences]
    (usual,) = steps_of(load_policy(str(tiny_model), "cpu"), [sequences], config, 6)
    assert ours["loss"] == pytest.approx(usual["loss"], rel=1e-5)


def test_batches_cover_every_example_once_an_epoch(config, data_dir, tokenizer):
    sequences = encode(load_examples(data_dir)[0][:10], tokenizer, 512)
    batches = make_batches(sequences, batch_size=4, epochs=3, max_steps=None, seed=0)
    assert [len(b) for b in batches] == [4] * 7 + [2] and len(batches) == number_of_steps(10, 4, 3)
    order = [s.id for batch in batches for s in batch]
    assert all(len(set(order[i : i + 10])) == 10 for i in (0, 10, 20))
    assert len(make_batches(sequences, 4, 3, 5, 0)) == 5
    assert sum(len(b) for b in make_batches(sequences, 4, 0.5, None, 0)) == 5


def test_microbatches_hold_the_batch_within_their_budget(sequences):
    microbatches = make_microbatches(sequences, 600)
    lengths = [int(m.packing.query_starts[-1]) for m in microbatches]
    responses = sum(s.response_length for s in sequences)
    assert len(microbatches) > 2 and sum(len(m.labels) for m in microbatches) == responses
    prefix = microbatches[0].packing.prefix
    assert sum(length - prefix for length in lengths) == sum(len(s.token_ids) - 1 - prefix for s in sequences)
    packed = [len(m.packing.query_starts) - 2 for m in microbatches]  # sequences: segments without the prefix
    assert sum(packed) == 10
    whole = [length + (n - 1) * prefix + n for length, n in zip(lengths, packed, strict=True)]  # tokens of the examples
    assert max(whole) <= 600 and min(whole) > 300  # of about equal size
    assert len(make_microbatches(sequences, 1)) == 10  # a sequence longer than the budget stands alone
    assert len(make_microbatches(sequences, 10_000)) == 1


def test_the_end_of_sequence_is_learned_once(data_dir, tokenizer):
    example = load_examples(data_dir)[0][0]
    eos = tokenizer.eos_token_id
    (plain,) = encode([example], tokenizer, 512)
    (marked,) = encode(
        [type(example)(**{**vars(example), "response": example.response + tokenizer.eos_token})], tokenizer, 512
    )
    assert plain.token_ids == marked.token_ids and plain.token_ids.count(eos) == 1 and plain.token_ids[-1] == eos
    assert pack([plain]).labels.tolist() == plain.token_ids[plain.prompt_length :]


def test_too_long_examples_are_an_error_not_cut(data_dir, tokenizer):
    with pytest.raises(UserError, match=r"max_length=50: 10 of 10 examples are longer \(first: sft/1"):
        encode(load_examples(data_dir)[0][:10], tokenizer, 50)


@pytest.mark.parametrize("changed", [{"max_steps": 1}, {"warmup_ratio": 1.0}, {"epochs": 0.01}])
def test_the_shortest_runs_train(parameters, data_dir, tiny_model, changed):
    config = resolve(parameters | changed)
    sequences = encode(load_examples(data_dir)[0], load_tokenizer(str(tiny_model)), 512)[:16]
    batches = make_batches(sequences, config.batch_size, config.epochs, config.max_steps, seed=0)
    policy = load_policy(str(tiny_model), "cpu")
    assert len(list(steps_of(policy, batches, config, 16))) == len(batches) >= 1


def test_evaluation_steps():
    assert evaluation_steps(10, 4) == {4, 8, 10}
    assert evaluation_steps(3, 4) == {3} and evaluation_steps(8, 4) == {4, 8}


def test_evaluations_lie_close_where_most_is_learned():
    assert evaluation_steps(1000, None) == {50, 100, 200, 400, 700, 1000}
    assert evaluation_steps(127, None) == {6, 13, 25, 51, 89, 127}
    assert evaluation_steps(10, None) == {1, 2, 4, 7, 10}
    for total in range(1, 400):
        steps = evaluation_steps(total, None)
        assert len(steps) >= min(5, total) and max(steps) == total and min(steps) <= 1 + total / 20


def test_weights_are_named_once_without_compile_prefix(model):
    plain = dict(named_weights(model))
    assert "lm_head.weight" not in plain  # tied: sending it twice breaks the engine's reload
    assert sum(p.numel() for p in plain.values()) == model.num_parameters()
    assert list(dict(named_weights(torch.compile(model)))) == list(plain)


# --- Small cards -----------------------------------------------------------------------------------------------------


def test_recomputed_layers_give_the_same_loss_and_gradients(tiny_model, monkeypatch):
    tokenizer, seen = load_tokenizer(str(tiny_model)), []
    examples = [Example(f"e{i}", "What is " + "1 + " * i + "1?", f" It is {i}.", None, "") for i in range(1, 7)]
    sequences = encode(examples, tokenizer, 512)
    for recompute in (False, True):
        policy, calls = load_policy(str(tiny_model), "cpu", recompute=recompute), []
        policy.get_decoder().layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        sums = []
        for microbatch in make_microbatches(sequences, 60):
            sums.append(backward(policy, forward(policy, microbatch, "bf16"), microbatch, 10.0, "bf16"))
        seen.append((torch.tensor(sums), [p.grad for p in policy.parameters()], len(calls)))
    (sums, gradients, once), (again, same, twice) = seen
    assert twice == 2 * once > 2
    torch.testing.assert_close(sums, again, rtol=0, atol=0)
    for ours, expected in zip(same, gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def small_steps(policy, tokenizer, kind: str, learning_rate: float, steps: int = 6):
    optimizer = make_optimizer(policy, kind=kind)
    (microbatch,) = make_microbatches(encode([Example("e", "What is 1 + 1?", " 2.", None, "")], tokenizer, 99), 99)
    for _ in range(steps):
        backward(policy, forward(policy, microbatch, "bf16"), microbatch, 1.0, "bf16")
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_moments_of_8_bits_train_as_whole_ones_at_the_smallest_rate(tiny_model):
    """At 3e-6 each weight moves, by about what AdamW moves it; one rounded to bf16 would have stayed where it was."""
    pytest.importorskip("torchao")
    tokenizer, moved = load_tokenizer(str(tiny_model)), {}
    for kind in ("adamw", "adamw8bit"):
        policy = load_policy(str(tiny_model), "cpu")
        before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
        small_steps(policy, tokenizer, kind, 3e-6)
        after = torch.cat([p.detach().flatten() for p in policy.parameters()])
        moved[kind] = after - before
    assert torch.cosine_similarity(moved["adamw"], moved["adamw8bit"], dim=0) > 0.97
    assert moved["adamw8bit"].norm().item() == pytest.approx(moved["adamw"].norm().item(), rel=0.1)
    lost = (after.bfloat16() == before.bfloat16()) & (moved["adamw8bit"] != 0)
    assert lost.float().mean() > 0.5


def test_a_checkpoint_keeps_moments_of_8_bits(tiny_model, tmp_path):
    pytest.importorskip("torchao")
    tokenizer, policy = load_tokenizer(str(tiny_model)), load_policy(str(tiny_model), "cpu")
    optimizer = small_steps(policy, tokenizer, "adamw8bit", 1e-3)
    checkpoint.save(tmp_path, 6, policy, optimizer, {})
    other = load_policy(str(tiny_model), "cpu")
    with pytest.raises(UserError, match="optimizer='adamw8bit'"):
        checkpoint.restore(checkpoint.latest(tmp_path), other, make_optimizer(other))
    restored = make_optimizer(other, kind="adamw8bit")
    checkpoint.restore(checkpoint.latest(tmp_path), other, restored)
    states, others = (o.state_dict()["state"] for o in (optimizer, restored))
    assert states.keys() == others.keys()
    for index, expected in states.items():
        for name, tensor in expected.items():
            assert type(others[index][name]) is type(tensor)
            for part in ("codes", "scale") if hasattr(tensor, "codes") else ("data",):
                torch.testing.assert_close(*(getattr(s[index][name], part) for s in (others, states)), rtol=0, atol=0)
    assert any(hasattr(values["exp_avg"], "codes") for values in states.values())


@pytest.mark.parametrize("generation", [{"temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "top_k": 5}, {}])
def test_a_trained_model_is_kept_whatever_its_generation_config_says(generation, tiny_model, tokenizer, tmp_path):
    """transformers reads a temperature without do_sample and refuses to write it: that must not cost the run."""
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [0, 1]}))
    policy = load_policy(str(tmp_path / "base"), "cpu")
    save_policy(policy, tokenizer, tmp_path / "model")
    check_model(str(tmp_path / "model"), None, False)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [0, 1]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer("adamw")
    with pytest.raises(UserError, match=r"optimizer='adamw8bit'.* torchao is not installed; pip install"):
        check_optimizer("adamw8bit")


def test_many_epochs_cost_no_more_than_the_steps_that_are_taken():
    sequences = [Sequence(str(i), [1, 2, 3], 1) for i in range(16)]
    few = make_batches(sequences, 8, 3, 5, seed=0)
    assert make_batches(sequences, 8, 1e300, 5, seed=0) == make_batches(sequences, 8, 1_000_000, 5, seed=0) == few
    with pytest.raises(UserError, match=r"epochs=1e\+09: a run may see 10,000,000 examples, not 16,000,000,000"):
        make_batches(sequences, 8, 1e9, None, seed=0)
