"""
sft.py: from a model that continues text to one that answers (supervised fine-tuning).

The loop is that of train.py, and so is the loss. The rows differ: they are conversations in the chat
template, and only what the assistant says is a target, its words and the <|im_end|> behind them:

    <|im_start|>user⏎hello<|im_end|>⏎<|im_start|>assistant⏎Hello! How can I help you?<|im_end|>⏎
                                                           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^

So the model learns when it is its turn, what to say then, and when to stop. A gentle learning rate and some
documents among the chats keep what it knows: fine-tuning can make a model forget within minutes.

    python sft.py config/demo_sft.py            writes out/demo/sft/step_.../                     next: dpo.py
"""

from dataclasses import replace

from plumbing import checkpoint
import config
from config import Config, UserError
from model import SmolLM
from packing import ChatBatches, pack
from plumbing.processes import start
from tokenizer import Tokenizer
from train import fit, fresh_or_loaded, loss_fn

PROMPTS = ("hello", "1+1=", "What is the capital of Italy?", "47+38=", "Who are you?")


def chat_model(cfg: Config) -> tuple[Config, SmolLM, Tokenizer]:
    """(cfg, model, tok) of cfg.init_from, the model set up to end what it says with <|im_end|>."""
    if not cfg.init_from:
        raise UserError("this stage continues from a model: name it with --init_from=out/demo/pretrain")
    if not cfg.fractions:
        raise UserError("this config is for train.py: its `data` are weights, and fractions are needed")
    tok = Tokenizer.load(checkpoint.find(cfg.init_from))
    cfg, model = fresh_or_loaded(replace(cfg, shard="1/1"))  # only data.py shares its work out
    model.stop_id, model.other_stop_ids = tok.im_end_id, []
    return cfg, model, tok


def ask(tok: Tokenizer, text: str) -> list[int]:
    """The ids of a question, up to where the answer begins."""
    return tok.chat([{"role": "user", "content": text}], add_generation_prompt=True)[0]


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    with start("sft", cfg) as run:
        cfg, model, tok = chat_model(cfg)
        run.prompts = {text: ask(tok, text) for text in PROMPTS}
        if run.rank == 0:
            pack(cfg, tok)
        run.wait()  # the others wait until the rows are there
        batches = ChatBatches(pack(cfg, tok), cfg, run.rank, run.world)
        run.cfg = cfg = replace(cfg, max_steps=cfg.max_steps or batches.steps())
        run.say(f"{batches.summary()}: {cfg.max_steps:,} steps from {cfg.init_from}")
        fit(cfg, run, model, tok, (batches, loss_fn))


if __name__ == "__main__":
    config.command(main)
