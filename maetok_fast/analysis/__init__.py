# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What latents are like: rows of them, their principal components, Gaussian mixtures and held-out likelihoods.

rows.py        latents as vectors, read in blocks
pca.py         principal components; rows in them, standardised
gmm.py         `fit_gmm`, `nll_curve`: over seeding.py (where EM starts), em.py (passes), densities.py (the dear half
               of a pass) and mixture.py (GMM, the result)
latents.py     `analyze`: tokenizers compared, one folder and one page. settings.py what is asked for, sources.py rows,
               labels and images, work.py what a part is, measured.py and shown.py the parts, store.py what is there
               already, figures.py and report.py what it looks like
probe.py       linear probing; neighbours.py nearest neighbours and their classes; projection.py UMAP; usage.py what
               each token carries; traversal.py decoded latents that no image has; curves.py modes against likelihood
"""

from __future__ import annotations

from maetok_fast.analysis.gmm import GMM, CurvePoint, GMMConfig, fit_gmm, nll_curve
from maetok_fast.analysis.latents import analyze
from maetok_fast.analysis.neighbours import class_agreement, knn_purity, nearest
from maetok_fast.analysis.pca import PCA, WhitenedRows, fit_pca
from maetok_fast.analysis.probe import Probe, linear_probe
from maetok_fast.analysis.projection import Projection, project
from maetok_fast.analysis.rows import ArrayRows, CacheRows, FileRows, Rows, RowsError
from maetok_fast.analysis.settings import PARTS, Entry, Settings
from maetok_fast.analysis.usage import Usage, token_influence, token_usage

__all__ = [
    "GMM",
    "PARTS",
    "PCA",
    "ArrayRows",
    "CacheRows",
    "CurvePoint",
    "Entry",
    "FileRows",
    "GMMConfig",
    "Probe",
    "Projection",
    "Rows",
    "RowsError",
    "Settings",
    "Usage",
    "WhitenedRows",
    "analyze",
    "class_agreement",
    "fit_gmm",
    "fit_pca",
    "knn_purity",
    "linear_probe",
    "nearest",
    "nll_curve",
    "project",
    "token_influence",
    "token_usage",
]
