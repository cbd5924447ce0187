# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Latent caches that users already have: read whichever layout it is, and written in any other.

cache.py         LatentCache, what every layout looks like from outside; std or log variance, detected or asked
readers.py       the layouts: LightningDiT (VTP, SFD, ours), REPA, REPA-E, MAR, DC-AE; `open_cache`
lightningdit.py  the first of them: rows of any number of shards
writers.py       the same layouts written, streaming
shards.py        a shard as it is written, and statistics of channels
convert.py       one into another, and what that loses

Read for training by `maetok_fast.data.latents`.
"""

from __future__ import annotations

from maetok_fast.data.caches.cache import CacheError, LatentCache
from maetok_fast.data.caches.convert import convert_cache
from maetok_fast.data.caches.readers import FORMATS, find_cache, open_cache
from maetok_fast.data.caches.writers import WRITERS

__all__ = ["FORMATS", "WRITERS", "CacheError", "LatentCache", "convert_cache", "find_cache", "open_cache"]
