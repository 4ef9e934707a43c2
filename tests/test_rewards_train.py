import dataclasses
import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from rewards.backbones import (
    ChatReward,
    Frozen,
    Full,
    LatentReward,
    Lora,
    QFormerReward,
    RewardModel,
    checkpointed,
    make_trainable,
)
from rewards.backbones.base import mlp
from rewards.heads import bootstrap_weights
from rewards.losses import BradleyTerry, Davidson, Gaussian, Pointwise, RaoKupper, Scores, make_loss
from rewards.metrics import pairwise_accuracy
from rewards.preferences import Pair
from rewards.reward import ModelReward
from rewards.train import RewardTraining, Stopped, train, training_order
from tests import tiny_chat
from tests.processes import python

PROMPTS = [f"a {'red ' * reds}{shape}" for reds in range(1, 6) for shape in ("circle", "square")] * 4
CONFIG = RewardTraining(epochs=3, batch=16, learning_rate=3e-3, save_steps=4)


def picture(prompt_id: str, sample: int) -> np.ndarray:
    """Noise of a redness of its own."""
    rng = np.random.default_rng([int(prompt_id), sample])
    noise = rng.integers(0, 60, (32, 32, 3))
    noise[..., 0] += rng.integers(0, 196)
    return noise.astype(np.uint8)


def redness(prompt_id: str, sample: int) -> float:
    return float(picture(prompt_id, sample)[..., 0].mean()) / 20


def redder_is_better() -> Dataset:
    rows = []
    for number, prompt in enumerate(PROMPTS):
        split = "heldout" if number % 5 == 0 else "train"
        for pair in itertools.combinations(range(3), 2):
            a, b = pair if (number + sum(pair)) % 2 else pair[::-1]
            label = 1 / (1 + math.exp(redness(str(number), b) - redness(str(number), a)))
            rows.append(Pair(str(number), prompt, "colours", a, b, label, 1.0, split, "all", "rule", "1"))
    return Dataset.from_list([dataclasses.asdict(row) for row in rows])


def fit(itm: Path, folder: Path, table: Dataset | None = None, **changes) -> tuple[QFormerReward, dict]:
    """Train from the checkpoint `itm`: the model and its metrics. `on_step`, `should_stop` go to `train`."""
    hooks = {name: changes.pop(name) for name in ("on_step", "should_stop") if name in changes}
    model = QFormerReward.from_checkpoint(itm)
    config = dataclasses.replace(CONFIG, **changes)
    return model, train(model, table or redder_is_better(), picture, config, folder, **hooks)


def differing(one: RewardModel, other: RewardModel) -> list[str]:
    state = other.state_dict()
    return [name for name, value in one.state_dict().items() if not torch.equal(value, state[name])]


@pytest.fixture(scope="module")
def reference(itm_folder, tmp_path_factory) -> tuple[QFormerReward, dict]:
    return fit(itm_folder, tmp_path_factory.mktemp("reference"))


def test_learns_a_rule_that_carries_over_to_new_images(itm_folder, reference):
    model, metrics = reference
    assert metrics["heldout_accuracy"] > 0.9
    assert metrics["heldout_nll"] == min(point["heldout_nll"] for point in metrics["curve"])
    reward = ModelReward(model)
    new = [(str(number), sample) for number in range(20) for sample in (100, 101)]
    values = reward([picture(*key) for key in new], [PROMPTS[int(number)] for number, _ in new]).values
    truth = np.array([redness(*key) for key in new])
    assert pairwise_accuracy(values[::2], values[1::2], truth[::2] > truth[1::2]) > 0.9


def test_only_what_is_not_frozen_changes(itm_folder, reference):
    changed = differing(reference[0], QFormerReward.from_checkpoint(itm_folder))
    assert changed
    assert not any(name.startswith("network.vision_model.") for name in changed)


def test_killed_and_resumed_is_the_same_to_the_bit(itm_folder, reference, tmp_path):
    model, metrics = reference
    killed_at = metrics["steps"] - 2
    threads = str(torch.get_num_threads())
    child = python(__file__, itm_folder, tmp_path / "run", str(killed_at), threads, cwd=tmp_path)
    assert child.returncode == -signal.SIGKILL
    (tmp_path / "run" / "partial-checkpoint-999").mkdir()
    steps = []
    resumed, again = fit(itm_folder, tmp_path / "run", on_step=lambda step, *_: steps.append(step))
    assert 1 < min(steps) <= killed_at
    assert again == metrics
    assert differing(resumed, model) == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("at", [9, 12])  # within the second epoch and at its end
def test_stopped_and_resumed_is_the_same_to_the_bit(itm_folder, reference, tmp_path, at):
    model, metrics = reference
    seen = []
    with pytest.raises(Stopped):
        # Before the end of step `at`, `at` - 1 steps and one evaluation have been seen.
        fit(itm_folder, tmp_path, on_step=lambda *now: seen.append(now), should_stop=lambda: len(seen) >= at)
    assert seen[-1][0] == at
    resumed, again = fit(itm_folder, tmp_path, on_step=lambda *args: seen.append(args))
    assert again == metrics
    assert differing(resumed, model) == []
    assert [step for step, _, shown in seen if "loss" in shown] == list(range(1, metrics["steps"] + 1))


def chat(folder: Path) -> ChatReward:
    network, processor = tiny_chat.llava()
    return ChatReward(network, mlp((32, 8, 2), 0), processor, template="is there {} ?", size=16, length=64)


CASES = {
    "lora": (QFormerReward.from_checkpoint, {"trained": Lora(rank=2)}),
    "full": (QFormerReward.from_checkpoint, {"trained": Full()}),
    "latent": (LatentReward.from_checkpoint, {}),
    "ties": (QFormerReward.from_checkpoint, {"loss": Davidson()}),
    "sampled": (chat, {"loss": Gaussian(likelihood="sampled", samples=4)}),
    "ensemble": (lambda folder: QFormerReward.from_checkpoint(folder).with_heads(3, seed=0), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_is_trained_resumes_to_the_bit(itm_folder, generator_folder, tmp_path, case):
    make, changes = CASES[case]
    checkpoint = generator_folder if case == "latent" else itm_folder
    config = dataclasses.replace(CONFIG, epochs=1, **changes)

    def run(folder: str, **hooks) -> tuple[RewardModel, dict]:
        model = make(checkpoint)
        return model, train(model, redder_is_better(), picture, config, tmp_path / folder, **hooks)

    whole, metrics = run("whole")
    assert differing(whole, make(checkpoint))
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    seen = []
    with pytest.raises(Stopped):
        run("cut", on_step=lambda *now: seen.append(now), should_stop=lambda: len(seen) >= 3)
    resumed, again = run("cut")
    assert again == metrics
    assert differing(resumed, whole) == []


def model_heads(model: RewardModel, keys: list[tuple[str, int]]) -> torch.Tensor:
    return ModelReward(model).scores([picture(*key) for key in keys], [PROMPTS[int(n)] for n, _ in keys]).heads


def test_every_head_learns_from_prompts_of_its_own_weight(itm_folder, tmp_path):
    model = QFormerReward.from_checkpoint(itm_folder).with_heads(3, seed=0)
    metrics = train(model, redder_is_better(), picture, CONFIG, tmp_path)
    assert metrics["heldout_accuracy"] > 0.9
    keys = [(str(number), sample) for number in range(20) for sample in (100, 101)]
    values = model_heads(model, keys)
    truth = np.array([redness(*key) for key in keys])
    levels = model_heads(model, [(str(n), k) for n in range(20) if n % 5 for k in range(3)]).mean(dim=0)
    assert levels.max() - levels.min() < 0.05 * values.std()
    for head in values.unbind(1):
        assert pairwise_accuracy(head[::2], head[1::2], truth[::2] > truth[1::2]) > 0.8


def test_the_bootstrap_weighs_prompts_by_one_on_average_and_each_head_its_own_way():
    texts = [f"prompt {number}" for number in range(4000)]
    weights = bootstrap_weights(texts, 3, seed=0)
    assert weights.mean(dim=0).tolist() == pytest.approx([1.0] * 3, abs=0.06)
    assert weights.std(dim=0).tolist() == pytest.approx([1.0] * 3, abs=0.1)
    assert torch.corrcoef(weights.T).triu(1).abs().max() < 0.06
    assert torch.equal(bootstrap_weights(texts[:7], 3, seed=0), weights[:7])


def test_the_temperature_fits_the_heldout_labels(itm_folder, reference, tmp_path):
    model, metrics = reference
    heldout = [row for row in redder_is_better() if row["split"] == "heldout"]
    reward = ModelReward(model)
    a, b = (
        reward([picture(row["prompt_id"], row[name]) for row in heldout], [row["prompt"] for row in heldout]).values
        for name in ("sample_a", "sample_b")
    )
    label = np.array([row["label"] for row in heldout])

    def nll(temperature: float) -> float:
        return float(
            np.logaddexp(0, (b - a) / temperature) @ label + np.logaddexp(0, (a - b) / temperature) @ (1 - label)
        )

    best = metrics["temperature"]
    assert nll(best) <= min(nll(best * 1.01), nll(best / 1.01), nll(1.0))


def test_what_a_loss_learns_is_told(itm_folder, tmp_path):
    table = redder_is_better().map(lambda row: {"label": 0.5})
    _, metrics = fit(itm_folder, tmp_path, table, loss=Davidson(tie=1.0))
    assert make_loss(**metrics["loss"]).tie > 1.05
    assert fit(itm_folder, tmp_path / "none", epochs=1)[1]["loss"] == dataclasses.asdict(BradleyTerry())


def test_the_nll_of_any_loss_is_that_of_the_labels_under_its_probabilities(itm_folder, tmp_path):
    table = redder_is_better()
    heldout = [row for row in table if row["split"] == "heldout"]
    label = torch.tensor([row["label"] for row in heldout])
    for loss in (BradleyTerry(smoothing=0.2, margin=1.0), RaoKupper(learn=False), Davidson(learn=False)):
        model, metrics = fit(itm_folder, tmp_path / loss.type, table, epochs=1, loss=loss)
        reward = ModelReward(model)
        a, b = (
            reward([picture(row["prompt_id"], row[name]) for row in heldout], [row["prompt"] for row in heldout]).values
            for name in ("sample_a", "sample_b")
        )
        p = loss.probability(Scores(torch.tensor(a)), Scores(torch.tensor(b)))
        expected = torch.nn.functional.binary_cross_entropy(p, label).item()
        assert metrics["heldout_nll"] == pytest.approx(expected, abs=1e-4)


def test_a_finished_training_is_not_done_again(itm_folder, tmp_path):
    first, metrics = fit(itm_folder, tmp_path, epochs=1)
    seen = []
    second, again = fit(itm_folder, tmp_path, epochs=1, on_step=lambda *args: seen.append(args))
    assert seen == []
    assert again == metrics
    assert differing(second, first) == []


def test_features_may_be_cached_or_not(itm_folder, tmp_path):
    cached, metrics = fit(itm_folder, tmp_path / "cached", epochs=1)
    fresh, again = fit(itm_folder, tmp_path / "fresh", epochs=1, cache_features=False)
    assert again == metrics
    assert differing(cached, fresh) == []


def test_the_best_step_is_restored(itm_folder, tmp_path):
    def reverse_heldout(row: dict) -> dict:
        return {"label": 1 - row["label"] if row["split"] == "heldout" else row["label"]}

    table = redder_is_better().map(reverse_heldout)
    model, metrics = fit(itm_folder, tmp_path / "long", table)
    assert metrics["best_step"] == metrics["curve"][0]["step"] == metrics["steps"] // 3
    assert {path.name for path in (tmp_path / "long").iterdir()} == {"checkpoint-6", "checkpoint-18"}
    interrupted: list[int] = []
    with pytest.raises(Stopped):
        fit(
            itm_folder,
            tmp_path / "short",
            table,
            on_step=lambda step, *_: interrupted.append(step),
            should_stop=lambda: len(interrupted) > 12,
        )
    again, same = fit(itm_folder, tmp_path / "short", table)
    assert same == metrics
    assert differing(again, model) == []


def worse_and_worse() -> Dataset:
    """Held-out pairs say the opposite of what is learned."""
    return redder_is_better().map(
        lambda row: {"label": 1 - row["label"] if row["split"] == "heldout" else row["label"]}
    )


def test_patience_ends_training_when_the_heldout_nll_no_longer_falls(itm_folder, tmp_path):
    _, metrics = fit(itm_folder, tmp_path / "ended", worse_and_worse(), epochs=5, patience=2)
    losses = [point["heldout_nll"] for point in metrics["curve"]]
    assert len(losses) == 3
    assert min(losses[1:]) >= losses[0] == metrics["heldout_nll"]
    assert metrics["steps"] == metrics["curve"][-1]["step"] == 3 * metrics["best_step"]
    _, whole = fit(itm_folder, tmp_path / "whole", worse_and_worse(), epochs=5)
    assert whole["curve"][:3] == metrics["curve"]
    assert whole["steps"] > metrics["steps"]


def test_a_training_that_ended_early_is_not_gone_on_with(itm_folder, tmp_path):
    first, metrics = fit(itm_folder, tmp_path, worse_and_worse(), epochs=4, patience=1)
    seen = []
    second, again = fit(
        itm_folder, tmp_path, worse_and_worse(), epochs=4, patience=1, on_step=lambda *now: seen.append(now)
    )
    assert seen == []
    assert again == metrics
    assert differing(second, first) == []


def test_interrupted_before_its_patience_ends_it_ends_the_same(itm_folder, tmp_path):
    first, metrics = fit(itm_folder, tmp_path / "whole", worse_and_worse(), epochs=4, patience=1)
    seen = []
    with pytest.raises(Stopped):
        fit(
            itm_folder,
            tmp_path / "cut",
            worse_and_worse(),
            epochs=4,
            patience=1,
            on_step=lambda *now: seen.append(now),
            should_stop=lambda: len(seen) >= metrics["best_step"] + 2,
        )
    second, again = fit(itm_folder, tmp_path / "cut", worse_and_worse(), epochs=4, patience=1)
    assert again == metrics
    assert differing(second, first) == []


@pytest.mark.parametrize("trained", [Full(), Frozen()], ids=lambda trained: trained.type)
def test_workers_change_nothing_and_decode_elsewhere(itm_folder, tmp_path, trained):
    def told(prompt_id: str, sample: int) -> np.ndarray:
        (tmp_path / str(os.getpid())).touch()
        return picture(prompt_id, sample)

    models = []
    for workers in (0, 2):
        model = QFormerReward.from_checkpoint(itm_folder)
        config = dataclasses.replace(CONFIG, epochs=1, trained=trained, workers=workers)
        metrics = train(model, redder_is_better(), told if workers else picture, config, tmp_path / f"run{workers}")
        models.append((model, metrics))
    (one, metrics), (other, again) = models
    assert again == metrics
    assert differing(other, one) == []
    assert not (tmp_path / str(os.getpid())).exists()
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) >= 2


def test_checkpointed_layers_are_trained_the_same_and_keep_less(itm_folder, tmp_path):
    plain, metrics = fit(itm_folder, tmp_path / "plain", epochs=1, trained=Full())
    spared, again = fit(itm_folder, tmp_path / "spared", epochs=1, trained=Full(), gradient_checkpointing=True)
    assert again == metrics
    assert differing(spared, plain) == []

    def kept(spare: bool) -> int:
        """Bytes that are held for the gradient of one batch."""
        model = QFormerReward.from_checkpoint(itm_folder)
        make_trainable(model, Full(), 0)
        pixels, tokens = model.pixels([picture("0", k) for k in range(8)]), model.tokens(PROMPTS[:8])
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with checkpointed(model, spare), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pixels, tokens).mean.sum()
        return sum(sizes.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())

    assert kept(True) < kept(False) / 2


def test_bfloat16_learns_nearly_the_same(itm_folder, tmp_path, reference):
    model, metrics = fit(itm_folder, tmp_path, dtype="bfloat16")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert differing(model, reference[0])
    assert metrics["heldout_accuracy"] > 0.9
    assert metrics["heldout_nll"] == pytest.approx(reference[1]["heldout_nll"], abs=0.05)


@pytest.mark.parametrize("error", ["mse", "huber", "bce"])
def test_pointwise_regression_learns_the_margins_themselves(itm_folder, tmp_path, error):
    def margins(row: dict) -> dict:
        return {f"margin_{side}": redness(row["prompt_id"], row[f"sample_{side}"]) / 3 - 2 for side in "ab"}

    table = redder_is_better().map(margins)
    model, metrics = fit(itm_folder, tmp_path, table, epochs=8, loss=Pointwise(error=error))
    assert metrics["heldout_accuracy"] > 0.9
    heldout = [row for row in table if row["split"] == "heldout"]
    images, prompts = [picture(r["prompt_id"], r["sample_a"]) for r in heldout], [r["prompt"] for r in heldout]
    missed = ModelReward(model)(images, prompts).values - [row["margin_a"] for row in heldout]
    assert np.abs(missed).mean() < np.std([row["margin_a"] for row in heldout]) / 2


def test_pointwise_regression_needs_margins(itm_folder, tmp_path):
    with pytest.raises(ValueError, match=r"^loss: pointwise learns the judge's margins, and not every picture has one"):
        fit(itm_folder, tmp_path, loss=Pointwise())


def test_checkpoints_hold_no_pickle(itm_folder, tmp_path):
    fit(itm_folder, tmp_path, epochs=1)
    for path in tmp_path.rglob("*.*"):
        assert path.suffix in (".safetensors", ".json")
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_order_is_a_permutation_an_epoch_and_keyed_by_the_seed():
    rows = [3, 5, 8, 13, 21]
    order = training_order(rows, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == rows
    assert order[:5] != order[5:10]
    assert training_order(rows, 7, seed=1) == order[:7]
    assert training_order(rows, 12, seed=2) != order


def test_grouped_keeps_the_pairs_of_a_prompt_together():
    rows, prompts = list(range(30)), [str(row // 3) for row in range(30)]
    order = training_order(rows, 60, 1, prompts)
    for epoch in (order[:30], order[30:]):
        assert sorted(epoch) == rows
        assert all(len({prompts[row] for row in epoch[start : start + 3]}) == 1 for start in range(0, 30, 3))
    assert order[:30] != order[30:]


def test_pictures_that_pairs_share_are_read_once_a_step(itm_folder, tmp_path, monkeypatch):
    seen, score = [], QFormerReward.score
    monkeypatch.setattr(QFormerReward, "score", lambda self, x, tokens: seen.append(len(x)) or score(self, x, tokens))
    _, metrics = fit(itm_folder, tmp_path, epochs=2, batch=6, grouped=True)
    assert set(seen) == {6}  # of two prompts with three pictures and three pairs each, both in training and after it
    assert metrics["heldout_accuracy"] > 0.7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch", 0),
        ("save_steps", 0),
        ("patience", 0),
        ("workers", -1),
        ("dtype", "float16"),
        ("learning_rate", 0.0),
        ("weight_decay", -1),
        ("warmup", 1),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        RewardTraining(**{field: value})


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("pairs", lambda table: table.remove_columns("label")),
        ("split", lambda table: table.filter(lambda row: row["split"] == "train")),
        ("label", lambda table: table.map(lambda row: {"label": row["label"] + 1})),
        ("weight", lambda table: table.map(lambda row: {"weight": 0.0})),
    ],
)
def test_broken_pairs_are_named(itm_folder, tmp_path, field, change):
    model = QFormerReward.from_checkpoint(itm_folder)
    with pytest.raises(ValueError, match=rf"^{field}: "):
        train(model, change(redder_is_better()), picture, CONFIG, tmp_path)


def _die(itm: str, folder: str, step: str, threads: str) -> None:
    """Train until `step`, and be killed there."""

    def on_step(now: int, *_: object) -> None:
        if now == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(int(threads))
    fit(Path(itm), Path(folder), on_step=on_step)


if __name__ == "__main__":
    _die(*sys.argv[1:])
