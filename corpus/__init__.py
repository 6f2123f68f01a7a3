"""What does the model learn from? A small world made on this machine, your files, or data sets on the hub."""
