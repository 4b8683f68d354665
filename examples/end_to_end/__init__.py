"""The main job of this repository: train, certify and show all three packages on real data in one run."""
