"""Small tables of the published schemas, written here, and what is made of their rows."""

import functools
import io
import json
import math
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rewards.readers import READERS, ReadPair, opened, read_pairs
from rewards.tables import Refused, Table


def png(number: int) -> bytes:
    """A picture that is told by its red channel."""
    with io.BytesIO() as file:
        Image.new("RGB", (6, 4), (number, 0, 0)).save(file, "PNG")
        return file.getvalue()


def number_of(image: np.ndarray) -> int:
    return int(image[0, 0, 0])


def read(reader: str, path: Path | str, split: str = "test") -> tuple[list[ReadPair], list[Refused]]:
    refused: list[Refused] = []
    return list(read_pairs(reader, Table(str(path), split), refused)), refused


def shown(reader: str, path: Path | str, split: str = "test") -> list[tuple[str, int, int, float]]:
    """Prompt, numbers of the two pictures and label of each pair, the lower number first."""
    found, refused = read(reader, path, split)
    rows = []
    for pair, first, second in opened(found, refused):
        a, b = number_of(first), number_of(second)
        rows.append((pair.prompt, a, b, pair.label) if a < b else (pair.prompt, b, a, 1 - pair.label))
    assert not refused
    return rows


def reasons(refused: list[Refused]) -> dict[int, str]:
    return {entry.row: entry.reason for entry in refused}


def write_parquet(path: Path, rows: list[dict], schema: pyarrow.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path


def write_pictures(folder: Path, names: dict[str, int]) -> None:
    for name, number in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def pickapic(number: int, **changes) -> dict:
    row = {
        "are_different": True,
        "best_image_uid": "u0",
        "caption": f"prompt {number}",
        "created_at": "2023-01-01",
        "has_label": True,
        "image_0_uid": "u0",
        "image_0_url": "https://example.org/0",
        "image_1_uid": "u1",
        "image_1_url": "https://example.org/1",
        "jpg_0": png(10 * number),
        "jpg_1": png(10 * number + 1),
        "label_0": 1.0,
        "label_1": 0.0,
        "model_0": "SDXL",
        "model_1": "dreamlike",
        "ranking_id": number,
        "user_id": 7,
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    }
    return {**row, **changes}


def own(number: int, **changes) -> dict:
    row = {"prompt": f"prompt {number}", "image_a": f"{number}a.png", "image_b": f"{number}b.png", "label": 0.7}
    return {**row, **changes}


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path, {f"{k}{side}.png": 2 * k + (side == "b") for k in range(9) for side in "ab"})
    return tmp_path


def test_pickapic(tmp_path):
    rows = [pickapic(0), pickapic(1, label_0=0.5, label_1=0.5), pickapic(2, label_0=0.0, label_1=1.0)]
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / "data" / "test-00001-of-00002.parquet", rows[2:])
    write_parquet(tmp_path / "data" / "test_unique-00000-of-00001.parquet", rows)
    assert shown("pickapic", tmp_path) == [
        ("prompt 0", 0, 1, 1.0),
        ("prompt 1", 10, 11, 0.5),
        ("prompt 2", 20, 21, 0.0),
    ]
    found, _ = read("pickapic", tmp_path)
    assert (found[2].row, found[2].model_a, found[2].model_b) == (3, "SDXL", "dreamlike")


def test_hpdv2(tmp_path):
    train = [
        {"human_preference": [0, 1], "prompt": "a cat", "file_path": ["0.jpg", "1.jpg"], "user_hash": "u"},
        {"human_preference": [1, 0], "prompt": "a dog", "file_path": ["2.jpg", "3.jpg"], "user_hash": "u"},
    ]
    votes = [{"rank": [1, 2, 3], "user_hash": "u"}]
    test = [{"prompt": "a cow", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 1, 2], "raw_annotations": votes}]
    (tmp_path / "train.json").write_text(json.dumps(train, indent=1))
    (tmp_path / "test.json").write_text(json.dumps(test))
    write_pictures(tmp_path / "train", {f"{k}.jpg": k for k in range(4)})
    write_pictures(tmp_path / "test", {f"{k}.jpg": 100 + k for k in range(3)})
    assert shown("hpdv2", tmp_path, "train") == [("a cat", 0, 1, 0.0), ("a dog", 2, 3, 1.0)]
    assert shown("hpdv2", tmp_path / "train.json") == shown("hpdv2", tmp_path, "train")
    assert sorted(shown("hpdv2", tmp_path)) == [
        ("a cow", 100, 101, 0.0),
        ("a cow", 100, 102, 0.5),
        ("a cow", 101, 102, 1.0),
    ]


def test_hpdv2_says_what_is_wrong_with_a_row(tmp_path):
    row = {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["0.jpg", "1.jpg"], "user_hash": "u"}
    bad = [{"human_preference": [1]}, {"file_path": ["0.jpg"]}, {"file_path": ["0.jpg", "9.jpg"]}, {"prompt": " "}]
    (tmp_path / "train.json").write_text(json.dumps([row, *({**row, **change} for change in bad)]))
    write_pictures(tmp_path / "train", {"0.jpg": 0, "1.jpg": 1})
    found, refused = read("hpdv2", tmp_path, "train")
    assert len(found) == 1
    assert reasons(refused) == {
        2: "human_preference: [1] are not 2 numbers, one for each picture",
        3: "file_path: does not name two pictures or more",
        4: "file_path: 9.jpg is not there",
        5: "prompt: ' ' is not text",
    }


def test_hpdv3(tmp_path):
    row = {"prompt": "a cat", "path1": "images/x/1.jpg", "path2": "images/x/2.jpg", "model1": "flux", "model2": "sdxl"}
    rows = [{**row, "confidence": None, "choice_dist": None}, {**row, "confidence": 0.9, "choice_dist": [12, 4]}]
    (tmp_path / "test.json").write_text(json.dumps([*rows, {**rows[1], "choice_dist": [0, 0]}]))
    write_pictures(tmp_path, {"images/x/1.jpg": 1, "images/x/2.jpg": 2})
    found, refused = read("hpdv3", tmp_path)
    assert [max(pair.label, 1 - pair.label) for pair in found] == [1.0, 0.75]
    assert {frozenset((pair.model_a, pair.model_b)) for pair in found} == {frozenset(("flux", "sdxl"))}
    assert reasons(refused) == {3: "choice_dist: [0, 0] are no votes"}
    for pair, first, second in opened(found, refused):
        better = pair.label > 0.5
        assert (number_of(first), pair.model_a) == ((1, "flux") if better else (2, "sdxl"))
        assert number_of(second) == (2 if better else 1)


@pytest.mark.parametrize("packed", [False, True])
def test_imagereward(tmp_path, packed):
    def row(prompt: int, picture: int, rank: int) -> dict:
        ratings = {"overall_rating": 5, "image_text_alignment_rating": 4, "fidelity_rating": 6}
        return {
            "image_path": f"images/test/test_1/{picture}.webp",
            "prompt_id": f"id-{prompt}",
            "prompt": f"prompt {prompt}",
            "classification": "People",
            "image_amount_in_total": 3,
            "rank": rank,
            **ratings,
        }

    rows = [row(0, 1, 2), row(0, 2, 1), row(0, 3, 2), row(1, 4, 1), row(1, 5, 2)]
    pictures = tmp_path / "images" / "test" / "test_1"
    write_pictures(pictures, {f"{k}.webp": k for k in range(1, 6)})
    if packed:
        with zipfile.ZipFile(pictures.with_suffix(".zip"), "w") as archive:
            for path in sorted(pictures.iterdir()):
                archive.write(path, path.name)
                path.unlink()
    write_parquet(tmp_path / "metadata-test.parquet", rows)
    wanted = [("prompt 0", 1, 2, 0.0), ("prompt 0", 1, 3, 0.5), ("prompt 0", 2, 3, 1.0), ("prompt 1", 4, 5, 1.0)]
    assert sorted(shown("imagereward", tmp_path)) == wanted
    if not packed:
        (pictures / "test_1.json").write_text(json.dumps(rows))
        assert sorted(shown("imagereward", pictures / "test_1.json")) == wanted
    found, _ = read("imagereward", tmp_path)
    assert {pair.prompt_id for pair in found} == {"id-0", "id-1"}
    assert {pair.skill for pair in found} == {"People"}

    write_parquet(tmp_path / "metadata-train.parquet", [*rows, row(0, 1, 1)])
    found, refused = read("imagereward", tmp_path, "train")
    assert len(found) == 4
    assert reasons(refused) == {6: "prompt_id: 'id-0' stood further up; keep the rows of a prompt together"}


def test_rewardbench(tmp_path):
    rows = [
        {
            "prompt": f"prompt {k}",
            "chosen": {"bytes": png(2 * k), "path": None},
            "rejected": {"bytes": png(2 * k + 1), "path": None},
            "chosen_model": "good",
            "rejected_model": "bad",
            "subset": "counting",
            "id": k,
        }
        for k in range(40)
    ]
    write_parquet(tmp_path / "test.parquet", rows)
    assert shown("rewardbench", tmp_path) == [(f"prompt {k}", 2 * k, 2 * k + 1, 1.0) for k in range(40)]
    found, _ = read("rewardbench", tmp_path)
    assert 10 < sum(pair.label for pair in found) < 30
    assert all(pair.model_a == ("good" if pair.label else "bad") and pair.skill == "counting" for pair in found)


def mmrb2(number: int, chosen: str) -> dict:
    empty = {"prompt_images": [], "prompt_metadata": "{}", "human_annotations": "[]"}
    sides = {
        f"response_{side}_{what}": value
        for side, model, shift in (("a", "x", 0), ("b", "y", 1))
        for what, value in (("text", ""), ("images", [png(2 * number + shift)]), ("model", model))
    }
    return {"pair_id": f"{number}", "prompt_text": "a cat", "prompt_source": "wise", "chosen": chosen, **empty, **sides}


def test_mmrb2(tmp_path):
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [mmrb2(0, "A"), mmrb2(1, "b"), mmrb2(2, "")])
    found, refused = read("mmrb2", tmp_path)
    assert [(pair.label, pair.model_a, pair.skill) for pair in found] == [(1.0, "x", "wise"), (0.0, "x", "wise")]
    assert reasons(refused) == {3: "chosen: '' is neither A nor B"}
    assert [number_of(first) for _, first, _ in opened(found, refused)] == [0, 2]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_own_tables_are_alike_in_every_form(own_folder, suffix):
    rows = [own(k, label=k / 10, score_a=0.5 * k, score_b=-1.0, skill="colours", prompt_id=f"p{k}") for k in range(9)]
    path = own_folder / f"mine{suffix}"
    if suffix == ".parquet":
        write_parquet(path, rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    assert shown("pairs", path) == [(f"prompt {k}", 2 * k, 2 * k + 1, pytest.approx(k / 10)) for k in range(9)]
    found, _ = read("pairs", path)
    assert [(pair.prompt_id, pair.score_a, pair.score_b) for pair in found] == [(f"p{k}", k / 2, -1) for k in range(9)]
    assert {(pair.source, pair.skill) for pair in found} == {(path.name, "colours")}


def test_bad_rows_are_told_and_good_ones_go_on(own_folder):
    (own_folder / "torn.png").write_bytes(png(1)[:50])
    (own_folder / "copy.png").write_bytes(png(0) + b"trailing bytes")
    bad = {
        2: ({"label": 1.2}, "label: 1.2 is no share from 0 to 1"),
        3: ({"label": math.nan}, "label: nan is no finite number"),
        4: ({"label": True}, "label: True is no finite number"),
        5: ({"image_b": None}, "image_b: is missing"),
        6: ({"image_b": "lost.png"}, "image_b: lost.png is not there"),
        15: ({"image_b": "iVBORw0K" * 1000}, "iVBORw0K\N{HORIZONTAL ELLIPSIS} is not there"),
        7: ({"image_b": "0a.png"}, "image_b: is the same picture as image_a"),
        8: ({"score_a": math.nan, "score_b": 0.0}, "score_a: nan is no finite number"),
        9: ({"score_a": 1.0}, "score_b: is empty"),
        10: ({"prompt": 5}, "prompt: 5 is not text"),
        13: ({"image_b": "torn.png"}, "torn.png: is truncated or damaged"),
        14: ({"image_b": "copy.png"}, "image_b: is the same picture as image_a"),
    }
    lines = [json.dumps(own(0, **bad[row][0] if row in bad else {})) for row in range(1, 17)]
    lines[10], lines[11] = "{broken", "[1]"
    path = own_folder / "mine.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    refused: list[Refused] = []
    good = list(opened(read_pairs("pairs", Table(str(path)), refused), refused))
    assert [pair.row for pair, _, _ in good] == [1, 16]
    told = reasons(refused)
    assert told.keys() == set(range(2, 16))
    assert all(part in told[row] for row, (_, part) in bad.items())
    assert told[11].startswith("broken JSON: ")
    assert told[12] == "is no row but list"
    assert all("\n" not in str(entry) and str(entry).startswith(f"mine.jsonl: row {entry.row}: ") for entry in refused)


def test_votes_that_do_not_add_up_are_refused(tmp_path):
    path = write_parquet(tmp_path / "test.parquet", [pickapic(0, label_0=0.0, label_1=0.0), pickapic(1)])
    found, refused = read("pickapic", path)
    assert [pair.row for pair in found] == [2]
    assert reasons(refused) == {1: "label_0: 0.0 and label_1, 0.0, do not add up to 1"}


def refusal(reader: str, path: Path | str, split: str = "test") -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(reader, path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_column_names_the_nearest(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({**own(0), "promt": "a"} | {"prompt": "b"}).replace('"prompt"', '"text"'))
    assert refusal("pairs", path) == "mine.jsonl: no column 'prompt'; did you mean 'promt'?"
    row = pickapic(0)
    row["captions"] = row.pop("caption")
    path = write_parquet(tmp_path / "some.parquet", [row])
    assert refusal("pickapic", path) == "some.parquet: no column 'caption'; did you mean 'captions'?"
    assert refusal("mmrb2", path).startswith("some.parquet: no column 'prompt_text'; ")
    path = write_parquet(tmp_path / "other.parquet", [{"x": 1}])
    assert refusal("hpdv2", path) == "other.parquet: no column 'prompt'; it has x"
    path.with_suffix(".json").write_text('[{"prompt": "a", "rank": [1]}]')
    assert "no column 'image_path' or 'file_path'; it has prompt, rank" in refusal("hpdv2", path.with_suffix(".json"))


def test_tables_that_are_none(tmp_path):
    assert "reader: 'pikapic' is none of pickapic, hpdv2" in refusal("pikapic", tmp_path)
    assert refusal("pairs", tmp_path / "none.jsonl").endswith("none.jsonl: No such file or directory")
    assert "tables are read from .parquet, .jsonl, .json, not .csv" in refusal("pairs", tmp_path / "mine.csv")
    (tmp_path / "train.json").write_text("[")
    assert f"{tmp_path}: has no table test{{.parquet,.jsonl,.json}}; there is train.json" in refusal("pairs", tmp_path)
    assert "train.json: broken JSON" in refusal("pairs", tmp_path, "train")
    (tmp_path / "train.json").write_text('{"prompt": 1}')
    assert "train.json: is no JSON array of rows" in refusal("pairs", tmp_path, "train")
    (tmp_path / "train.json").write_bytes(b"[\xff]")
    assert "train.json: not UTF-8 at byte 1" in refusal("pairs", tmp_path, "train")
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    assert "x.parquet: broken Parquet" in refusal("pairs", tmp_path / "x.parquet")


def test_rows_are_read_as_they_are_asked_for(own_folder):
    """A table that breaks off gives the pairs before it does."""
    path = own_folder / "mine.json"
    path.write_text(json.dumps([own(0), own(1)])[:-1] + ', {"prompt": ')
    pairs = read_pairs("pairs", Table(str(path)), [])
    assert [next(pairs).row, next(pairs).row] == [1, 2]
    with pytest.raises(ValueError, match=r"mine\.json: broken JSON"):
        next(pairs)


def test_a_hub_dataset_is_streamed_without_decoding(tmp_path, monkeypatch):
    features = datasets.Features({name: datasets.Image() for name in ("chosen", "rejected")})
    features["prompt"] = datasets.Value("string")
    rows = [{"prompt": f"prompt {k}", "chosen": {"bytes": png(k)}, "rejected": {"bytes": png(k + 9)}} for k in range(3)]
    rows[1]["chosen"]["bytes"] = b"no picture"
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    load = functools.partial(datasets.load_dataset, str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **options: load(*rest, **options))
    found, refused = read("rewardbench", "someone/some-pairs")
    assert [pair.row for pair, _, _ in opened(found, refused)] == [1, 3]
    assert {pair.source for pair in found} == {"someone/some-pairs[test]"}
    assert "is no picture in PNG, JPEG or WebP" in reasons(refused)[2]
    assert "no column 'caption'" in refusal("pickapic", "someone/some-pairs")
    assert refusal("rewardbench", "someone/some-pairs", "validation").startswith("someone/some-pairs: ")


def test_a_hub_table_of_paths_and_one_with_a_script_are_to_be_downloaded(tmp_path, monkeypatch):
    (tmp_path / "test.jsonl").write_text(json.dumps(own(0)))
    load = functools.partial(datasets.load_dataset, str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **options: load(*rest, **options))
    found, refused = read("pairs", "someone/some-pairs")
    assert not found
    assert "0a.png is a file on the hub; download the dataset and give its folder" in reasons(refused)[1]
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.csv").write_text("prompt,image_a,image_b,label\na cat,a.png,b.png,1\n")
    assert "a.png is a file on the hub" in reasons(read("pairs", "someone/some-pairs")[1])[1]
    (tmp_path / "test.csv").unlink()
    script = tmp_path / f"{tmp_path.name}.py"
    script.write_text("import datasets\n")
    assert "no script of a dataset is run; download its files" in refusal("pairs", "someone/some-pairs")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_member_that_is_broken_spoils_only_its_row(own_folder, compression):
    (own_folder / "8a.png").unlink()
    with zipfile.ZipFile(own_folder / "mine.zip", "w", compression) as archive:
        archive.writestr("8a.png", png(16))
    torn = bytearray((own_folder / "mine.zip").read_bytes())
    torn[36:60] = bytes(byte ^ 0xFF for byte in torn[36:60])
    (own_folder / "mine.zip").write_bytes(torn)
    (own_folder / "mine.json").write_text(json.dumps([own(8), own(1)]))
    found, refused = read("pairs", own_folder / "mine.json")
    assert [pair.row for pair in found] == [2]
    assert "image_a: 8a.png in mine.zip cannot be read" in reasons(refused)[1]


def test_swapping_twice_is_nothing(own_folder):
    (own_folder / "mine.json").write_text(json.dumps([own(0, score_a=1.0, score_b=2.0, model_a="x", model_b="y")]))
    (pair,), _ = read("pairs", own_folder / "mine.json")
    assert pair.swapped().swapped() == pair
    assert pair.swapped().image_a == pair.image_b
    assert (pair.swapped().score_a, pair.swapped().model_a) == (2.0, "y")


def test_every_reader_is_described():
    import rewards.readers

    assert all(f"    {name} " in rewards.readers.__doc__ for name in READERS)
