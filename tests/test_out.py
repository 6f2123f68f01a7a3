"""What is trained here, in the hands of transformers: the folder is opened as it is, by its Auto classes."""

import logging
import warnings

import pytest
import torch
from conftest import TINY
from hub_layout import SMOLLM2, transformers

from config import Config
from model import IGNORE, SmolLM
from plumbing import checkpoint
from plumbing.processes import Run
from sample import generate
from tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "the cat 1+1="}, {"role": "assistant", "content": "the dog sat on a mat"}]


@pytest.fixture(scope="module", params=["SmolLM", "SmolLM2"])
def folder(request, tmp_path_factory, tok):
    """A checkpoint of a model that has learned one conversation by heart."""
    tok = Tokenizer(tok.rust, SMOLLM2) if request.param == "SmolLM2" else tok
    torch.manual_seed(0)
    model = SmolLM(Config(**TINY, seq_len=256, init_std=0.1))
    ids, mask = tok.chat(CHAT)
    targets = torch.tensor([[i if learned else IGNORE for i, learned in zip(ids[1:], mask[1:])]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = -model(torch.tensor([ids[:-1]]), targets).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    stage = tmp_path_factory.mktemp("stage")
    checkpoint.save_step(60, Run("sft", stage), model, tok.for_chat(), [optimizer], {"config": {}}, keep=3)
    return stage / "step_0000060"


@pytest.fixture(autouse=True)
def silence():
    """Neither a warning of Python nor a line in the log of transformers."""
    lines, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        yield
    logging.getLogger("transformers").removeHandler(handler)
    assert lines == [] and [str(warning.message) for warning in caught] == []


def test_the_auto_classes_open_a_step_folder_without_a_word_and_compute_the_same(folder):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or mismatched names
    their_tok, tok = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    assert (their_tok.bos_token_id, their_tok.eos_token_id, their_tok.pad_token_id) == (1, 2, 2)
    assert their_tok.model_max_length == theirs.config.max_position_embeddings
    text = "the cat 12 saw\n\n3 dogs"
    assert their_tok(text)["input_ids"] == tok.encode(text)
    ids = their_tok.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    assert ids == tok.chat(CHAT[:1], add_generation_prompt=True)[0]
    ids = torch.tensor([tok.chat(CHAT)[0]])
    torch.testing.assert_close(checkpoint.load(folder)[0](ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_generate_and_the_pipeline_say_what_we_say_and_stop_by_themselves(folder):
    model, tok = checkpoint.load(folder)
    prompt = tok.chat(CHAT[:1], add_generation_prompt=True)[0]
    ours = list(generate(model, prompt, 50, temperature=0, stop_ids=(0, 2)))
    assert tok.decode(ours) == CHAT[1]["content"]
    pipe = transformers.pipeline("text-generation", model=str(folder))
    (said,) = pipe(CHAT[:1], max_new_tokens=50, do_sample=False)
    assert said["generated_text"] == CHAT
    (said,) = pipe(CHAT[:1], max_new_tokens=50, do_sample=False, return_tensors=True)
    assert said["generated_token_ids"] == [*prompt, *ours, tok.im_end_id]
