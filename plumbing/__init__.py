"""Where does a run live? Files, checkpoints, processes and signals; nothing about learning, so skip it."""
