#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# scikit-learn 1.9.1 (numpy 2.4.6, scipy 1.17.1): GaussianMixture fits integers (codes of a quantizer, pixels) as the
# floats that they are, but scores them in their own dtype. With full and tied covariances the squared distances are kept
# as integers, rounded down: each log-likelihood is up to half a nat too high. With diagonal and spherical ones they are
# right for 64 bits, so that the BIC of the very same fitted models chooses another kind of covariance. 8 bits are off by
# nats, all four kinds. score_samples, bic and aic are all affected; X.astype(float) gives what fit reports. Seen, 1000
# rows of 8 integers from -28 to 25, two modes, mean log-likelihoods:
#
#   full       float64 -23.1270  int64 -22.8820  int8 -20.5381; BIC float64 46868.8, int64 46378.8
#   tied       float64 -23.1426  int64 -22.8946  int8 -20.4512; BIC float64 46651.3, int64 46155.3
#   diag       float64 -23.1555  int64 -23.1555  int8  14.2671; BIC float64 46538.9, int64 46538.9
#   spherical  float64 -23.1646  int64 -23.1646  int8  17.1686; BIC float64 46460.4, int64 46460.4
#   the lowest BIC: spherical for float64, tied for int64
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import sklearn
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

assert sklearn.__version__ == "1.9.1", sklearn.__version__
rng = np.random.default_rng(0)
X = np.concatenate([rng.normal(-12, 4, (500, 8)), rng.normal(12, 4, (500, 8))]).round()
scores, bics = {}, {}
for kind in ("full", "tied", "diag", "spherical"):
    mixture = GaussianMixture(2, covariance_type=kind, random_state=0).fit(X.astype(np.int64))
    scores[kind] = wide, whole, byte = [mixture.score(X.astype(dtype)) for dtype in (np.float64, np.int64, np.int8)]
    bics[kind] = [mixture.bic(X.astype(dtype)) for dtype in (np.float64, np.int64)]
    print(
        f"{kind:9}  float64 {wide:8.4f}  int64 {whole:8.4f}  int8 {byte:8.4f}; "
        f"BIC float64 {bics[kind][0]:.1f}, int64 {bics[kind][1]:.1f}"
    )
    covariances = {
        "full": lambda k: mixture.covariances_[k],
        "tied": lambda k: mixture.covariances_,
        "diag": lambda k: np.diag(mixture.covariances_[k]),
        "spherical": lambda k: mixture.covariances_[k] * np.eye(8),
    }[kind]
    modes = [multivariate_normal(mixture.means_[k], covariances(k)).logpdf(X) for k in range(2)]
    true = logsumexp(np.log(mixture.weights_) + np.transpose(modes), axis=1).mean()
    assert abs(wide - true) < 1e-9, "float64 is not scored as scipy scores it"
    assert abs(mixture.lower_bound_ - true) < 1e-2, "integers are not fitted as floats"
chosen = [min(bics, key=lambda kind: bics[kind][i]) for i in range(2)]
print(f"the lowest BIC: {chosen[0]} for float64, {chosen[1]} for int64")
for kind, (wide, whole, byte) in scores.items():
    high = whole - wide
    assert 0.2 < high < 0.5 if kind in ("full", "tied") else abs(high) < 1e-9, "integers are scored otherwise now"
    assert byte - wide > 2, "bytes are scored otherwise now"
assert chosen == ["spherical", "tied"], chosen
PYTHON
