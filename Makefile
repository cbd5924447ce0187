# Shortcuts for working on the project; .ci/run is what has to pass.
.PHONY: dev lint format types test quick bench cost wheel

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
	pytest
quick:   ## without the tests that build wheels and libraries
	pytest -m 'not packaging'
bench:
	python benchmarks/throughput.py --tokens 128 --res 512
cost:
	python benchmarks/cost.py --check
wheel:
	pip wheel --no-deps -w dist .
