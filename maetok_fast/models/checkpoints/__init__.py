# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Reading and writing model weights in the public layouts.

    a class says   layout = SIT                       data: maetok.py, generators.py, or the file of a user's own model
                     │
    layout.py      Layout, Facts                      what a layout is; shapes and config.json -> configuration
    locate.py      locate                             a directory, a file or a hub repository
    files.py       read_*, storable, write_together   no code of a file is run; all files of a save or none
    copies.py      pick                               which of a training file's copies, and without which prefix
    pretrained.py  Pretrained, Stored                 from_pretrained, save_pretrained, push_to_hub
    export.py      write_checkpoint                   the same weights as training files and folders of others

No registry: nothing here knows a model class. A new family is a `Pretrained` with a `config_class` and its own
`Layout`, wherever it is written.
"""

from __future__ import annotations

from maetok_fast.models.checkpoints.layout import CheckpointError, Facts, Layout
from maetok_fast.models.checkpoints.pretrained import Pretrained, Stored

__all__ = ["CheckpointError", "Facts", "Layout", "Pretrained", "Stored"]
