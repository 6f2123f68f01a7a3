"""The evening's model learns to answer: half of smol-smoltalk's chats, about a sixth of what it has read."""

from dataclasses import replace

from config.day_sft import RECIPE
from config.evening import config as pretraining

config = replace(
    pretraining, init_from=f"{pretraining.out_dir}/pretrain",
    **RECIPE | {"data": (("smol-smoltalk", 0.5),)},
    micro_batch=8, lr=pretraining.lr / 3,
)
