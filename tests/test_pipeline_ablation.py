"""An ablation trains each variant alike, goes on where it was cut off, and puts all of them into one table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from models import load_generator, sample
from pipeline.progress import Progress
from pipeline.settings import SettingsError, load
from pipeline.stages import ablation, flow
from pipeline.stages.flow import gallery_of, held_out, measured, train_flow
from pipeline.stages.pretrain import GeneratorJob, PretrainConfig, pretrain

VARIANTS = {
    "axial": {"type": "mmdit"},
    "dit": {"type": "dit", "conditioning": "in-context", "positions": "sincos"},
    "fused": {"type": "mmdit", "fused": True},
}


@pytest.fixture
def config(tmp_path, generator_folder):
    """Writes the settings of a tiny ablation with the codec of a generator that was never trained."""

    def write(**changes):
        job = {
            "type": "ablation",
            "codec": str(generator_folder),
            "pictures": 8,
            "width": 32,
            "depth": 1,
            "batch": 4,
            "clean_steps": 1,
            "noisy_steps": 1,
            "language_steps": 1,
            "compile": False,
            "images": 6,
            "sides": [32, 48],
            "variants": VARIANTS,
            **changes,
        }
        settings = {"name": "tiny", "out": str(tmp_path / "runs"), "publish": str(tmp_path / "table"), "job": job}
        path = tmp_path / "ablation.yaml"
        path.write_text(yaml.safe_dump(settings))
        return load(PretrainConfig, path)

    return write


def table(tmp_path):
    return json.loads((tmp_path / "table" / "table.json").read_text())


def test_the_table_has_a_row_a_variant_and_a_column_a_size(config, tmp_path, capsys):
    pretrain(config())
    rows = table(tmp_path)["variants"]
    assert set(rows) == set(VARIANTS)
    for row in rows.values():
        assert set(row["gold"]) == {"32", "48"}
        for found in row["gold"].values():
            assert found["interval"][0] <= found["gold"] <= found["interval"][1]
            assert found["images"] == 6
    assert rows["axial"]["parameters"] > rows["dit"]["parameters"] > 0
    assert rows["fused"]["text_parameters"] > 0
    assert rows["fused"]["gflops"] < rows["axial"]["gflops"]
    assert rows["dit"]["network"]["conditioning"] == "in-context"
    assert f"{rows['dit']['parameters']:,}" in capsys.readouterr().out


def test_each_variant_is_a_generator_by_its_name_and_a_row_of_pictures(config, tmp_path):
    pretrain(config())
    rows = [list(sample(load_generator(tmp_path / "table" / name), held_out(2), range(2))) for name in VARIANTS]
    with Image.open(tmp_path / "table" / "samples-32.png") as image:
        shown = np.asarray(image)
    assert shown.shape[0] == 34 * len(VARIANTS) - 2
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            assert np.array_equal(shown[34 * row :, 34 * column :][:32, :32], picture)
    assert (tmp_path / "table" / "samples-48.png").is_file()


def test_what_is_done_is_not_trained_again_and_what_is_new_is(config, tmp_path, monkeypatch):
    trained = []

    def watched(job, generator, *rest):
        trained.append(generator.transformer.config.get("conditioning", "joint"))
        return flow.train_flow(job, generator, *rest)

    monkeypatch.setattr(ablation, "train_flow", watched)
    two = {name: VARIANTS[name] for name in ("axial", "dit")}
    pretrain(config(variants={"axial": two["axial"]}))
    assert trained == ["joint"]
    before = table(tmp_path)["variants"]["axial"]
    pretrain(config(variants=two))
    assert trained == ["joint", "in-context"]
    assert table(tmp_path)["variants"]["axial"] == before
    pretrain(config(variants=two, batch=5))
    assert len(trained) == 4


def test_what_is_measured_is_measured_once_and_trains_nothing_anew(config, tmp_path, monkeypatch):
    trained, asked = [], []

    def watched(*given):
        trained.append(given)
        return flow.train_flow(*given)

    def counted(generator, images):
        asked.append((generator.size, images))
        return measured(generator, images)

    monkeypatch.setattr(ablation, "train_flow", watched)
    monkeypatch.setattr(ablation, "measured", counted)
    one = {"variants": {"axial": VARIANTS["axial"]}}
    for changes in ({"sides": [32]}, {"sides": [32, 48]}, {"sides": [32], "images": 12}, {"sides": [32, 48]}):
        pretrain(config(**one, **changes))
    assert len(trained) == 1
    assert asked == [((8, 8), 6), ((12, 12), 6), ((8, 8), 12)]
    assert set(table(tmp_path)["variants"]["axial"]["gold"]) == {"32", "48"}


def test_a_variant_that_was_cut_off_ends_as_it_would_have(config, tmp_path, monkeypatch):
    steps = {"clean_steps": 4, "variants": {"axial": VARIANTS["axial"]}, "optimisation": {"save_every": 2}}
    loss_of, asked_for, last = flow.pretraining_loss, [], 3

    def cut(*asked):
        loss_at = loss_of(*asked)

        def at(step):
            asked_for.append(step)
            if step == last:
                raise KeyboardInterrupt
            return loss_at(step)

        return at

    def weights():
        (path,) = (tmp_path / "runs" / "tiny").glob("axial-*/checkpoint/transformer/*.safetensors")
        return path.read_bytes()

    pretrain(config(**steps))
    whole = weights()
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(flow, "pretraining_loss", cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(**steps))
    last = None
    pretrain(config(**steps))
    assert asked_for == [0, 1, 2, 3, 2, 3, 4]
    assert weights() == whole


def test_larger_pictures_are_read_at_the_oracles_size(generator_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(flow, "gold", lambda images, texts: seen.append(images) or [True] * len(images))
    generator = ablation.NativeGenerator.from_pretrained(generator_folder)
    assert measured(generator.at(48), 6)["gold"] == 1
    assert measured(generator, 6)["images"] == 6
    assert all(image.shape == (32, 32, 3) for images in seen for image in images)


def test_a_language_model_reads_first_and_is_then_frozen(config, tmp_path):
    def trained(steps):
        job = config(clean_steps=steps).job
        generator = job.new_generator(job.variants["fused"], 0)
        new = [parameter.clone() for parameter in generator.text_encoder.parameters()]
        gallery = gallery_of(generator.codec.requires_grad_(False), job.pictures, 0, Progress())
        train_flow(job, generator, gallery, 0, tmp_path / str(steps), Progress())
        return new, list(generator.text_encoder.parameters()), list(generator.transformer.parameters())

    (new, short, painter), (_, long, other) = trained(1), trained(3)
    assert any(not torch.equal(*both) for both in zip(new, short, strict=True))
    assert all(torch.equal(*both) for both in zip(short, long, strict=True))
    assert any(not torch.equal(*both) for both in zip(painter, other, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"wide": {"type": "mmdit", "kv_heads": 3}}}, r"variants\.wide: kv_heads: 1 heads cannot share 3"),
        ({"variants": {"named": {"type": "dit", "name": "DiT-M/2"}}}, "variants.named: name: unknown size DiT-M/2"),
        ({"variants": {"new": {"type": "unet"}}}, "unknown unet"),
        ({"variants": {"mixed": {"type": "mmdit", "positons": "mixed"}}}, "did you mean job.variants.mixed.positions"),
        ({"variants": {}}, "variants"),
        ({"sides": [36]}, "sides: 36 pixels are no multiple of 8"),
        ({"width": 40}, "width: 40 is no multiple of 32"),
        ({"codec": "nowhere"}, "codec: nowhere: holds no codec"),
    ],
)
def test_settings_that_cannot_be_are_named(config, changes, message):
    with pytest.raises(SettingsError, match=message):
        config(**changes)


@pytest.mark.parametrize("path", sorted(Path("configs/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_ablations_can_be_read(path):
    job = load(PretrainConfig, path).job
    assert len(job.variants) >= 5


def test_a_job_builds_the_network_that_its_settings_name():
    named = {"type": "dit", "name": "DiT-S/4", "conditioning": "adaln-zero", "positions": "sincos"}
    job = GeneratorJob.model_validate_json(json.dumps({"type": "generator", "network": named}))
    found = job.check(job.network, job.codec.empty())
    assert (found.config.width, found.config.depth, found.config.heads, found.config.patch) == (384, 12, 6, 4)
    assert all(parameter.device == torch.device("meta") for parameter in found.parameters())
