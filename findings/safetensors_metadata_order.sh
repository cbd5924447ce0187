#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# safetensors 0.8.0 (numpy 2.4.6): save_file with more than one entry of metadata does not write the same file twice. The
# tensors are in a fixed order, but the entries of __metadata__ come in another order from call to call, within one
# process too, so that equal checkpoints and latent caches differ in their bytes: hashes of files, content-addressed
# stores and `cmp` see changes where there are none. What is read back is equal. One entry (JSON in a string) is always the
# same file. Seen, 64 saves of the same arrays with three entries:
#
#   files: 6 different of 64 saves; orders of the entries: 6; values read back: equal
#   files with one entry: 1 different of 64 saves
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m pip install -q --target "$folder/packages" safetensors==0.8.0 numpy==2.4.6
PYTHONPATH="$folder/packages" "$python" - "$folder" <<'PYTHON'
import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

assert (safetensors.__version__, np.__version__) == ("0.8.0", "2.4.6")
path = Path(sys.argv[1]) / "x.safetensors"
arrays = {"latents": np.zeros((2, 3), np.float32), "labels": np.arange(2)}


def saves(metadata: dict[str, str]) -> tuple[set[str], set[tuple[str, ...]], list[dict[str, str]]]:
    hashes, orders, read = set(), set(), []
    for _ in range(64):
        save_file(arrays, path, metadata)
        data = path.read_bytes()
        hashes.add(hashlib.sha256(data).hexdigest())
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        orders.add(tuple(header["__metadata__"]))
        with safe_open(path, "np") as file:
            read.append(file.metadata())
    return hashes, orders, read


three = {"total_size": "2", "dtype": "float32", "device": "cpu"}
hashes, orders, read = saves(three)
equal = "equal" if all(metadata == three for metadata in read) else "NOT equal"
print(f"files: {len(hashes)} different of 64 saves; orders of the entries: {len(orders)}; values read back: {equal}")
one, _, _ = saves({"about": json.dumps(three)})
print(f"files with one entry: {len(one)} different of 64 saves")
assert len(hashes) == len(orders) > 1, "the order is fixed now"
assert equal == "equal"
assert len(one) == 1
PYTHON
