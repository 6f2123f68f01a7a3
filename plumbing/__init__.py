"""How do bytes reach the disk whole, and how do processes and signals behave? Nothing here is about learning:
skip it."""
