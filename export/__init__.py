"""How do I take a model elsewhere?  python -m export out/demo/dpo --format=gguf"""
