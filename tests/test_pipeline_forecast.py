"""What a forecast says is what is true of small models, what is published of large ones, and what its remedies do."""

import re
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline
from models import adapters, lora, metering
from models.geometry import SHIPPED, Part, Unknown, asked, geometry
from models.loading import load_generator
from pipeline import cli, forecast
from pipeline.config import Config
from pipeline.doctoring.forecast import Saved
from pipeline.settings import UserError, load
from tests.tiny_pipelines import FAMILIES

HOME = Path(__file__).parent.parent
CONFIGS = sorted(
    path for path in (HOME / "configs").glob("*.yaml") if (SHIPPED / path.with_suffix(".json").name).is_file()
)
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
        *("finetune.twin=true", "generator.offload=false"),
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
    line = forecast.told(medium(), finetune(medium()), room, 1)
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_can_be_read_for_all_cards_that_they_name(path):
    assert set(cards(path)) == {"24", "80", "8 x 80"}
    for card, command in cards(path).items():
        config = load(Config, path, overrides(command))
        assert config.name == path.stem
        if "configs/" not in command:
            assert forecast.Painter(config).weights > 0.9 * int(card) * forecast.GIB


@pytest.mark.parametrize("name", ["sd35_medium", "sana"])  # the larger ones take a minute each
def test_the_configs_fit_the_cards_that_they_name(name):
    path = HOME / "configs" / f"{name}.yaml"
    for card, command in cards(path).items():
        room = int(card.split()[-1]) * forecast.GIB
        config = load(Config, path, overrides(command))
        for need in forecast.needs(config, 8 if card.startswith("8") else 1, room):
            assert need.total < room, (card, need)


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
