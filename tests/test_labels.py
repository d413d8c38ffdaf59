"""Few labels: which texts keep theirs, what becomes of the others, and the sweep over their number."""

import importlib
import json
import os
import re
from dataclasses import replace

import pytest
import torch
import yaml

from calora.adapters.codes import rounded
from calora.adapters.folder import RECOVERY, read_adapter
from calora.adapters.lora import lora_config
from calora.distillation.distill import Pool, distill
from calora.distillation.labels import first_labels, with_labels
from calora.distillation.loss import Weights
from calora.distillation.targets import Targets, write_targets
from calora.distillation.training import Schedule
from calora.errors import CaloraError
from calora.inheritance.fresh import fresh_adapter
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, encode_all
from pipeline import labels as sweep_over
from pipeline.__main__ import COMMANDS, Parser
from stages.config import load_params
from stages.looks import LOOKS, key_of
from stages.resolve import resolve
from tests.conftest import ROOT, TASK, change, make_model, make_project, toy_rows
from tests.test_paper import sweep_into
from tests.test_stages import run_all

WEIGHTS = Weights(1.0, {"decoder": 0.1}, 1.0, 1.0, 1.0, 2)
SCHEDULE = Schedule(steps=4, lr=1e-2, warmup=1, clip=1.0, eval_every=0, checkpoint_seconds=1e9)


def test_the_first_labels_are_nested_seeded_and_balanced():
    labels = [0] * 90 + [1] * 30
    kept = {count: first_labels(labels, count, 0) for count in range(121)}
    for count, places in kept.items():
        assert len(places) == count and places == sorted(places)
        assert count == 0 or set(kept[count - 1]) < set(places)
        assert abs(sum(labels[place] for place in places) - count / 4) <= 1
    assert kept[40] == first_labels(labels, 40, 0) != first_labels(labels, 40, 1)
    assert kept[120] == list(range(120)) and first_labels([-1] * 5, 5, 3) == [0, 1, 2, 3, 4]
    for count in (-1, 121):
        with pytest.raises(
            CaloraError, match=f"labels: expected 0 to 120, the number of labelled texts, found {count}"
        ):
            first_labels(labels, count, 0)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder of a model, and its own targets for 8 labelled and 4 unlabelled texts."""
    folder = make_model("llama", tmp_path_factory.mktemp("taught") / "llama", torch.float32)
    model, tokenizer = load_model(folder, torch.float32, attention="eager"), load_tokenizer(folder)
    rows = {"train": toy_rows(8, 1), "unlabelled": [{"text": row["text"]} for row in toy_rows(4, 2)]}
    for split, some in rows.items():
        examples = encode_all(TASK, tokenizer, some)
        write_targets(folder / split, model, TASK, tokenizer, examples, batch_size=4, top_k=2, title=split)
    return folder


def pools(folder, wrong=()):
    """Both pools; `wrong` labels are turned round."""
    tokenizer = load_tokenizer(folder)
    rows = [{**r, "label": 1 - r["label"]} if i in wrong else r for i, r in enumerate(toy_rows(8, 1))]
    unlabelled = [{"text": row["text"]} for row in toy_rows(4, 2)]
    return [
        Pool(encode_all(TASK, tokenizer, some), Targets(folder / split))
        for split, some in (("train", rows), ("unlabelled", unlabelled))
    ]


def test_labelled_texts_that_are_left_out_are_unlabelled_ones(taught):
    labelled, unlabelled = pools(taught)
    few, others = with_labels(labelled, unlabelled, 3, 0)
    kept = first_labels([e.label for e in labelled.examples], 3, 0)
    left = [place for place in range(8) if place not in kept]
    assert [e.prompt_ids for e in few.examples] == [labelled.examples[place].prompt_ids for place in kept]
    wanted = [*(labelled.examples[place] for place in left), *unlabelled.examples]
    assert [e.prompt_ids for e in others.examples] == [e.prompt_ids for e in wanted]
    for pool, sources in (
        (few, [(labelled, place) for place in kept]),
        (others, [*((labelled, place) for place in left), *((unlabelled, place) for place in range(4))]),
    ):
        for index, (source, place) in enumerate(sources):
            ours, theirs = (p.targets.read([i], torch.device("cpu")) for p, i in ((pool, index), (source, place)))
            assert torch.equal(ours.logits, theirs.logits)
            assert torch.equal(ours.hidden["decoder"], theirs.hidden["decoder"])
    assert with_labels(labelled, unlabelled, 0, 0)[0] is None
    assert with_labels(labelled, None, 8, 0)[1] is None
    alone, none = with_labels(Pool(labelled.examples), None, 3, 0)
    assert len(alone.examples) == 3 and alone.targets is None and none is None


def test_generated_answers_that_are_left_out_are_told_to_nobody(taught):
    """The teacher's targets for them follow the right answer."""
    labelled, unlabelled = pools(taught)
    written = Pool([replace(example, label=-1) for example in labelled.examples], labelled.targets)
    few, others = with_labels(written, unlabelled, 3, 0)
    assert len(few.examples) == 3 and others is unlabelled
    assert with_labels(written, None, 3, 0)[1] is None


@pytest.mark.parametrize("count", [0, 3, 8])
def test_a_label_that_is_left_out_changes_nothing(taught, count):
    right, others_wrong, own_wrong = (trained(taught, count, wrong) for wrong in ("none", "others", "own"))
    assert all(torch.equal(right.lora[key], tensor) for key, tensor in others_wrong.lora.items())
    assert count == 0 or any(not torch.equal(right.lora[key], tensor) for key, tensor in own_wrong.lora.items())


def turned(pool):
    """The texts with the labels turned round, where they have any."""
    ids = {e.label: e.answer_ids for e in pool.examples if e.label >= 0}
    wrong = [
        replace(e, label=1 - e.label, answer_ids=ids.get(1 - e.label, [2])) if e.label >= 0 else e
        for e in pool.examples
    ]
    return Pool(wrong, pool.targets)


def trained(folder, count, wrong):
    """The adapter after four steps, with the labels of some texts turned round once it is said which are known."""
    model = load_model(folder, torch.float32, attention="eager")
    start = fresh_adapter(model, lora_config(2, 2, ["q_proj"]), {}, 0)
    for tensor in start.lora.values():
        tensor.add_(0.05)  # B = 0 learns from nothing in the first step
    labelled, unlabelled = with_labels(*pools(folder), count, 0)
    labelled = turned(labelled) if wrong == "own" and labelled else labelled
    unlabelled = turned(unlabelled) if wrong == "others" else unlabelled
    made, history = distill(
        model, start, labelled, unlabelled, lambda: 0.0, WEIGHTS, batch_size=2, schedule=SCHEDULE, seed=0, title="toy"
    )
    told = ["task" in row for row in history.losses]
    assert told == ([False] * 4 if count == 0 else [True, False, True, False])
    return made


def test_nothing_to_learn_from_is_refused(taught):
    model = load_model(taught, torch.float32, attention="eager")
    for unlabelled, weights in ((None, WEIGHTS), (pools(taught)[1], Weights())):
        with pytest.raises(CaloraError, match="distill: expected labelled texts, or unlabelled ones"):
            distill(model, None, None, unlabelled, lambda: 0.0, weights, batch_size=2, schedule=SCHEDULE, seed=0)
    with pytest.raises(CaloraError, match="teacher targets: expected 2, found 8"):
        Pool([Example([1]), Example([2])], pools(taught)[0].targets).take([0])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Every stage with few labels, without, and without any step; the bypass in 8 bits."""
    before = os.getcwd()
    folder = make_project(tmp_path_factory.mktemp("labels"))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    fresh = {"like": "calora", "start": {"lora": "fresh", "bypass": None}}
    few = {
        "calora_few": {"like": "calora", "loss": {"labels": 7}},
        "fresh_few": {**fresh, "loss": {**ONLY, "labels": 7}},
    }
    change(folder, "methods", params["methods"] | few)
    change(folder, "methods.calora.start.bypass.format", "int8")
    change(folder, "compare", ["calora_free", "calora_unlabelled", *few])
    run_all(folder)
    yield folder
    os.chdir(before)


ONLY = {"alpha": 0.0, "kl": 0.0, "unlabelled_every": 0}  # labels alone


def history(project, method):
    return json.loads((project / "models" / method / "toy/q8_up/history.json").read_text())


def test_methods_without_labels_or_steps_are_entries(project):
    assert history(project, "calora_free")["losses"] == []
    assert all("task" not in row and "kl" in row for row in history(project, "calora_unlabelled")["losses"])
    few = ["task" in row for row in history(project, "calora_few")["losses"]]
    assert few == [True, False] * 3
    assert all(row.keys() == {"step", "task", "loss"} for row in history(project, "fresh_few")["losses"])
    methods = json.loads((project / "results/toy/q8_up/metrics.json").read_text())["methods"]
    assert methods["clm_calora_free"]["trainable_parameters"] == 0
    assert methods["clm_calora_unlabelled"]["trainable_parameters"] > 0
    table = (project / "results/table.md").read_text()
    assert "CLM + CA-LoRA, no step" in table and "CLM + CA-LoRA, no label" in table


def test_more_labels_than_texts_are_refused_by_their_key(project):
    params = load_params()
    loss = json.loads((project / "models/methods/calora_few/loss.json").read_text())
    (project / "models/methods/calora_few/loss.json").write_text(json.dumps({**loss, "labels": 25}))
    try:
        with pytest.raises(CaloraError, match=r"methods\.calora_few\.loss in params\.yaml: labels: .* found 25"):
            importlib.import_module("stages.distill").main(params, "toy", "q8_up", "calora_few")
    finally:
        (project / "models/methods/calora_few/loss.json").write_text(json.dumps(loss))


def test_a_small_adapter_is_scored_as_it_is_stored(project):
    start = read_adapter(project / "models/inherited/toy/q8_up/calora_free")
    folder = project / "models/calora_free/toy/q8_up"
    kept = read_adapter(folder)
    assert json.loads((folder / "calora.json").read_text())["recovery_format"] == "int8"
    for name, tensor in rounded(start.recovery, "int8", torch.bfloat16).items():
        assert torch.equal(kept.recovery[name], tensor) and not torch.equal(tensor, start.recovery[name].float())
    methods = json.loads((project / "results/toy/q8_up/metrics.json").read_text())["methods"]
    size = sum(file.stat().st_size for file in folder.iterdir())
    base = sum(file.stat().st_size for file in (project / "models/compressed/q8_up").iterdir())
    assert methods["clm_calora_free"]["bytes_on_disk"] == base + size
    before = (project / "models/inherited/toy/q8_up/calora_free" / RECOVERY).stat().st_size
    assert (folder / RECOVERY).stat().st_size < before + 4000  # tiny factors: the header is most of it


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("methods.calora.loss.labels", -1, r"methods\.calora\.loss\.labels: all, or a number"),
        ("methods.calora.loss.labels", "some", r"methods\.calora\.loss\.labels: all, or a number"),
        ("methods.calora.loss.labels", True, r"methods\.calora\.loss\.labels: all, or a number"),
        ("methods.none", {"like": "calora", "loss": {**ONLY, "alpha_encoder": 0.0, "labels": 0}}, r"methods\.none\.loss\.labels"),
        ("methods.none", {"like": "calora", "loss": {"unlabelled_every": 0, "labels": 0}}, r"methods\.none\.loss\.labels"),
        ("methods.paper.loss.labels", 0, r"methods\.paper\.loss\.labels: labels, or a loss"),
        ("methods.calora.start.bypass.format", "int2", r"methods\.calora\.start\.bypass\.format"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(tmp_path, key, value, said):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    change(tmp_path, key, value)
    with pytest.raises(CaloraError, match=said) as caught:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_what_the_entries_mean():
    methods = resolve(load_params(ROOT / "params.yaml").methods)
    whole = methods["calora"]
    assert methods["calora_free"] == {"start": whole["start"], "loss": None, "texts": "task"}
    unlabelled = {"start": whole["start"], "loss": {**whole["loss"], "labels": 0}, "texts": "task"}
    assert methods["calora_unlabelled"] == unlabelled
    assert whole["loss"]["labels"] == methods["no_recover"]["loss"]["labels"] == "all"
    looks = [(look.colour, look.marker) for look in LOOKS.values()]
    assert {"clm_calora_free", "clm_calora_unlabelled", "clm_calora_scales", "clm_no_recover"} <= set(LOOKS) and len(
        set(looks)
    ) == len(looks)


@pytest.fixture
def experiments(monkeypatch):
    """Experiments that `sweep` claims to have run: name -> what of params.yaml they changed."""
    made = {}

    def files_of(root, name):
        cell = made[name]
        count = cell["methods.calora.loss.labels"]
        share = {"calora_free": 0.6, "clm_lora": 0.5 + count / 1000, "no_recover": 0.7, "calora": 0.8 + count / 1000}
        answers = {key_of(m): {"correct": [item < 200 * share[m] for item in range(200)]} for m in cell["compare"]}
        curve = [{"step": step, "score": 0.5 + cell["seed"] / 10 + step / 1000} for step in (0, 10, 20)]
        curves = {key_of(method): curve for method in cell["compare"] if method != "calora_free"}
        return lambda path: json.dumps(answers if "predictions" in path else curves)

    monkeypatch.setattr(sweep_over, "sweep", sweep_into(made))
    monkeypatch.setattr(sweep_over, "files_of", files_of)
    return made


def test_the_sweep_has_an_experiment_for_each_number_and_seed(experiments, tmp_path):
    text = sweep_over.labels(tmp_path, "movies", "q8_up", [100, 0], [0, 1]).read_text(encoding="utf-8")
    assert list(experiments) == [f"labels-movies-q8_up-{count}-seed{seed}" for count in (0, 100) for seed in (0, 1)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| 0." in line]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("0", "CLM + CA-LoRA, no step", "0.600"),
        ("0", "CLM + inherited LoRA, distilled", "0.700"),
        ("0", "CLM + CA-LoRA", "0.800"),
        ("100", "CLM + LoRA (equal budget)", "0.600"),
        ("100", "CLM + inherited LoRA, distilled", "0.700"),
        ("100", "CLM + CA-LoRA", "0.900"),
    ]
    assert re.search(r"^CA-LoRA - LoRA \(equal budget\) with 100 labels: \+0\.300 \[", text, re.M)
    assert "with 0 labels" not in text and "validation texts" in text
    assert (tmp_path / "results/labels-movies-q8_up.png").stat().st_size > 10_000
    assert sweep_over.mean_curves([{"a": [{"step": 0, "score": 0.5}]}, {"a": [{"step": 0, "score": 0.7}]}]) == {
        "a": [{"step": 0, "score": pytest.approx(0.6)}]
    }


def test_the_sweep_without_any_label(experiments, tmp_path):
    text = sweep_over.labels(tmp_path, "movies", "q8_up", [0], [0]).read_text(encoding="utf-8")
    assert "equal budget" not in text and "CLM + CA-LoRA | 0.800" in text


def test_what_an_experiment_changes_is_a_run_that_there_can_be(tmp_path):
    """As a run writes it: keys that params.yaml has, and values that it may hold."""
    from pipeline.settings import changes, write_params
    from pipeline.sweep import settings_of

    for count in (0, 400):
        (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
        write_params(tmp_path, changes(settings_of(sweep_over.cell(count, 3))))
        params = load_params(tmp_path / "params.yaml")
        methods = resolve(params.methods)
        assert params.seed == 3 and ("clm_lora" in params.compare) == (count > 0)
        told = {name: methods[name]["loss"]["labels"] for name in ("calora", "no_recover")}
        assert set(told.values()) == {count} and methods["calora_free"]["loss"] is None
        if count:
            assert methods["clm_lora"]["loss"] == {**importlib.import_module("stages.methods").LABELS, "labels": count}
            assert methods["clm_lora"]["start"]["budget"] == methods["calora"]["start"]


def test_the_command_has_its_defaults():
    command = Parser()
    act = COMMANDS["labels"](command)
    chosen = command.parse_args([])
    assert callable(act) and (chosen.task, chosen.recipe) == ("movies", "q3")
    assert (chosen.counts, chosen.seeds) == ([0, 100, 400, 1600], [0])
