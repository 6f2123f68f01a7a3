"""
The first half of SmolLM-Instruct v0.1 as published: one epoch of WebInstructSub (the permissively licensed
parts) and Python exercises, with the loss on every token. To start from the released weights:
--init_from=HuggingFaceTB/SmolLM-135M
"""

from dataclasses import replace

from config.smol_135m import config as pretraining

RECIPE = dict(  # shared by all three sizes
    train_on_prompts=True, data=(("webinstruct", 1.0), ("self-oss-instruct", 1.0)), fractions=True,
    max_steps=0, epochs=1, batch=128, micro_batch=4,
    lr=3e-4, schedule="cosine", warmup_steps=0, warmup_ratio=0.1, decay_steps=None,
    beta1=0.9, beta2=0.999, weight_decay=0.0, seed=42,
    eval_every=200, save_every=200, sample_every=200,
)

config = replace(pretraining, init_from=f"{pretraining.out_dir}/pretrain", **RECIPE)
