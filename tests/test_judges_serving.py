"""A checkpoint behind vLLM's server, here one that speaks its protocol: asked as `served` says, it answers the same."""

import jinja2
import numpy as np
import pytest
import torch
from transformers import Blip2Config, T5Config

from judges.base import Question
from judges.blip2 import load_blip2
from judges.chat import ChatVQA
from judges.replies import spelling_ids
from judges.server import ServerVQA
from judges.serving import PLAIN, served
from tests import tiny_chat
from tests.servers import ChatServer, reply

WANTED = [Question("is there a red circle?"), Question("is there a blue square?", expected="no")]


class Vllm:
    """What vLLM does with a request, for a BLIP-2: template, special tokens if asked for, and the tokens asked for."""

    def __init__(self, folder):
        self.vqa = load_blip2(folder)

    def __call__(self, seen) -> dict:
        tokenizer = self.vqa.tokenizer
        messages = [{"role": "user", "content": seen.texts[-1]}]
        text = jinja2.Template(PLAIN.read_text()).render(messages=messages)
        ids = tokenizer(text, add_special_tokens=seen.body["add_special_tokens"], return_tensors="pt").input_ids
        with torch.inference_mode():
            prefixes = self.vqa._look(self.vqa._pixels(seen.images))
            embedded = torch.cat([prefixes, self.vqa.model.get_input_embeddings()(ids)], 1)
            log_p = self.vqa.model.language_model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)
        listed = [
            {"token": tokenizer.convert_ids_to_tokens(token), "logprob": log_p[token].item()}
            for token in dict.fromkeys([int(log_p.argmax()), *seen.body["logprob_token_ids"]])
        ]
        return reply(listed[0]["token"], [{**listed[0], "top_logprobs": listed}])


def test_a_served_blip2_answers_as_with_transformers(judge_folder):
    folder = judge_folder / "vqa"
    found = served(folder, most_images=8)
    images = list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    asked = [WANTED] * 4
    with ChatServer(answer=Vllm(folder)) as server:
        told = {name: getattr(found, name) for name in ("template", "token_ids", "most_images", "extra_body")}
        answers = ServerVQA([server.url], "judge", **told).ask(images, asked)
    local = load_blip2(folder).ask(images, asked)
    margins = [[[answer.margin for answer in row] for row in rows] for rows in (answers, local)]
    assert np.std(margins[1]) > 1e-2
    assert margins[0] == pytest.approx(np.array(margins[1]), abs=1e-5)
    assert found.most_images == 1


def test_the_server_keeps_the_precision_and_shows_as_many_pictures_as_are_asked_for(judge_folder, tmp_path):
    assert {"--dtype=float32", '--limit-mm-per-prompt={"image": 1}', f"--chat-template={PLAIN}"} == set(
        served(judge_folder / "vqa", 8).arguments
    )
    model, processor = tiny_chat.llava()
    half = tiny_chat.save(model.to(torch.bfloat16), processor, tmp_path)
    assert served(half, 3).arguments == ('--limit-mm-per-prompt={"image": 3}',)


def test_a_chat_model_is_told_and_read_as_in_process(tmp_path):
    folder = tiny_chat.save(*tiny_chat.llava(), tmp_path)
    found, local = served(folder, 2), ChatVQA.from_pretrained(folder)
    assert found.template == local.template
    vocabulary = local.tokenizer.get_vocab()
    for labels in (("yes", "no"), ("A", "B", "C"), ("1", "2")):
        ids = {token for label in labels for token in found.token_ids[label]}
        assert ids == set(spelling_ids(vocabulary, labels))
    assert "Z" not in found.token_ids
    assert found.extra_body == {"add_special_tokens": True}


def test_what_vllm_does_not_run_is_refused(tmp_path, judge_folder):
    with pytest.raises(ValueError, match="has no language model to ask"):
        served(judge_folder / "itm", 1)
    Blip2Config(text_config=T5Config(num_layers=1).to_dict()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a BLIP-2 with a T5"):
        served(tmp_path, 1)
