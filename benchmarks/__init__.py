"""Ours against its peers, in one session, as ratios. `python -m benchmarks` lists what there is."""
