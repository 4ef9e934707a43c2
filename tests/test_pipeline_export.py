"""What is exported paints what the run painted: reloaded here, in a fresh process, and by diffusers' own readers."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file

import pipeline
from models import kohya, lora
from models.keys import sample_key
from models.loading import load_generator
from models.lora import WEIGHTS
from models.samplers import keyed_noise
from pipeline import cli
from pipeline.config import Config
from pipeline.settings import UserError, dump, load
from pipeline.store import Artifact, read_rows
from pipeline.verbs import export as verb
from tests.processes import python
from tests.tiny_pipelines import FAMILIES, Family


@pytest.fixture(scope="module")
def run(config_at, folder):
    """A finished run of a generator of ours."""
    path = config_at("exported", finetune={"lora": {"rank": 4, "alpha": 6}, "learning_rate": 1e-2})
    pipeline.run(path)
    return folder / "exported"


@pytest.fixture(scope="module")
def exported(run):
    """The folder of each format."""
    for kind in ("diffusers", "comfyui", "merged"):
        cli.export(run, kind)
    return {kind: run / "export" / kind for kind in ("diffusers", "comfyui", "merged")}


@pytest.fixture(scope="module")
def pictures(run):
    """What `evaluate` kept of the tuned generator: prompts, keys and pictures."""
    config = load(Config, run / "config.yaml")
    rows = [row for row in read_rows(Artifact(run / "evaluate")).to_list() if row["model"] == "tuned"]
    keys = [sample_key(config.seed, "evaluate", row["prompt_id"], row["sample"]) for row in rows]
    shown = read_rows(Artifact(run / "evaluate"))
    images = [np.asarray(row["image"]) for row in shown if row["model"] == "tuned"]
    return [row["prompt"] for row in rows], keys, np.stack(images)


PAINT = """
import sys, numpy
from pathlib import Path
from pipeline.config import Config
from pipeline.settings import load
from models.loading import load_generator
config = load(Config, Path(sys.argv[1]) / "config.yaml")
generator = load_generator(*sys.argv[2:4])
prompts, keys = sys.argv[5].split("|"), [int(key) for key in sys.argv[6].split("|")]
numpy.save(sys.argv[4], numpy.stack(list(config.evaluate.paint(generator, prompts, keys))))
"""


@pytest.fixture(scope="module")
def repainted(run, exported, pictures):
    """The same prompts and keys by the base model, and by each export."""
    config, (prompts, keys, _) = load(Config, run / "config.yaml"), pictures
    base = config.generator.checkpoint
    sources = {
        "base": (base, None),
        "diffusers": (base, exported["diffusers"]),
        "comfyui": (base, exported["comfyui"]),
        "merged": (exported["merged"], None),
    }
    generators = {kind: load_generator(*source) for kind, source in sources.items()}
    return {kind: np.stack(list(config.evaluate.paint(each, prompts, keys))) for kind, each in generators.items()}


@pytest.mark.parametrize("kind", ["diffusers", "comfyui", "merged"])
def test_an_export_paints_the_pictures_of_the_evaluation(pictures, repainted, kind):
    *_, images = pictures
    assert np.abs(repainted[kind].astype(int) - images).max() <= 1
    assert np.abs(repainted["base"].astype(int) - images).max() > 1


def test_a_fresh_process_paints_the_same(run, exported, pictures, repainted, tmp_path):
    prompts, keys, _ = pictures
    checkpoint = load(Config, run / "config.yaml").generator.checkpoint
    painted = tmp_path / "painted.npy"
    told = [run, checkpoint, exported["comfyui"], painted, "|".join(prompts), "|".join(map(str, keys))]
    done = python("-c", PAINT, *told)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(np.load(painted), repainted["comfyui"])


def test_the_card_has_the_figures_of_the_summary_and_no_place_on_this_machine(run, exported):
    numbers = json.loads((run / "summary.json").read_text())
    for folder in exported.values():
        card = (folder / "README.md").read_text()
        assert card.startswith("---\ntags:\n")
        for model in ("base", "tuned"):
            assert f"{100 * numbers['generator'][model]['gold']:.1f}" in card
            assert "–".join(f"{100 * end:.1f}" for end in numbers["generator"][model]["interval"]) in card
        assert f"{numbers['generator']['tuned']['reward']:.3f}" in card
        assert "None of" in card or "The training" in card or "Nothing can be said" in card
        assert "type: grpo" in card
        assert "iterations: 4" in card
        assert str(run.parent) not in card
        assert "without classifier-free guidance" not in card
        assert json.loads((folder / "summary.json").read_text()) == numbers
        assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
        for path in folder.rglob("*.json"):
            assert str(run.parent) not in path.read_text()


def test_the_card_says_where_a_base_was_painted_without_guidance(run, tmp_path):
    config, stages = load(Config, run / "config.yaml", ["generator.guidance=1"]), (run / "finetune", run / "evaluate")
    verb.Job(config, run, "diffusers", *map(Artifact, stages), Artifact(tmp_path / "card")).write()
    assert "without classifier-free guidance" in (tmp_path / "card" / "README.md").read_text()


def test_an_export_stands_until_the_run_changes(run, exported, capsys):
    before = (exported["diffusers"] / "manifest.json").stat().st_mtime_ns
    cli.export(run, "diffusers")
    assert "nothing left to do" in capsys.readouterr().out
    assert (exported["diffusers"] / "manifest.json").stat().st_mtime_ns == before


def test_bad_input_is_one_line_and_nothing_is_lost(run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; name another folder by --to"):
        cli.export(run, "diffusers", tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"
    with pytest.raises(UserError, match="--format: unknown onnx; known here: diffusers, comfyui, merged"):
        cli.export(run, "onnx")
    for name in ("not a repository", "painter"):
        with pytest.raises(UserError, match=r"--push: .*write owner/name"):
            cli.export(run, "diffusers", push=name)
    with pytest.raises(UserError, match=r"config.yaml: No such file"):
        cli.export(tmp_path, "diffusers")


class Hub:
    """A hub that remembers what it was told."""

    told: ClassVar[list] = []

    def create_repo(self, repo, **settings):
        self.told.append((repo, settings))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.told.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), commit_message))
        return f"https://hub/{repo_id}"


def test_a_push_goes_to_a_private_repository(run, exported, monkeypatch, capsys):
    monkeypatch.setattr(verb, "HfApi", Hub)
    cli.export(run, "diffusers", push="somebody/painter")
    (repo, settings), (_, names, message) = Hub.told
    assert (repo, settings) == ("somebody/painter", {"private": True, "exist_ok": True})
    assert {"README.md", WEIGHTS, "samples.png", "summary.json"} <= set(names)
    assert message == "exported: diffusers"
    assert "https://hub/somebody/painter" in capsys.readouterr().out


def answer(status):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"{status} from the hub\n\nmore of it", response=response)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (answer(403), "403 from the hub; `hf auth login` with a token that may write, and try again"),
        (answer(503), "503 from the hub; try again"),
        (LocalTokenNotFoundError("a token is missing"), "a token is missing; `hf auth login` with"),
        (OSError(28, "No space left on device"), r"\[Errno 28\] No space left on device; try again"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line(run, exported, error, line, monkeypatch):
    def refuse(self, repo, **settings):
        raise error

    monkeypatch.setattr(Hub, "create_repo", refuse)
    monkeypatch.setattr(verb, "HfApi", Hub)
    with pytest.raises(UserError, match=f"^--push: somebody/painter: {line}"):
        cli.export(run, "diffusers", push="somebody/painter")


@dataclass(frozen=True)
class Tuned:
    """A run whose finetune stands, of a family of diffusers, and the velocities of its generator and of the base."""

    run: Path
    config: Config
    family: Family
    velocity: torch.Tensor
    untuned: torch.Tensor


@pytest.fixture(scope="module", params=["sd3", "sdxl", "pixart_sigma"])
def tuned(request, tmp_path_factory, config_at):
    family = FAMILIES[request.param]
    base = family.saved(tmp_path_factory)
    asked = {"checkpoint": str(base), "resolution": 16, "guidance": 1.0, "max_tokens": 12}
    if request.param == "sdxl":
        del asked["max_tokens"]
    config = load(Config, config_at(f"{request.param}-export", generator=asked))
    run, generator = tmp_path_factory.mktemp("tuned"), config.generator.build("cpu")
    untuned = velocity(generator)
    lora.attach(generator.transformer, generator.lora_targets, rank=4, alpha=6, seed=0)
    random = torch.Generator().manual_seed(1)
    for name, weight in generator.transformer.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=random)
    artifact = Artifact(run / "finetune")
    artifact.begin("tuned")
    artifact.write_folder("lora", lambda place: lora.save(generator.transformer, place, generator.lora_prefix))
    artifact.finish({})
    (run / "config.yaml").write_text(dump(config))
    return Tuned(run, config, family, velocity(config.generator.build("cpu", run / "finetune" / "lora")), untuned)


@torch.no_grad()
def velocity(generator):
    x = keyed_noise([1, 2], generator.latent_shape)
    return generator.predict(x, 0.5, generator.encode(["a red circle", "a blue square above a green circle"]))


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_diffusers_own_reader_takes_an_exported_adapter(tuned, kind):
    cli.export(tuned.run, kind)
    folder = tuned.run / "export" / kind
    generator = tuned.config.generator.build("cpu", folder)
    assert torch.allclose(velocity(generator), tuned.velocity, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tuned.untuned, tuned.velocity, atol=1e-3)
    card = (folder / "README.md").read_text()
    assert ("pipe.load_lora_weights" in card) == (tuned.family.loads_lora and kind == "diffusers")
    if not tuned.family.loads_lora:
        return
    pipe = DiffusionPipeline.from_pretrained(tuned.config.generator.checkpoint)
    pipe.load_lora_weights(folder)
    assert torch.allclose(velocity(type(generator)(pipe, generator.options)), tuned.velocity, atol=1e-5, rtol=1e-4)


def test_a_merged_export_is_a_pipeline_of_its_own(tuned):
    cli.export(tuned.run, "merged")
    folder = tuned.run / "export" / "merged"
    moved = tuned.config.generator.model_copy(update={"checkpoint": str(folder)})
    assert torch.allclose(velocity(moved.build("cpu")), tuned.velocity, atol=1e-5, rtol=1e-4)
    assert "Nothing was measured on it" in (folder / "README.md").read_text()


def test_comfyui_names_layers_as_it_does(tuned):
    cli.export(tuned.run, "comfyui")
    names = load_file(tuned.run / "export" / "comfyui" / WEIGHTS)
    if "sdxl" in tuned.config.name:
        one = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        assert {f"{one}.lora_down.weight", f"{one}.lora_up.weight", f"{one}.alpha"} <= set(names)
        assert all(float(value) == 4 for name, value in names.items() if name.endswith(".alpha"))
    else:
        assert {name.partition(".")[0] for name in names} == {"transformer"}
        assert not [name for name in names if name.endswith("alpha")]


def test_kohyas_names_come_back_with_their_scale():
    layers = {"blocks.0.out": (torch.ones(2, 3), torch.ones(5, 2))}
    network = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"out": torch.nn.Linear(3, 5)})])}
    )
    tensors = kohya.named(layers, "SomethingElse")
    assert all(
        torch.equal(kohya.dotted(tensors, network)[f"blocks.0.out.lora_{side}.weight"], one)
        for side, one in zip("AB", layers["blocks.0.out"], strict=True)
    )
    halved = {**tensors, "lora_unet_blocks_0_out.alpha": torch.tensor(1.0)}
    assert torch.equal(kohya.dotted(halved, network)["blocks.0.out.lora_B.weight"], torch.full((5, 2), 0.5))
    with pytest.raises(ValueError, match="lora: lora_unet_gone"):
        kohya.dotted({"lora_unet_gone.lora_down.weight": torch.ones(1, 1)}, network)
