"""Settings of the whole suite."""

import torch

# the models here are so small that a second thread costs more than it brings, and two workers share the cores
torch.set_num_threads(1)
