"""What every test shares."""

import torch
from synthetic_runs import trained_batchtopk, trained_disjoint, trained_identity, trained_l1

__all__ = ["trained_batchtopk", "trained_disjoint", "trained_identity", "trained_l1"]

torch.set_num_threads(1)
