# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Reading images for the models: files in, (3, res, res) tensors in [-1, 1] out."""

from __future__ import annotations

from maetok_fast.data.images import ImageError, bundled_photographs, find_images, load_image, load_images, to_uint8

__all__ = ["ImageError", "bundled_photographs", "find_images", "load_image", "load_images", "to_uint8"]
