"""What does a model know?"""
