"""What does a model know?  python -m evals out/demo/dpo"""
