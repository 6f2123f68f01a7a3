"""The demo learns what people prefer: right, polite, whole answers that come to an end."""

from dataclasses import replace

from config.demo_sft import config as sft

config = replace(
    sft,
    init_from="out/demo/sft", data=(("builtin-pairs", 1.0),), doc_mask=False,
    dpo_beta=0.3, dpo_max_length=256, dpo_max_prompt_length=128,
    epochs=1, batch=32, micro_batch=32, optimizer="adamw", lr=3e-5, warmup_ratio=0.1, schedule="cosine",
    eval_every=25, eval_batches=4, save_every=50, sample_every=0,
)
