"""One thread: the tensors are small, and the machine may be shared."""

import torch

torch.set_num_threads(1)
