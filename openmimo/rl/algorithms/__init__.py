"""RL algorithms, one file each. The name of an algorithm is the name of its file."""
