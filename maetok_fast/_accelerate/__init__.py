# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok_fast.accelerate(model)`: fast layers swapped into models that this package has never seen.

swap.py      accelerate, restore, the report        reading.py   what a module is made of, by structure
checking.py  both forms on a small input            fast.py      the fast forms, with gradients
packed.py    the fast forms for inference, over packed weights

The package has an underscore because `maetok_fast.accelerate` is the function: a module of that name would take its
place in `maetok_fast` as soon as it is imported.
"""

from maetok_fast._accelerate.swap import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
