"""
The storyteller learns to answer, as far as it can: the form of a chat, short answers, stories on request.

What it cannot learn here is what a question is about. It has read stories in a child's words and nothing
else: no facts, no code, no arithmetic. Of an answer it gets the tone and the length, seldom the content. A
model that has read the web in small: config/evening_sft.py
"""

from dataclasses import replace

from config.day_sft import RECIPE
from config.stories import config as pretraining

config = replace(
    pretraining, init_from=f"{pretraining.out_dir}/pretrain",
    **RECIPE | {"data": (("smol-smoltalk", 0.1),)},  # 46,000 chats; all would be more than it has read
    micro_batch=16, lr=pretraining.lr / 3,
)
