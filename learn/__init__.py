"""Can you do it yourself, and what does the model see? Exercises, bugs to find, and a look inside."""
