import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("crosspatch", deadline=None)  # the machine is shared
settings.load_profile("crosspatch")
