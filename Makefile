# Every target makes what it needs: `make test` on a fresh clone creates .venv, builds the kernels and runs the tests.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup-done
NATIVE := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu) setup.py
TRAINED := $(addprefix trained-,dino-openmoji siglip dino clip moco simclr-openmoji)

.PHONY: setup demo test test-all $(TRAINED) mutants lint docs tour bench bench-report trainings gpu-check gpu-page
.PHONY: wheel sdist clean

setup: $(SETUP)

# torch comes first: the build without isolation compiles against it.
.venv/.torch-done: constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch torchvision setuptools wheel pybind11 ninja numpy
	touch $@

# Older Tritons, with which tests compile the kernels in a process of its own. There are none but for Linux on x86-64.
.venv/triton-%/.done: .venv/.torch-done
	[ "$$(uname -sm)" != "Linux x86_64" ] || $(BIN)/pip install -q --no-deps --target $(@D) triton==$*
	mkdir -p $(@D) && touch $@

$(SETUP): .venv/.torch-done .venv/triton-3.6.0/.done pyproject.toml $(NATIVE)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/ssl-kernels train siglip --output-dir runs/demo --overwrite

# Threads that wait for each other give way to those of the other processes; and torch's compiler takes the processor's
# word for its vectors, instead of compiling and loading a program for each kind.
TEST := OMP_WAIT_POLICY=passive TORCHINDUCTOR_VEC_ISA_OK=1 \
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --durations=15

test: setup
	$(TEST)

# Every parameter instead of those that cover the rest, more random examples, and the six trainings at full length, side
# by side on one thread each.
test-all: setup .venv/triton-3.7.1/.done
	$(TEST) -m "" --hypothesis-profile=thorough
	OMP_NUM_THREADS=1 $(MAKE) -O -j$$(getconf _NPROCESSORS_ONLN) $(TRAINED)

$(TRAINED): trained-%: setup
	$(BIN)/ssl-kernels train $(subst -openmoji, --data openmoji,$*) --output-dir runs/test-all/$* --overwrite
	$(BIN)/python tests/check_demo.py runs/test-all/$*

# Bugs planted one by one: which of them do the tests of `make test` not see?
mutants: setup
	$(BIN)/python tests/mutants/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ with the README and the API reference, built offline into build/docs; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The page and the pictures of docs/tour.py, run as it stands.
tour: setup
	$(BIN)/python docs/tour_page.py

bench: setup
	$(BIN)/ssl-kernels bench

# The figures that README and docs print, anew: on a machine that does nothing else, in a quarter of an hour.
bench-report: setup
	$(BIN)/python benchmarks/evidence.py --is-idle
	$(BIN)/ssl-kernels bench --output benchmarks/results
	$(BIN)/python benchmarks/evidence.py

# The figures of trainings that docs/training.md prints, anew: three seeds of each, into the folder of MACHINE.
MACHINE ?= $(notdir $(patsubst %/,%,$(firstword $(filter-out %/gpu/, $(wildcard benchmarks/results/*/)))))
trainings: setup
	for run in siglip clip moco simclr "simclr --data openmoji" dino "dino --data openmoji"; do \
		name=runs/trainings/$$(echo $$run | sed "s/ --data /-/"); \
		for seed in 0 1 2; do \
			$(BIN)/ssl-kernels train $$run --seed $$seed --output-dir $$name-$$seed --overwrite || exit 1; \
		done; \
		$(BIN)/python benchmarks/collect_trainings.py benchmarks/results/$(MACHINE)/trainings.json \
			"train $$run" $$name-0 $$name-1 $$name-2 || exit 1; \
	done

gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py

# The last report of gpu-check joins those in benchmarks/results/gpu, of which docs/gpu_measured.md is made.
gpu-page: setup
	$(BIN)/python benchmarks/gpu_page.py $(wildcard benchmarks/results/gpu_check.json)

# One wheel for every Python >= 3.10 and torch >= 2.10, with the CUDA C++ where nvcc is. It is built where `make setup`
# builds: one after the other, not side by side.
wheel: .venv/.torch-done
	rm -rf build/lib* build/bdist* dist/*.whl
	SSL_KERNELS_NATIVE=0 $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

# What a build needs, and the texts.
sdist: .venv/.torch-done
	rm -rf dist/*.tar.gz *.egg-info  # which remembers files of earlier ones
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"

clean:
	rm -rf .venv build dist *.egg-info ssl_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +
