"""What a forecast says is what is true of small models, what is published of large ones, and what its remedies do."""

import json
import re
import socket
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import pipeline
from models import adapters, lora, metering
from models.geometry import SHIPPED, Part, Unknown, asked, geometry
from models.loading import load_generator
from pipeline import cli, forecast
from pipeline.config import Config
from pipeline.doctoring.forecast import Saved
from pipeline.settings import UserError, load
from pipeline.stages.evaluate import EVALUATE
from pipeline.stages.finetune import FINETUNE
from pipeline.stages.judge import JUDGE
from pipeline.stages.sample import SAMPLE
from tests.tiny_pipelines import FAMILIES

HOME = Path(__file__).parent.parent
CONFIGS = sorted(
    path for path in (HOME / "configs").glob("*.yaml") if (SHIPPED / path.with_suffix(".json").name).is_file()
)
LEARNED = ("grpo", "dpo", "d3po", "draft")
CARDS = re.compile(r"^# ([\d x]+?)(?: GB)? {2,}(.+)$", re.MULTILINE)

PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": (23.8e9, 2),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": (3.21e9, 2),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (2.4435e9, 4),
    "Qwen/Qwen-Image": (40.9e9, 2),
    "stabilityai/stable-diffusion-3.5-medium": (4.94e9, 2),
    "stabilityai/stable-diffusion-xl-base-1.0": (10.27e9, 4),
    "Tongyi-MAI/Z-Image-Turbo": (12.3e9, 2),
}
"""Bytes of the file, or files, of the network's weights on the hub, and those of a number in it."""


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, self.mix(x))


def cards(path):
    """The card and the command behind each line of a config's head, folded lines put together."""
    text = re.sub(r" \\\n# +", " ", path.read_text())
    return {card.strip(): command for card, command in CARDS.findall(text)}


def overrides(command):
    return [word for word in command.split() if re.match(r"[a-z_.]+=", word)]


@pytest.mark.parametrize("repo", PUBLISHED)
def test_the_shipped_geometries_have_the_published_sizes(repo):
    size, each = PUBLISHED[repo]
    network = geometry(repo).network.build()
    stored = sum(value.numel() for value in network.state_dict().values())
    assert stored * each == pytest.approx(size, rel=0.01)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_what_nothing_tells_is_unknown_with_what_to_do():
    with pytest.raises(Unknown, match="hf download nobody/nothing --include"):
        geometry("nobody/nothing")


def test_a_linear_layer_takes_its_product_and_its_output():
    layer = nn.Linear(32, 48, device="meta")
    cost = metering.painted(layer, {"input": torch.empty(10, 32, device="meta")})
    assert cost == metering.Cost(bytes=4 * 10 * 48, flops=2 * 10 * 32 * 48)


def test_attention_keeps_no_scores():
    network = Attention().to("meta")
    few, many = (
        metering.learned(network, {"x": torch.empty(1, 1, count, 64, device="meta")}) for count in (1024, 8192)
    )
    assert many.bytes == pytest.approx(8 * few.bytes, rel=0.01)
    assert many.flops > 50 * few.flops


def test_what_learning_takes_on_the_meta_device_is_what_autograd_keeps(generator_folder):
    network = load_generator(generator_folder).transformer
    lora.attach(network, network.lora_targets, rank=4, alpha=4, seed=0)
    size = network.config.size
    with torch.device("meta"):
        empty = geometry(str(generator_folder)).network.build()
        lora.attach(empty, empty.lora_targets, rank=4, alpha=4, seed=0)
    forecasted = metering.learned(empty, asked(empty, 16, (size, size), 12)).bytes
    real = {name: torch.zeros(value.shape) for name, value in asked(empty, 16, (size, size), 12).items()}
    with Saved(network.parameters()) as saved:
        network(**real).sum().backward()
    assert saved.most < forecasted < 1.6 * saved.most


REPEATS = {
    "stabilityai/stable-diffusion-3.5-medium": {"num_layers": 11, "dual_attention_layers": (0, 1, 2, 3, 4)},
    "black-forest-labs/FLUX.1-dev": {"num_layers": 5, "num_single_layers": 6},
}


@pytest.mark.parametrize("repo", REPEATS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_that_are_alike_are_counted_without_running_all(repo, checkpointed, monkeypatch):
    part = geometry(repo).network
    config = {**part.config, **REPEATS[repo], "num_attention_heads": 1, "caption_projection_dim": 64}
    network = Part(part.kind, config).build()
    with torch.device("meta"):
        lora.attach(network, ("attn.to_q",), rank=4, alpha=4, seed=0)
    if checkpointed:
        network.enable_gradient_checkpointing()
    given, calls = asked(network, 2, (8, 8), 16), []
    lists = [found for found in network.children() if isinstance(found, nn.ModuleList)]
    for block in [block for blocks in lists for block in blocks]:
        block.register_forward_hook(lambda *_: calls.append(1))
    short = metering.painted(network, given), metering.learned(network, given)
    few = len(calls)
    monkeypatch.setattr(metering, "_RUN", 100)
    assert (metering.painted(network, given), metering.learned(network, given)) == short
    assert few < len(calls) - few


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_called_as_it_wants_to_be_and_rows_add_up(name):
    pipe = FAMILIES[name].build()
    network = getattr(pipe, "unet", None) or pipe.transformer
    empty = Part(type(network).__name__, dict(network.config)).build()
    two, five = (metering.painted(empty, asked(empty, rows, (8, 8), 16)) for rows in (2, 5))
    assert two.times(2.5).flops == five.flops
    assert five.bytes <= two.times(2.5).bytes < 2 * five.bytes
    assert getattr(adapters, adapters.FAMILIES[type(pipe).__name__]).targets(empty)


def test_the_weights_of_a_run_are_counted_to_the_byte(config_at, generator_folder):
    config = load(Config, config_at("counted", finetune={"lora": {"rank": 3}}))
    need = next(need for need in forecast.needs(config, 1, 2**40) if need.stage == "finetune")
    generator = load_generator(generator_folder)
    assert need.held["network"] == need.held["twin"] == metering.size(generator.transformer)
    assert need.held["codec"] == metering.size(generator.codec)
    lora.attach(generator.transformer, generator.lora_targets, rank=3, alpha=3, seed=0)
    trained = sum(weight.numel() for weight in generator.transformer.parameters() if weight.requires_grad)
    assert need.held["trained"] == 5 * 4 * trained
    assert need.total == sum(need.held.values()) + max(need.phases.values())


@pytest.fixture(scope="module")
def medium():
    """SD3.5-Medium as somebody would try it first."""
    wasteful = [
        *("finetune.gradient_checkpointing=false", "finetune.batch=32"),
        *("generator.dtype=float32", "generator.offload=false"),
    ]
    return lambda *more: load(Config, HOME / "configs" / "sd35_medium.yaml", [*wasteful, *more])


def finetune(config):
    return next(need for need in forecast.needs(config, 1, 24 * forecast.GIB) if need.stage == "finetune")


def test_a_remedy_keeps_what_it_promises(medium):
    room = 24 * forecast.GIB
    assert finetune(medium()).total > room
    found = forecast.remedy(medium(), "finetune", room, 1)
    assert found.need.total <= room
    assert finetune(medium(*found.settings)) == found.need
    assert "finetune.gradient_checkpointing=true" in found.settings
    line = forecast.refusal(medium(), finetune(medium()), room, 1)
    assert all(setting in line for setting in found.settings)


def test_each_setting_takes_away_what_it_is_for(medium):
    whole, parts = finetune(medium()), finetune(medium("generator.offload=true"))
    assert set(whole.held) - set(parts.held) == {"encoders", "codec"}
    assert finetune(medium("finetune.twin=false")).total == whole.total - whole.held["twin"]
    kept = finetune(medium("finetune.gradient_checkpointing=true")).phases["learning"]
    assert kept < whole.phases["learning"] / 4
    assert finetune(medium("generator.guidance=4.5")).phases["learning"] == pytest.approx(
        2 * whole.phases["learning"], rel=0.05
    )
    assert finetune(medium("finetune.watch.judge=true")).total > whole.total


def test_a_pair_is_two_rows_and_what_follows_the_reward_is_told(medium):
    kinds = {kind: finetune(medium("finetune.batch=1", f"finetune.algorithm={{type: {kind}}}")) for kind in LEARNED}
    one = kinds["grpo"].phases["learning"]
    assert kinds["dpo"].phases["learning"] == kinds["d3po"].phases["learning"] == pytest.approx(2 * one, rel=0.01)
    assert [kind for kind, need in kinds.items() if need.notes] == ["draft"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_can_be_read_for_all_cards_that_they_name(path):
    assert set(cards(path)) == {"24", "80", "8 x 80"}
    for card, command in cards(path).items():
        config = load(Config, path, overrides(command))
        assert config.name == path.stem
        if "configs/" not in command:
            assert forecast.Painter(config).weights > 0.9 * int(card) * forecast.GIB


OWN = {
    "name",
    "generator.checkpoint",
    "generator.guidance",
    "generator.resolution",
    "sample.batch",
    "sample.steps",
    "evaluate.batch",
    "evaluate.steps",
    "judge.model.checkpoint",
    "reward.backbone.checkpoint",
    "reward.backbone.processor",
    "finetune.algorithm.clip",
    "finetune.algorithm.eta",
    "finetune.algorithm.kl",
    "finetune.algorithm.sampler",
    "finetune.batch",
    "finetune.learning_rate",
    "finetune.lora.alpha",
    "finetune.lora.rank",
    "finetune.steps",
    "finetune.watch.judge",
}
"""Settings in which the shipped configs may differ; a change of any other is one of all of them."""


def test_the_configs_differ_only_where_they_may():
    def settings(node, way=()):
        if not isinstance(node, dict):
            return {".".join(way): node}
        return {name: value for key, each in node.items() for name, value in settings(each, (*way, key)).items()}

    told = [settings(yaml.safe_load(path.read_text())) for path in CONFIGS]
    names = {name for each in told for name in each}
    differing = {name for name in names if len({json.dumps(each.get(name)) for each in told}) > 1}
    assert differing == OWN


@pytest.mark.parametrize("name", ["sd35_medium", "sana"])  # seven would take more than half a minute
def test_the_configs_fit_the_cards_that_they_name(name):
    path = HOME / "configs" / f"{name}.yaml"
    for card, command in cards(path).items():
        room = int(card.split()[-1]) * forecast.GIB
        config = load(Config, path, overrides(command))
        for need in forecast.needs(config, 8 if card.startswith("8") else 1, room):
            assert need.total < room, (card, need)


def test_what_is_proposed_suits_the_other_settings(config_at):
    """A generator of ours takes no dtype, and what the watch or a KL asks keeps the base."""
    whole = {"lora": None, "learning_rate": 1e-4}
    watched, alone = {}, {"watch": None, "algorithm": {"type": "grpo", "last_start": 1, "kl": 0.0}}
    for name, more in (("watched", watched), ("alone", alone)):
        path = config_at(name, finetune={**whole, **more})
        found = forecast.remedy(load(Config, path), "finetune", 1, 1).settings
        assert not [setting for setting in found if setting.startswith("generator.")]
        assert ("finetune.keep_base=false" in found) == (name == "alone")
        assert load(Config, path, found)
    assert "finetune.lora" in [name for name, *_ in forecast._smaller(load(Config, path), "finetune", 1, 1)]
    large = load(Config, config_at("adapter", finetune={"lora": {"rank": 64}}))
    assert "finetune.lora.rank=1" in forecast.remedy(large, "finetune", 1, 1).settings


def test_rewards_that_are_checkpoints_are_no_part_of_training_one(config_at, judge_folder):
    one = {"type": "checkpoint", "path": str(judge_folder / "itm")}
    needs = {}
    for name, reward in (("model", "model"), ("other", {"terms": [one]})):
        config = load(Config, config_at(f"rewarded-by-{name}", finetune={"reward": reward}))
        needs[name] = {need.stage: need.held for need in forecast.needs(config, 1, 2**40)}
    assert needs["model"]["reward"] == needs["other"]["reward"]
    weights = needs["model"]["reward"]["reward"]
    assert needs["model"]["finetune"]["reward"] == needs["other"]["finetune"]["reward"] == weights
    assert 0 < needs["model"]["reward"]["trained"] < 3 * weights
    full = load(Config, config_at("full", reward={"train": {"type": "full"}}))
    held = next(need.held for need in forecast.needs(full, 1, 2**40) if need.stage == "reward")
    assert held["trained"] == pytest.approx(3 * weights, rel=0.01)  # buffers have no gradient


def test_a_family_that_is_not_supported_is_bad_input(tmp_path, config_at):
    folder = tmp_path / "kandinsky"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    path = config_at("unsupported", generator={"checkpoint": str(folder)})
    for verb in (lambda: cli.plan(path, []), lambda: pipeline.run(path)):
        with pytest.raises(UserError, match=r"generator\.checkpoint: .* is a KandinskyPipeline; supported are DiT"):
            verb()


def test_what_nobody_measured_is_no_number(config_at, capsys):
    asked = {"type": "chat", "checkpoint": "Qwen/Qwen2.5-VL-3B-Instruct"}
    path = config_at("unmeasured")
    cli.plan(path, [])
    assert "?" not in capsys.readouterr().out
    known = FINETUNE.work(load(Config, path)).seconds
    assert EVALUATE.work(load(Config, path, [f"judge.model={json.dumps(asked)}"])).unknown == ("the judge",)
    shown = load(Config, path, [f"judge.model={json.dumps(asked)}", "generator.checkpoint=nobody/nothing"])
    assert JUDGE.work(shown).seconds is None
    assert SAMPLE.work(shown).seconds is None
    assert FINETUNE.work(shown).seconds is None
    heun = load(Config, path, ["finetune.algorithm={type: nft, sampler: heun}", "finetune.watch=null"])
    euler = load(Config, path, ["finetune.algorithm={type: nft}", "finetune.watch=null"])
    steps = euler.finetune.steps
    assert FINETUNE.work(heun).seconds == pytest.approx(FINETUNE.work(euler).seconds * (2 * steps - 1) / steps)
    assert known > 0


def test_a_device_that_is_not_used_is_not_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert forecast.device_memory(2) == psutil.virtual_memory().total // 2


def test_a_plan_needs_no_network_and_refuses_what_does_not_fit(monkeypatch, capsys):
    def refuse(*asked, **more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    path = HOME / "configs" / "sd35_medium.yaml"
    cli.plan(path, [], memory=24, rate=100)
    shown = capsys.readouterr().out
    assert "finetune" in shown
    assert "device" in shown
    with pytest.raises(UserError, match=r"memory: sample needs \d+\.\d GiB a process at least, and there are 4\.0"):
        cli.plan(path, [], memory=4, rate=100)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_done(tmp_path, config_at, monkeypatch):
    FAMILIES["sd3"].build().save_pretrained(tmp_path / "sd3")
    told = {"checkpoint": str(tmp_path / "sd3"), "resolution": 32, "max_tokens": 12}
    path = config_at("refused", generator=told)
    monkeypatch.setattr(forecast, "device_memory", lambda processes=1: 2**16)
    with pytest.raises(UserError, match=r"memory: sample needs .* GiB a process at least, and there are 0\.00"):
        pipeline.run(path)
    assert not (path.parent / "refused").exists()


def test_a_size_that_is_not_painted_is_refused_before_anything_is_done(tmp_path, config_at, generator_folder):
    FAMILIES["sd3"].build().save_pretrained(tmp_path / "sd3")
    for checkpoint, resolution, line in (
        (tmp_path / "sd3", 18, r"generator\.resolution: 18 is no multiple of 4; take 16 or 20"),
        (tmp_path / "sd3", 64, r"generator\.resolution: 64 is above the 32 pixels"),
        (generator_folder, 20, r"generator\.resolution: 20 is no multiple of 8"),
    ):
        path = config_at("sized", generator={"checkpoint": str(checkpoint), "resolution": resolution})
        for command in (pipeline.run, lambda path: cli.plan(path, [])):
            with pytest.raises(UserError, match=f"^{line}"):
                command(path)
        assert not (path.parent / "sized").exists()
