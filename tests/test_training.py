"""The training loop: gradients are plain PEFT's, runs are deterministic, a killed run resumes to the same bits."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from calora.adapters.lora import inject, lora_config, lora_state, set_active
from calora.common.batching import epoch_batches, equal_length_batches, length_batches
from calora.common.divergence import divergence
from calora.common.files import whole_directory
from calora.common.progress import progress
from calora.distillation.distill import finetune, trainable
from calora.distillation.loss import hidden_distance, task_loss
from calora.distillation.targets import Targets, write_targets
from calora.distillation.training import Checkpoint, MasterWeights, Schedule, train
from calora.errors import CaloraError
from calora.evaluation.predict import predict, score
from calora.models.families import DecoderOnly, family_of
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from tests.conftest import TASK, make_model, toy_rows

SCHEDULE = Schedule(steps=8, lr=5e-3, warmup=2, clip=1.0, eval_every=4, checkpoint_seconds=0.0)


def randomised(model):
    """B is zero at first, and so would be A's gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_gradients_equal_plain_peft_in_fp32(llama32):
    tokenizer = load_tokenizer(llama32)
    examples = encode_all(TASK, tokenizer, toy_rows(6, 3))
    ours = load_model(llama32, torch.float32, attention="eager")
    inject(ours, lora_config(4, 2, ["q_proj", "k_proj"]))
    randomised(ours)
    weights = MasterWeights(trainable(ours), torch.float32)
    family = family_of(ours)
    batch = family.collate(examples, ours)
    task_loss(family.forward(ours, batch, None), batch).backward()

    plain = load_model(llama32, torch.float32)
    theirs = get_peft_model(plain, LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "k_proj"]))
    randomised(plain)
    texts = [e.prompt_ids + e.answer_ids for e in examples]
    width = max(map(len, texts))
    ids = torch.tensor([t + [0] * (width - len(t)) for t in texts])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
    labels = torch.tensor(
        [[-100] * len(e.prompt_ids) + e.answer_ids + [-100] * (width - len(e.prompt_ids) - 1) for e in examples]
    )
    theirs(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    reference = torch.cat([p.grad.flatten() for p in trainable(plain)])
    assert float((weights.working_grad - reference).norm() / reference.norm()) < 1e-5


def run(llama, checkpoint=None, stop_at=None):
    tokenizer = load_tokenizer(llama)
    examples = encode_all(TASK, tokenizer, toy_rows(24, 1))
    model = load_model(llama, torch.bfloat16, attention="eager")
    seen = []

    def looked():
        if stop_at is not None and len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(1)
        return score(model, TASK, tokenizer, examples, 8)

    config = lora_config(4, 2, ["q_proj", "k_proj"])
    adapter, history = finetune(
        model, config, examples, looked, batch_size=4, schedule=SCHEDULE, seed=0, checkpoint=checkpoint
    )
    return adapter.lora, history


def test_a_killed_run_resumes_to_the_same_bits(llama, tmp_path):
    whole, history = run(llama)
    saved = Checkpoint(tmp_path / "c", "key")
    with pytest.raises(KeyboardInterrupt):
        run(llama, saved, stop_at=2)  # during the evaluation at the last step
    assert saved.read()[0] == 7
    resumed, again = run(llama, saved)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert history.losses == again.losses
    assert Checkpoint(tmp_path / "c", "another key").read() is None
    saved.path.write_bytes(saved.path.read_bytes()[:-9])
    assert saved.read() is None  # a broken checkpoint starts the run anew


def test_a_kill_after_the_first_evaluation_does_not_cost_it(tmp_path):
    def killed(step):
        raise KeyboardInterrupt

    def loss(step):
        yield {"loss": (parameter * torch.arange(1.0, 4.0)).sum()}, 3

    def scored():
        scores.append(1)
        return 0.5

    scores, schedule = [], Schedule(2, 1e-2, 1, 1.0, eval_every=2, checkpoint_seconds=0.0)
    parameter, saved = torch.nn.Parameter(torch.ones(3)), Checkpoint(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        train([parameter], killed, scored, schedule, torch.float32, saved)
    history = train([parameter], loss, scored, schedule, torch.float32, saved)
    assert [row["step"] for row in history.scores] == [0, 2] and len(scores) == 2
    other = torch.nn.Parameter(torch.ones(3))
    never = Schedule(2, 1e-2, 1, 1.0, eval_every=2, checkpoint_seconds=60.0)
    with pytest.raises(KeyboardInterrupt):
        train([other], killed, scored, never, torch.float32, Checkpoint(tmp_path / "quick", "key"))
    assert not (tmp_path / "quick").exists()  # a quick evaluation is cheaper than a checkpoint


class NaNBackward(torch.autograd.Function):
    """The sum, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return torch.full((3,), float("nan"))


def test_a_gradient_that_is_not_finite_is_an_error():
    parameter, schedule = torch.nn.Parameter(torch.ones(3)), Schedule(2, 1e-2, 1, 1.0, 0, 60.0)
    with pytest.raises(CaloraError, match="toy, step 0: expected a finite gradient"):
        train(
            [parameter],
            lambda step: [({"loss": NaNBackward.apply(parameter)}, 3)],
            lambda: 0.0,
            schedule,
            torch.float32,
            title="toy",
        )
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_training_is_deterministic(llama):
    (first, _), (second, _) = run(llama), run(llama)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_converges(llama32):
    tokenizer = load_tokenizer(llama32)
    examples = encode_all(TASK, tokenizer, toy_rows(24, 1))
    model = load_model(llama32, torch.float32, attention="eager")
    model.get_input_embeddings().weight.data.mul_(20)  # tied: at 0.02 no logit could grow
    config = lora_config(8, 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    schedule = Schedule(steps=60, lr=1e-2, warmup=2, clip=1.0, eval_every=60, checkpoint_seconds=9.0)
    _, history = finetune(model, config, examples, lambda: 0.0, batch_size=8, schedule=schedule, seed=0)
    assert history.losses[-1]["loss"] < 0.5 * history.losses[0]["loss"]


def test_distances_are_zero_at_the_teacher_and_match_torch():
    torch.manual_seed(0)
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    target = torch.randn(5, 4)
    assert float(hidden_distance(hidden, mask, hidden[mask])) == 0
    torch.testing.assert_close(hidden_distance(hidden, mask, target), ((hidden[mask] - target) ** 2).mean())
    logits, other = torch.randn(5, 3), torch.randn(5, 3)
    assert float(divergence(logits, logits)) == pytest.approx(0, abs=1e-7)
    p = other.softmax(-1)
    expected = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(divergence(logits, other), expected)
    with pytest.raises(CaloraError, match="teacher targets"):
        hidden_distance(hidden, mask, target[:4])


def test_only_the_adapter_is_trained(llama):
    model = load_model(llama, torch.bfloat16)
    inject(model, lora_config(4, 2, ["q_proj"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n} == set()
    set_active(model, "default")
    assert len(lora_state(model)) == 4


def test_batches_use_each_index_once_an_epoch():
    lengths = [5, 9, 1, 7, 7, 3, 5, 2]
    assert sorted(i for b in length_batches(lengths, 3) for i in b) == list(range(8))
    assert all(len({lengths[i] for i in b}) == 1 for b in equal_length_batches(lengths, 3))
    plan = epoch_batches(lengths, 2, 8, seed=0)
    assert sorted(i for b in plan[:4] for i in b) == sorted(i for b in plan[4:] for i in b) == list(range(8))
    assert plan == epoch_batches(lengths, 2, 8, seed=0) != epoch_batches(lengths, 2, 8, seed=1)
    with pytest.raises(CaloraError, match="at least one text"):
        epoch_batches([], 2, 8, seed=0)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_a_folder_is_replaced_leaves_one(renames, tmp_path, monkeypatch):
    target = tmp_path / "artifact"

    def write(text):
        with whole_directory(target) as scratch:
            (scratch / "file").write_text(text)

    def killed(path, to):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, to)

    write("old")
    rename, done = Path.rename, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        write("new")
    with pytest.raises(ValueError), whole_directory(target):
        raise ValueError
    assert (target / "file").read_text() == "old"
    write("newer")
    assert (target / "file").read_text() == "newer" and [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_targets_go_on_where_they_were_interrupted(toy, tmp_path, monkeypatch):
    task, tokenizer, examples, model = toy
    monkeypatch.setattr("calora.distillation.targets.SHARD_TOKENS", 60)
    write_targets(tmp_path / "whole", model, task, tokenizer, examples, 4, 5, "whole")
    shards = sorted((tmp_path / "whole").iterdir())
    assert len(shards) > 2
    forward, calls = DecoderOnly.forward, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(DecoderOnly, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        write_targets(tmp_path / "parts", model, task, tokenizer, examples, 4, 5, "parts")
    done = len(list((tmp_path / "parts").iterdir()))
    assert 0 < done < len(shards)
    write_targets(tmp_path / "parts", model, task, tokenizer, examples, 4, 5, "parts")
    assert len(calls) < 4 + 6  # the six batches of 24 examples were not all run again
    assert [p.read_bytes() for p in sorted((tmp_path / "parts").iterdir())] == [p.read_bytes() for p in shards]
    stored = Targets(tmp_path / "parts")
    family = family_of(model)
    batch = family.collate([examples[3], examples[0]], model)
    with torch.no_grad():
        output = family.forward(model, batch, torch.tensor(task.answer_token_ids(tokenizer)))
    target = stored.read([3, 0], torch.device("cpu"))
    # bf16: a batch of another shape rounds differently in its last bit
    torch.testing.assert_close(target.logits, output.logits, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        target.hidden["decoder"], output.hidden["decoder"][batch.masks["decoder"]], rtol=2e-2, atol=2e-2
    )
    with pytest.raises(CaloraError, match="teacher targets"):
        stored.with_answers(examples[:-1])


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("calora.common.progress.SECONDS", 0.0)
    assert list(progress(range(3), "counting", "steps")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("counting: 3 of 3 steps") and "\r" not in "".join(lines)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_teachers_own_answer_ends_at_any_end_token(kind, tmp_path, monkeypatch):
    folder = make_model(kind, tmp_path / kind, torch.float32)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    task = Task("toy", "{text}", (), 16, 6)
    examples = encode_all(task, tokenizer, [{"text": row["text"]} for row in toy_rows(6, 2)])
    free = family_of(model).generate(model, examples, 6)
    end = free[0][2]
    model.config.eos_token_id = [1, end]
    write_targets(tmp_path / "targets", model, task, tokenizer, examples, 3, 5, "targets")
    answers = [e.answer_ids for e in Targets(tmp_path / "targets").with_answers(examples)]
    assert answers == [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert answers[0][-1] == end and len(answers[0]) < 6
    words = [predicted.split() for predicted in predict(model, task, tokenizer, examples, 3).answers]
    assert all(tokenizer.decode([end]) not in each for each in words)
