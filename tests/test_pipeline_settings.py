"""Settings: what YAML and overrides may say, and the one line that answers a mistake."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.settings import Section, SettingsError, dump, load


class Grpo(Section):
    type: Literal["grpo"] = "grpo"
    clip: float = 1e-4
    kl: float = 0.0


class Ppo(Section):
    type: Literal["ppo"] = "ppo"
    betas: tuple[float, float] = (0.9, 0.999)
    kl: float = 0.0


class Finetune(Section):
    learning_rate: float = 3e-4
    group_size: Annotated[int, Field(ge=2)] = 8
    algorithm: Annotated[Grpo | Ppo, Field(discriminator="type")] = Grpo()
    stages: tuple[Grpo, ...] = ()
    window: int | tuple[float, ...] | None = None


class Root(Section):
    name: str
    finetune: Finetune = Finetune()


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    path = write(folder, text)
    with pytest.raises(SettingsError) as caught:
        load(Root, path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(path), "FILE")


def test_yaml_values_fill_the_fields(tmp_path):
    path = write(tmp_path, "name: größe\nfinetune: {learning_rate: 1e-4, algorithm: {type: ppo, betas: [0, 1]}}")
    root = load(Root, path)
    assert root.name == "größe"
    assert root.finetune.learning_rate == 1e-4
    assert root.finetune.algorithm == Ppo(betas=(0.0, 1.0))
    assert isinstance(root.finetune.algorithm.betas[0], float)


def test_overrides_are_yaml_laid_over_the_file_in_order(tmp_path):
    path = write(tmp_path, "name: a\nfinetune: {stages: [{clip: 1.0}]}")
    overrides = ("finetune.group_size=4", "name='2'", "finetune.group_size=6", "finetune.stages.0.clip=2e-1")
    root = load(Root, path, [*overrides, "finetune.window=[1, 2]", "finetune.algorithm={type: ppo}"])
    assert root.name == "2"
    assert root.finetune == Finetune(group_size=6, stages=(Grpo(clip=0.2),), window=(1.0, 2.0), algorithm=Ppo())


def test_another_type_keeps_what_it_knows_and_leaves_the_rest_behind(tmp_path):
    path = write(tmp_path, "name: a\nfinetune: {algorithm: {type: grpo, clip: 1.0, kl: 2.0}}")
    assert load(Root, path, ["finetune.algorithm.type=ppo"]).finetune.algorithm == Ppo(kl=2.0)
    both = ["finetune.algorithm.type=ppo", "finetune.algorithm.betas=[0, 1]"]
    assert load(Root, path, both).finetune.algorithm == Ppo(betas=(0.0, 1.0), kl=2.0)
    assert load(Root, path, ["finetune.algorithm={type: ppo}"]).finetune.algorithm == Ppo()
    assert load(Root, path, ["finetune.algorithm.type=grpo"]).finetune.algorithm == Grpo(clip=1.0, kl=2.0)


@pytest.mark.parametrize("name", ["plain", "1e-4", "2024-01-01", "yes", "a: b\nc", "größe"])
def test_dump_spells_out_defaults_and_reads_back(tmp_path, name):
    root = Root(name=name, finetune=Finetune(learning_rate=1e-7, algorithm=Ppo()))
    text = dump(root)
    assert "group_size: 8" in text
    assert load(Root, write(tmp_path, text)) == root


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        (
            "name: a\nfinetune: {lerning_rate: 1}",
            (),
            "FILE: unknown key finetune.lerning_rate; did you mean finetune.learning_rate?",
        ),
        ("nam: a", (), "FILE: unknown key nam; did you mean name?"),
        ("name: a\nzzz: 1", (), "FILE: unknown key zzz; known here: name, finetune"),
        (
            "name: a",
            ("finetune.algorithm.type=grpo", "finetune.algorithm.klip=1"),
            "command line: unknown key finetune.algorithm.klip; did you mean finetune.algorithm.clip?",
        ),
        (
            "name: a\nfinetune: {algorithm: {type: grpo, clip: 1.0}}",
            ("finetune.algorithm.clip=2.0", "finetune.algorithm.type=ppo"),
            "command line: unknown key finetune.algorithm.clip; known here: type, betas, kl",
        ),
        (
            "name: a\nfinetune: {algorithm: {type: grpo, klip: 1.0}}",
            ("finetune.algorithm.type=grpo",),
            "FILE: unknown key finetune.algorithm.klip; did you mean finetune.algorithm.clip?",
        ),
        (
            "name: a\nfinetune: {stages: [{}, {klip: 1}]}",
            (),
            "FILE: unknown key finetune.stages.1.klip; did you mean finetune.stages.1.clip?",
        ),
        (
            "name: a\nfinetune: {algorithm: {type: gppo}}",
            (),
            "FILE: finetune.algorithm.type: unknown gppo; did you mean ppo?",
        ),
        (
            "name: a\nfinetune: {algorithm: {clip: 1}}",
            (),
            "FILE: finetune.algorithm.type is required; known here: grpo, ppo",
        ),
        ("finetune: {}", (), "FILE: name is required"),
        (
            "name: a",
            ("finetune.group_size=1",),
            "command line: finetune.group_size: should be greater than or equal to 2, not 1",
        ),
        (
            "name: a\nfinetune: {group_size: '4'}",
            ("finetune.learning_rate=1",),
            "FILE: finetune.group_size: should be a valid integer, not '4'",
        ),
        ("name: a\nfinetune: {window: x}", (), "FILE: finetune.window: should be a valid integer, not 'x'"),
        (
            "name: a\nfinetune: {learning_rate: .nan}",
            (),
            "FILE: finetune.learning_rate: should be a finite number, not nan",
        ),
        ("name: a\nfinetune:", (), "FILE: finetune: expected a section, not nothing"),
        ("name: a", ("name.x=1",), "command line: name.x: name is 'a' and has no x"),
        ("name: a", ("resume",), "command line: 'resume' is no setting; write key.sub=value"),
        ("name: a\nname: b", (), "FILE: broken YAML at line 2, column 1: name stands twice"),
        ("- a", (), "FILE: expected `key: value` lines, found a list"),
        ("", (), "FILE: expected `key: value` lines, found nothing"),
        (b"name: \xff", (), "FILE: not UTF-8 at byte 6; save the file as UTF-8"),
        ("a: &a [*a]", (), "FILE: broken YAML at line 1, column 4: found unconstructable recursive node"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_remedy(tmp_path, text, overrides, line):
    assert refusal(tmp_path, text, *overrides) == line


@pytest.mark.parametrize("text", ["name: [a", "name: a\0", "[" * 5000, "? [a]\n: 1", "name: !!python/name:os.x"])
def test_broken_yaml_is_one_line(tmp_path, text):
    assert refusal(tmp_path, text).startswith("FILE: broken YAML")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(SettingsError, match=r"absent\.yaml: No such file"):
        load(Root, tmp_path / "absent.yaml")
    with pytest.raises(SettingsError, match="Is a directory"):
        load(Root, tmp_path)
