# Shortcuts for working on the project; .ci/run is what has to pass.
.PHONY: dev lint format types test quick bench ops gate cost wheel

dev:     ## an editable install with everything for tests and benchmarks; run it again after a change in csrc/
	pip install -e '.[test]'
lint:
	ruff check .
	ruff format --check .
format:
	ruff check --fix .
	ruff format .
types:
	.ci/types
test:
	pytest -n 2
quick:   ## without the tests that build wheels and libraries
	pytest -n 2 -m 'not packaging'
bench:
	python benchmarks/throughput.py --tokens 128 --res 512
ops:     ## every op against its reference and torch.compile of it
	maetok-fast bench ops
gate:    ## no op slower than at the base commit
	python benchmarks/compare.py
cost:
	python benchmarks/cost.py --check
wheel:
	pip wheel --no-deps -w dist .
