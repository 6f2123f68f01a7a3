"""
The day's model learns to answer, from the 460,000 chats with which SmolLM2's small models were fine-tuned.

smol-smoltalk leaves out what models of this size fail at anyway: long answers, function calls, advanced
mathematics. Only answers are targets.
"""

from dataclasses import replace

from config.day import config as pretraining

RECIPE = dict(  # shared by stories, evening and day
    data=(("smol-smoltalk", 1.0),), fractions=True,
    doc_mask=True,  # a row holds several chats, and none of them is about another. why: no_mask
    max_steps=0, epochs=1,  # SmolLM2's two would be a third as much text as pretraining had
    batch=64,  # half of SmolLM-Instruct's 128, for twice the steps
    schedule="cosine", warmup_steps=0, warmup_ratio=0.1, decay_steps=None,  # as in SmolLM-Instruct,
    beta2=0.999, weight_decay=0.0,  # and so are these
    eval_every=200, save_every=1000, sample_every=200, keep_checkpoints=3,
)

config = replace(
    pretraining, init_from=f"{pretraining.out_dir}/pretrain", **RECIPE,
    micro_batch=4,  # half of pretraining's: the document mask needs memory
    lr=pretraining.lr / 3,  # SmolLM2: 1e-3 after 3e-3
)
