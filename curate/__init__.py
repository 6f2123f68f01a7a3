"""Which texts are worth learning from?  python -m curate pages.jsonl good.jsonl"""
