"""Settings of the whole suite."""

import hypothesis
import torch

# the models here are so small that a second thread costs more than it brings, and two workers share the cores
torch.set_num_threads(1)

# a deadline for each example would measure the machine and not the claim; pytest-timeout catches what hangs
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
