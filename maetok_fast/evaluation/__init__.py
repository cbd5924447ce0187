# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Metrics of images: FID, sFID, IS, precision and recall as ADM defines them, KID, MIND, FD in other features.

    open_set -> ImageSet ─┐
    create_extractor ─────┴─ collect -> Features ─ moments, array ─ frechet_distance, kid, mind, precision_recall, ...
    evaluate.py           all of them for one comparison, resumable, by any number of processes
    result.py             what was measured, how, and which traps apply: JSON, Markdown
    reconstruction.py     pairs: PSNR, SSIM, MS-SSIM, LPIPS

Images are uint8 throughout: what a file shows is what is measured.
"""

from maetok_fast.evaluation.distances import Interval, frechet_distance, inception_score, kid, mind
from maetok_fast.evaluation.extractor import Extractor, ExtractorError
from maetok_fast.evaluation.extractors import create_extractor
from maetok_fast.evaluation.features import Features, collect, extract_parts
from maetok_fast.evaluation.moments import Moments
from maetok_fast.evaluation.neighbours import precision_recall
from maetok_fast.evaluation.sets import ImageSet, SetError, open_set

__all__ = [
    "Extractor",
    "ExtractorError",
    "Features",
    "ImageSet",
    "Interval",
    "Moments",
    "SetError",
    "collect",
    "create_extractor",
    "extract_parts",
    "frechet_distance",
    "inception_score",
    "kid",
    "mind",
    "open_set",
    "precision_recall",
]
