# Every target that needs .venv builds it first; a set-up that is already done costs a fraction of a second.
RANKS ?= 2
ARGS ?=
TIMES ?= 5
PART ?=

# Taken by scripts/setup; what is not given stays as the last set-up had it.
export MPI TORCH PYTHON

run := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ddp test-repeat test-long check check-native docs wheel format clean distclean
.PHONY: bench-codec bench-network bench-prediction bench-scale bench-overhead bench-adaptive bench-accuracy bench-solver bench-pruning
.PHONY: bench-activations bench-faults bench-frames bench-soak

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo
	@echo 'Variables: RANKS=2 (demo), ARGS="-k wire" (test), TIMES=5 PART=gloo (test-repeat), MPI=pip|system, TORCH=torch==2.13.0, PYTHON=python3 (setup)'

setup: ## build .venv: Open MPI, torch for the CPU, Horovod, this package (minutes the first time)
	@scripts/setup

demo: setup ## train the digits example with four compressors on RANKS ranks under Horovod
	@scripts/mpirun -np $(RANKS) $(run)/python examples/horovod_digits.py --methods none,terngrad,adacomp,topk --plot demo.png

test: setup ## run the suite at 1, 2 and 4 ranks; ARGS go to pytest
	@$(run)/python -m mpi_tests $(ARGS)

test-ddp: setup ## run the tests of DistributedDataParallel's hook where neither Horovod nor mpi4py is installed
	@scripts/test_ddp --sizes 1,2,3,4 $(ARGS)

test-repeat: setup ## run the suite TIMES times, or the parts whose names contain PART, and count failures
	@$(run)/python -m mpi_tests --repeat $(TIMES) --part '$(PART)' $(ARGS)

test-long: setup ## run the slow studies that `make test` leaves out
	@$(run)/python -m mpi_tests --long $(ARGS)

check: setup ## formatting, lint and types; changes nothing
	$(run)/ruff format --check .
	$(run)/ruff check .
	$(run)/mypy
	$(run)/shellcheck scripts/* .ci/run
	$(run)/yamllint --strict -d '{extends: default, rules: {line-length: {max: 110}, document-start: disable}}' docker
	$(run)/hadolint docker/Dockerfile

docs: setup ## build the pages of docs/ in build/docs; a link that leads nowhere is an error
	@$(run)/mkdocs build --strict --quiet
	@echo "build/docs/index.html"

check-native: setup ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/check_native

wheel: setup ## one wheel for every Python 3 and any Linux with glibc 2.17 or newer, in dist/
	rm -rf build/lib* build/bdist.* build/wheel
	$(run)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(run):$$PATH" $(run)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(run)/twine check --strict dist/*.whl

# The benchmarks take their options from the environment: OUT=rows.json and those that docs/benchmarks.md names.
bench-codec: setup ## time the kernels against the memory and against torch operations
	@OMP_NUM_THREADS=1 $(run)/python benchmarks/codec.py

bench-network: setup ## time training on hosts with a slow network, emulated in namespaces (needs root)
	@$(run)/python benchmarks/network.py

bench-prediction: setup ## compare what predict says with rows that bench-network wrote: ROWS=network.json
	@$(run)/python benchmarks/prediction.py

bench-scale: setup ## what a rank sends and receives when there are hundreds, simulated
	@OMP_NUM_THREADS=1 $(run)/python benchmarks/scale.py

bench-overhead: setup ## where a step's time goes, and what memory compression takes
	@$(run)/python benchmarks/overhead.py

bench-solver: setup ## time the solver of rates against numpy
	@OMP_NUM_THREADS=1 $(run)/python benchmarks/solver.py

bench-adaptive: setup ## uniform rates against L-GreCo and Accordion
	@OMP_NUM_THREADS=1 $(run)/python benchmarks/adaptive.py

bench-pruning: setup ## what pruning activation gradients costs, and what backward gains by it
	@OMP_NUM_THREADS=1 $(run)/python benchmarks/pruning.py

bench-activations: setup ## what compressed activations save of memory and cost of time
	@OMP_NUM_THREADS=1 $(run)/python benchmarks/activations.py

bench-accuracy: setup ## what every method costs in accuracy, over seeds (an hour and more)
	@$(run)/python benchmarks/accuracy.py

bench-faults: setup ## what goes wrong in training, and how it ends: counted on every back end
	@$(run)/python benchmarks/faults.py

bench-frames: setup ## a million damaged frames: none is taken for a good one, none crashes
	@OMP_NUM_THREADS=1 $(run)/python benchmarks/frames.py

bench-soak: setup ## ten thousand steps on two ranks: equal replicas, flat memory
	@$(run)/python benchmarks/soak.py

format: setup ## rewrite the Python files as `make check` wants them
	$(run)/ruff format .
	$(run)/ruff check --fix .

clean: ## remove what tests, checks and builds leave behind
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## also remove .venv; the compiled Horovod stays in the user's cache
	rm -rf .venv *.egg-info
