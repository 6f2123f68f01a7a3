"""
Which texts are worth learning from? A step before data.py: texts in, better texts out.

    python -m curate pages.jsonl good.jsonl
    python -m curate.classifier train builtin-scored --out=out/classifier.safetensors
    python -m curate.experiment --jobs=2
"""
