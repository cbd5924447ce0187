# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Reading images for the models: files in, (3, res, res) tensors in [-1, 1] out.

images.py                   one file as evaluation reads it
sources.py, tars.py         training data: folders, lists, tars of webdataset -> Source (samples.py)
views.py, order.py          which part of which sample a step shows: all random numbers
decode.py, dali.py          bytes to pixels, on a CPU or by DALI
loader.py, reader.py        `Batches`, and what its worker processes do
latents.py                  `LatentBatches`, of a latent cache
stream.py                   what drives the worker processes of both
caches/, adm.py             latent caches, ours and others'; ADM's .npz
"""

from __future__ import annotations

from maetok_fast.data.images import ImageError, bundled_photographs, find_images, load_image, load_images, to_uint8

__all__ = ["ImageError", "bundled_photographs", "find_images", "load_image", "load_images", "to_uint8"]
