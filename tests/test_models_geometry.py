"""What a checkpoint looks like, from its configs alone."""

import json

import pytest

from models.geometry import Part, Unknown, asked, geometry
from models.metering import painted


@pytest.mark.parametrize("kind", ["NoSuchModel", "DDIMScheduler", "AutoTokenizer"])
def test_a_class_that_is_no_network_here_is_one_line(kind):
    with pytest.raises(Unknown, match=f"^{kind} is none of the networks of diffusers or transformers"):
        Part(kind, {}).build()


def test_a_config_that_names_no_class_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(Unknown, match=r"^a model without a name is none of the networks"):
        geometry(str(tmp_path)).parts["model"].build()


def test_a_network_of_ours_takes_as_much_text_as_its_encoder_reads(generator_folder):
    looks = geometry(str(generator_folder))
    assert looks.text_tokens == looks.parts["text_encoder"].config["max_position_embeddings"]
    network = looks.network.build()
    few, many = (painted(network, asked(network, 1, (8, 8), count)).flops for count in (1, looks.text_tokens))
    assert few < many
