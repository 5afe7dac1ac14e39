"""``python -m tests.bench``: every figure beside its peer in the same run; JSON under build/bench/."""

from __future__ import annotations

import sys

from tests.bench import bench_copy, bench_determination, bench_transfer

for name, bench in (("copy path", bench_copy.main), ("determination", bench_determination.main), ("transfer", bench_transfer.main)):
    sys.stdout.write(f"--- {name}\n")
    sys.stdout.flush()
    bench()
