"""Where numbers go beside the terminal and ``metrics.jsonl``: a file for each of the places, behind one protocol."""
