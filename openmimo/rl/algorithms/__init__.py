"""RL algorithms, one file each; a file's name is the algorithm's name."""
