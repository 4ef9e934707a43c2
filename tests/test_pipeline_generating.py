"""Settings of the generator, and a diffusers pipeline in the hands of the trainer."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import models.loading
from pipeline.config import Config
from pipeline.generating import GeneratorConfig
from pipeline.prompts import PromptRow
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.grpo import GRPOConfig
from pipeline.rl.nft import NFTConfig
from pipeline.rl.ppo import PPOConfig
from pipeline.rl.settings import LoraSettings, TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import SettingsError, UserError, load
from pipeline.store import hash_path
from rewards.reward import Rewards
from tests.tiny_pipelines import FAMILIES

PROMPTS = [PromptRow(text, "") for text in ("a red circle", "a blue square")]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["sd3"].saved(tmp_path_factory)


def settings(checkpoint: Path, **others) -> GeneratorConfig:
    return GeneratorConfig(checkpoint=str(checkpoint), **{"resolution": 16, "max_tokens": 12, **others})


def test_what_pictures_depend_on_is_what_changes_them(sd3, generator_folder):
    assert GeneratorConfig(checkpoint=str(generator_folder)).depends() == hash_path(generator_folder)
    own = settings(sd3).depends()
    assert settings(sd3, offload=False, cached_prompts=3, cache="elsewhere").depends() == own
    for change in ({"resolution": (16, 32)}, {"guidance": 2.0}, {"negative": "grey"}, {"codec_dtype": "bfloat16"}):
        assert settings(sd3, **change).depends() != own
    assert GeneratorConfig(checkpoint="owner/name", revision="a1").depends() == {
        "checkpoint": "owner/name",
        "revision": "a1",
    }


def test_guidance_is_a_number_or_a_section(sd3, config_at):
    path = config_at("guided", generator={"checkpoint": str(sd3), "guidance": 4})
    assert load(Config, path).generator.build("cpu").guidance.scale == 4
    given = ["generator.guidance={scale: 4, schedule: interval, high: 0.9}", "generator.resolution=[16, 24]"]
    generator = load(Config, path, given).generator.build("cpu")
    assert [generator.guidance.at(t) for t in (0.5, 0.95)] == [4, 1]
    assert generator.latent_shape == (4, 8, 12)
    with pytest.raises(SettingsError, match=r"generator\.guidance\.scale: .*greater than or equal to 1"):
        load(Config, path, ["generator.guidance={scale: 0.5}"])
    for wrong in ("{scale: 4, low: 0.5, high: 0.2}", "{scale: 2, least: 3}"):
        with pytest.raises(SettingsError, match=r"generator\.guidance: (low|least): "):
            load(Config, path, [f"generator.guidance={wrong}"])


def test_a_generator_of_ours_paints_at_the_resolution_that_is_set(generator_folder):
    for resolution, cells in ((None, (8, 8)), (48, (12, 12)), ((32, 48), (8, 12))):
        generator = GeneratorConfig(checkpoint=str(generator_folder), resolution=resolution).build("cpu")
        assert generator.latent_shape == (8, *cells)
        assert generator.pixel_shape == tuple(4 * side for side in cells)


def test_what_does_not_suit_the_checkpoint_names_the_setting(sd3, generator_folder):
    for checkpoint, change, line in (
        (sd3, {"resolution": 18}, r"generator\.resolution: 18 is no multiple of 4; take 16 or 20"),
        (sd3, {"embedded_guidance": 2.0}, r"generator\.embedded_guidance: "),
        (generator_folder, {}, r"generator\.max_tokens: .* is no pipeline of diffusers; leave it out"),
        (generator_folder, {"max_tokens": None, "resolution": 20}, r"generator\.resolution: 20 is no multiple of 8"),
    ):
        with pytest.raises(UserError, match=f"^{line}"):
            settings(checkpoint, **change).build("cpu")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (GatedRepoError, r"generator: a/b is gated; accept its licence at .*/a/b, then run `hf auth login`"),
        (RepositoryNotFoundError, "generator: a/b is neither a folder nor on the hub; run `hf auth login` if "),
        (RevisionNotFoundError, r"generator\.revision: a/b has no c"),
        (RemoteEntryNotFoundError, r"generator\.checkpoint: a/b is no pipeline of diffusers"),
        (LocalEntryNotFoundError, "generator: a/b is no folder here, and the hub cannot be asked"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_remedy(error, line, monkeypatch):
    def refuses(*_, **__):
        if error is LocalEntryNotFoundError:
            raise error("no connection")
        raise error("refused\nat length", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(models.loading, "hf_hub_download", refuses)
    with pytest.raises(UserError, match=f"^{line}"):
        GeneratorConfig(checkpoint="a/b", revision="c").build("cpu")


def test_prompts_are_kept_apart_by_what_encodes_them(sd3, tmp_path):
    for text_dtype in ("float32", "bfloat16"):
        for max_tokens in (10, 12):
            asked = settings(sd3, cache=str(tmp_path), text_dtype=text_dtype, max_tokens=max_tokens)
            asked.build("cpu").encode(["a red circle", "a red circle"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def brightness(images, prompts):
    return Rewards.of([image.mean() / 255 for image in images])


def trainer_of(checkpoint: Path, algorithm: AlgorithmConfig, dtype: str = "float32", **others) -> Trainer:
    process_state()
    asked = {"groups": 2, "group_size": 3, "steps": 3, "lora": LoraSettings(rank=2, alpha=4.0), "learning_rate": 1e-2}
    return Trainer(
        settings(checkpoint, guidance=2.0, dtype=dtype).build("cpu"),
        brightness,
        algorithm_of(algorithm),
        TrainerSettings(**{**asked, **others}),
        0,
        Accelerator(),
    )


@pytest.mark.parametrize("algorithm", [GRPOConfig(last_start=1), NFTConfig(), PPOConfig(window=1, last_start=1)])
def test_the_trainer_tunes_a_pipeline_of_diffusers(sd3, algorithm, tmp_path):
    trainer = trainer_of(sd3, algorithm)
    done = [trainer.iterate(PROMPTS) for _ in range(2)]
    assert done[0].images.shape == (6, 16, 16, 3)
    assert done[0].grad_norm > 0
    assert done[0].kl == pytest.approx(0, abs=1e-6)
    if done[0].ratio_error is not None:
        assert done[0].ratio_error < 1e-4
    with trainer.averaged():
        trainer.policy.save(tmp_path)
        noise = torch.randn(2, *trainer.generator.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            cond = trainer.generator.encode([prompt.text for prompt in PROMPTS])
            tuned = trainer.generator.predict(noise, 0.8, cond)
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3)
    pipe.load_lora_weights(tmp_path)
    loaded = type(trainer.generator)(pipe, trainer.generator.options)
    with torch.no_grad():
        assert torch.allclose(loaded.predict(noise, 0.8, cond), tuned, atol=1e-5)
        base = settings(sd3, guidance=2.0).build("cpu")
        assert not torch.allclose(base.predict(noise, 0.8, cond), tuned, atol=1e-5)


def test_an_adapter_on_bfloat16_weights_learns_in_float32(sd3):
    trainer = trainer_of(sd3, GRPOConfig(last_start=1), dtype="bfloat16")
    assert trainer.tuned.proj_out.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in trainer.trained} == {torch.float32}
    assert trainer.iterate(PROMPTS).ratio_error < 1e-6


@pytest.mark.parametrize("algorithm", [GRPOConfig(last_start=1), NFTConfig()], ids=["grpo", "nft"])
def test_what_rolls_out_is_what_learns_whatever_the_weights_are(sd3, algorithm, monkeypatch):
    """After a few steps, of which bfloat16 weights that an adapter is merged into would keep half."""
    coarse, exact = (trainer_of(sd3, algorithm, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert coarse.plain is coarse.tuned
    assert exact.plain is not exact.tuned
    for trainer in (coarse, exact):
        seen = []

        def loss(examples, v, asked=trainer.algorithm.loss, seen=seen):
            found = asked(examples, v)
            seen.append((v.policy - v.old).abs().max() if v.old is not None else found.ratio_error.max())
            return found

        monkeypatch.setattr(trainer.algorithm, "loss", loss)
        for _ in range(3):
            trainer.iterate(PROMPTS)
        assert max(seen) < 1e-5


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"twin": True}, r"finetune\.twin: merged into bfloat16 weights an adapter is lost .*; set it to null, or "),
        ({"lora": None}, r"generator\.dtype: full fine-tuning trains these weights.*; set it to float32, and "),
        ({"compile": True}, r"finetune\.compile: .* beside bfloat16 weights there is none; set it to false, or "),
        ({"updates": 2}, r"finetune\.twin: .* set generator\.dtype to float32, or finetune\.updates to 1"),
    ],
)
def test_what_coarse_weights_cannot_do_is_refused_by_the_settings_and_the_trainer(sd3, config_at, settings, line):
    with pytest.raises(UserError, match=f"^{line}"):
        trainer_of(sd3, NFTConfig(), dtype="bfloat16", **settings)
    path = config_at("coarse", generator={"checkpoint": str(sd3)}, finetune={"algorithm": {"type": "nft"}, **settings})
    load(Config, path)
    with pytest.raises(SettingsError, match=f"^command line: {line}" if "generator" in line[:12] else f": {line}"):
        load(Config, path, ["generator.dtype=bfloat16"])


def test_targets_of_the_adapter_are_a_setting(sd3):
    trainer = trainer_of(sd3, GRPOConfig(last_start=1), lora=LoraSettings(rank=2, targets=("attn.to_q",)))
    found = {name.split(".lora_")[0] for name, w in trainer.tuned.named_parameters() if w.requires_grad}
    assert found == {f"transformer_blocks.{block}.attn.to_q" for block in range(2)}
    with pytest.raises(UserError, match=r"^finetune\.lora\.targets: .*nowhere"):
        trainer_of(sd3, GRPOConfig(last_start=1), lora=LoraSettings(targets=("nowhere",)))


def test_a_whole_network_is_kept_and_loaded(sd3, tmp_path):
    trainer = trainer_of(sd3, GRPOConfig(last_start=1), lora=None, learning_rate=1e-3)
    trainer.iterate(PROMPTS)
    trainer.policy.save(tmp_path)
    again = settings(sd3).build("cpu", tmp_path)
    for (name, found), weight in zip(again.transformer.named_parameters(), trainer.trained, strict=True):
        assert torch.equal(found, weight), name
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(UserError, match=r"^generator\.lora: .* holds a FluxTransformer2DModel"):
        settings(sd3).build("cpu", tmp_path)
