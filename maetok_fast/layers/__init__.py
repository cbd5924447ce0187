# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`torch.nn` modules over the ops of `maetok_fast.kernels`, for the models here and as drop-ins elsewhere.

transformer.py   what every model here is made of: norms, attention, MLPs, residuals, embedders
tokenizer.py     RoPEAttention, PatchMask, HOG
recompute.py     what a training step makes again instead of keeping it
adversarial.py   LPIPSTail, DiffAugment, NormAct, EMA
"""

from maetok_fast.layers.adversarial import *
from maetok_fast.layers.recompute import *
from maetok_fast.layers.tokenizer import *
from maetok_fast.layers.transformer import *
